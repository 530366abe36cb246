"""Sampling scripts in the shape of the official ones: DiT, SiT (ODE), guided-diffusion, flux, Wan, written anew.

With and without the launcher: the same standard output, exit code and files. With it: model, blocks and steps by name.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fxnvtx.recording import Node, Recording

from ..support.limits import CHILD_S
from .test_cli import fxnvtx

COMMON = """
import sys
import torch
from torch import nn

torch.manual_seed(0)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Linear(8, 8)
    def forward(self, x, c):
        return x + self.mlp(self.norm(x)) * c

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.final = nn.Linear(8, 8)
    def forward(self, x, t, **kwargs):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, t.float().mean())
        return self.final(x)
    def forward_with_cfg(self, x, t, scale):
        out = self.forward(x, t)
        cond, uncond = out.chunk(2)
        return torch.cat([uncond + scale * (cond - uncond)] * 2)

class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(8, 3)
    def decode(self, z):
        return self.decoder(z)

def finish(x):
    torch.save(x, sys.argv[1])
    print("sum", x.double().sum().item())
"""

DIT = """
def indices(n):
    yield from reversed(range(n))

def p_mean_variance(model, x, t, model_kwargs):
    return model(x, t, **model_kwargs)

def p_sample(model, x, t, model_kwargs):
    return x - 0.1 * p_mean_variance(model, x, t, model_kwargs)

def p_sample_loop_progressive(model, x, n, model_kwargs):
    for i in indices(n):
        t = torch.tensor([i] * len(x))
        with torch.no_grad():
            x = p_sample(model, x, t, model_kwargs)
            yield {"sample": x}

def p_sample_loop(model, x, n, model_kwargs):
    for sample in p_sample_loop_progressive(model, x, n, model_kwargs):
        final = sample
    return final["sample"]

def main():
    torch.set_grad_enabled(False)
    net, vae = Net().eval(), VAE().eval()
    x = p_sample_loop(net.forward_with_cfg, torch.randn(4, 8), 3, dict(scale=2.0))
    finish(vae.decode(x.chunk(2)[0]))
"""

SIT = """
class _PerturbFunc(nn.Module):  # torchdiffeq makes a module of what it is given
    def __init__(self, func):
        super().__init__()
        self.base_func = func
    def forward(self, t, y):
        return self.base_func(t, y)

def odeint(func, y, n):
    func = _PerturbFunc(func)
    def step(t, y):
        k = func(t, y)
        for _ in range(2):
            k = func(t, y + k / n / 2)
        return y + k / n
    i = 0
    while i < n:
        y = step(torch.tensor(i / n), y)
        i += 1
    return y

class ode:
    def __init__(self, drift, n):
        self.drift, self.n = drift, n
    def sample(self, x, model, **kwargs):
        def _fn(t, x):
            return self.drift(x, torch.ones(x.size(0)) * t, model, **kwargs)
        return odeint(_fn, x, self.n)

def main():
    net, vae = Net().eval(), VAE().eval()
    def body_fn(x, t, model, **kwargs):
        return model(x, t, **kwargs)
    with torch.no_grad():
        sample_fn = ode(body_fn, 4).sample
        x = sample_fn(torch.randn(4, 8), net.forward_with_cfg, scale=2.0)
        finish(vae.decode(x))
"""

GUIDED = """
class _WrappedModel:  # respacing: no module, and it owns nothing
    def __init__(self, model):
        self.model = model
    def __call__(self, x, ts, **kwargs):
        return self.model(x, torch.arange(3)[ts], **kwargs)

class SpacedDiffusion:
    def p_sample(self, model, x, t, model_kwargs):
        return x - 0.1 * _WrappedModel(model)(x, t, **model_kwargs)
    def p_sample_loop_progressive(self, model, shape, model_kwargs):
        x = torch.randn(*shape)
        for i in range(3)[::-1]:
            t = torch.tensor([i] * shape[0])
            with torch.no_grad():
                x = self.p_sample(model, x, t, model_kwargs)
                yield x
    def p_sample_loop(self, model, shape, model_kwargs):
        for x in self.p_sample_loop_progressive(model, shape, model_kwargs):
            pass
        return x

def main():
    net, diffusion = Net().eval(), SpacedDiffusion()
    images = []
    while len(images) * 2 < 4:
        images.append(diffusion.p_sample_loop(net, (2, 8), dict(y=torch.ones(2))))
    finish(torch.cat(images))
"""

FLUX = """
def denoise(model, img, timesteps):
    for t_curr, t_prev in zip(timesteps[:-1], timesteps[1:]):
        t_vec = torch.full((img.shape[0],), t_curr)
        pred = model(img, t_vec)
        img = img + (t_prev - t_curr) * pred
    return img

@torch.inference_mode()
def main():
    text, net, vae = nn.Sequential(nn.Linear(4, 8)), Net().eval(), VAE().eval()
    x = denoise(net, text(torch.ones(2, 4)), [1.0, 0.5, 0.2, 0.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = vae.decode(x)
    finish(x.float())
"""

WAN = """
class WanT2V:
    def __init__(self):
        self.text_encoder, self.model, self.vae = nn.Sequential(nn.Linear(4, 8)), Net().eval(), VAE().eval()
    def generate(self, n):
        context, context_null = self.text_encoder(torch.ones(1, 4)), self.text_encoder(torch.zeros(1, 4))
        latents = [torch.randn(1, 8)]
        with torch.no_grad():
            for _, t in enumerate(torch.linspace(1, 0.1, n)):
                timestep = torch.stack([t])
                cond = self.model(latents[0], t=timestep, context=context)
                uncond = self.model(latents[0], t=timestep, context=context_null)
                latents = [latents[0] - 0.1 * (uncond + 5 * (cond - uncond))]
            return self.vae.decode(latents[0])

def main():
    finish(WanT2V().generate(3))
    sys.exit(3)
"""

BLOCKS = [f"blocks.{i}" for i in range(2)]
LAYERS = ["embed", *(f"{block}{part}" for block in BLOCKS for part in ("", ".norm", ".mlp")), "final"]
CFG = ["Net.forward_with_cfg", *LAYERS]
NET = ["Net", *LAYERS]


def steps(function: str, count: int, *calls: str) -> list[str]:
    inside = [f"step_{i} (inferred)/{call}" for i in range(count) for call in calls]
    return [f"loop in {function} (inferred)/{item}" for item in inside]


PROGRESSIVE = "SpacedDiffusion.p_sample_loop_progressive"
SHAPES: dict[str, tuple[str, list[str], list[str], int]] = {
    "dit": (DIT, CFG, [*steps("p_sample_loop_progressive", 3, CFG[0]), "VAE.decode"], 0),
    "sit": (SIT, ["_PerturbFunc", *CFG], [*steps("odeint", 4, *["_PerturbFunc"] * 3), "VAE.decode"], 0),
    "guided": (GUIDED, NET, steps(PROGRESSIVE, 3, "Net") * 2, 0),
    "flux": (FLUX, NET, ["Sequential", *steps("denoise", 3, "Net"), "VAE.decode"], 0),
    "wan": (WAN, NET, ["Sequential", "Sequential", *steps("WanT2V.generate", 3, "Net", "Net"), "VAE.decode"], 3),
}


def outermost(nodes: list[Node], *above: str) -> Any:
    """The models' calls, each behind the loop and the step that it lies in."""
    for node in nodes:
        if node.category in ("loop", "step"):
            yield from outermost(node.children, *above, node.label)
        else:
            yield "/".join([*above, node.label]), [item.label for item in node.walk()]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sampling_script(tmp_path: Path, shape: str) -> None:
    program, model, calls, code = SHAPES[shape]
    if sys.version_info < (3, 11):  # functions have their short names there
        calls = [call.replace("SpacedDiffusion.", "").replace("WanT2V.", "") for call in calls]
    (tmp_path / "sample.py").write_text(f'{COMMON}{program}\nif __name__ == "__main__":\n    main()\n')
    words, written = ["sample.py", "sample.pt"], tmp_path / "sample.pt"
    alone = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=CHILD_S)
    plain = written.read_bytes()
    written.unlink()
    ours = fxnvtx("run", "--infer-steps", "-o", "out", *words, cwd=tmp_path)
    assert ours.stdout == alone.stdout
    assert "sum" in alone.stdout
    assert ours.returncode == alone.returncode == code, ours.stderr
    assert written.read_bytes() == plain
    assert {path.name for path in tmp_path.iterdir()} == {"sample.py", "sample.pt", "out"}
    recording = Recording.load(tmp_path / "out" / "recording.json")
    assert recording.balanced
    found = list(outermost(recording.tree()))
    assert [name for name, _ in found] == calls
    seen = {tuple(inside) for _, inside in found if inside[0] == model[0]}
    assert seen == {tuple(model)}
