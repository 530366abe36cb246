"""An owner is who computes in a launch. Who computed what it reads is not: attention, convolutions, own operators."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx.compile.provenance import unknown_forms
from fxnvtx.modules.explain import regions

from .launches import empty_ranges, enclosing, innermost, witness

pytestmark = pytest.mark.slow


@torch.library.custom_op("fxnvtx_tests::turn", mutates_args=())
def turn(x: torch.Tensor) -> torch.Tensor:
    return -x


turn.register_fake(torch.empty_like)
turn.register_autograd(lambda ctx, gradient: -gradient)


class Attention(nn.Module):
    """Queries and keys are normed by modules of their own: fused, they would be in the attention's origins."""

    def __init__(self, width=16):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width // 2), nn.RMSNorm(width // 2)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        result = nn.functional.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        return self.to_out(result.transpose(1, 2).flatten(2))


class Negation(nn.Module):
    def forward(self, x):
        return turn(x)


class Heavy(nn.Module):
    """What a DiT and a VAE spend their time in, each fed by work of another module."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(4, 8)
        self.act = nn.SiLU()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2)
        self.conv_out = nn.Conv2d(8, 4, 3, padding=1, bias=False)
        self.before = nn.LayerNorm(16)
        self.attn = Attention()
        self.gate = nn.Tanh()
        self.negation = Negation()

    def forward(self, x):
        x = self.conv_out(self.up(self.conv(self.act(self.norm(x))) + x)).flatten(2).unflatten(2, (-1, 16))[:, 0]
        x = x + self.attn(self.before(x))
        return self.negation(self.gate(x) * 2)


def _recorded(model, x, grad=False):
    fxnvtx.instrument(model, "net", path="hooks")
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(model, backend="fxnvtx", fullgraph=True)

        def once():
            result = compiled(x)
            if grad:
                result.sum().backward()

        once()
        with witness() as launches, fxnvtx.record() as recording:
            once()
    return launches, recording


OWN = {"_scaled_dot_product": "net.attn", "convolution": ("net.conv", "net.conv_out"), "turn": "net.negation"}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_heavy_kernels_have_their_own_range(grad):
    launches, recording = _recorded(Heavy(), torch.randn(2, 8, 8, 8), grad)
    found: dict[str, list[str | None]] = {}
    for launch in launches:
        for part in OWN:
            if part in launch.name and not launch.name.startswith("cpp"):
                found.setdefault(part, []).append(innermost(recording, launch))
    assert set(found) == set(OWN)
    for part, labels in found.items():
        for index, label in enumerate(labels):
            allowed = OWN[part]
            assert label in allowed if isinstance(allowed, tuple) else label == allowed, (part, index, labels)
    assert empty_ranges(recording, launches) == []
    assert not [r.label for r in recording.ranges if "unknown" in r.label]
    assert all(enclosing(recording, n) for n in launches)
    assert not regions()[-1].unknown


def test_a_kernel_that_feeds_a_custom_operator_is_not_its():
    class Feeding(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm(8)
            self.gate = nn.Tanh()
            self.negation = Negation()

        def forward(self, x):
            return self.negation(self.gate(self.norm(x)))

    launches, recording = _recorded(Feeding(), torch.randn(4, 8))
    labels = {not n.name.startswith("cpp"): innermost(recording, n) for n in launches}
    assert labels == {False: "fused(norm, gate)", True: "net.negation"}


def test_every_form_of_line_is_known():
    """Launches of what is not known go unseen: this is the place to see that the lists are complete."""
    unknown_forms.clear()
    _recorded(Heavy(), torch.randn(2, 8, 8, 8))
    assert not unknown_forms
