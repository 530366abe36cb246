"""A compiled component under the manager: stages, prefixes, gates and layers are those of eager mode."""

import inspect
import re
from typing import Any

import pytest
import torch

import fxnvtx
from fxnvtx.pipeline import Batch, pipelines

from .nets import LAYERS, STAGES, Uses, labels, pipeline_of, shape

pytestmark = pytest.mark.slow
FUSED = re.compile(r"fused\((.*)\)")
REQUEST: dict[str, Any] = {"prompt": "a fox", "steps": 2}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        if "TORCHINDUCTOR_CACHE_DIR" not in __import__("os").environ:
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="module")
def compiled():
    """Compiled by a warm-up, when nothing is attached: its layers must show all the same."""
    torch._dynamo.reset()
    pipeline = pipelines.build_reference(LAYERS, compile=True)
    with fxnvtx.record() as recording:
        pipeline(Batch(**{**REQUEST, "steps": 1}, is_warmup=True))
    assert {r.category for r in recording.ranges} <= {"compile"}
    return pipeline


def request(pipeline, args=LAYERS):
    with fxnvtx.record() as recording:
        batch = pipeline(Batch(**REQUEST), args)
    assert recording.balanced
    assert not labels(recording, "compile")
    return recording, batch.image


def down_to_components(nodes):
    """The tree without what lies below a component."""
    return [[n.label, [] if n.category == "module" else down_to_components(n.children)] for n in nodes]


def layers(recording, prefix):
    """Names of all layers below `prefix` and of what encloses them, those that share a fused kernel included. A fused
    kernel names its modules relative to the range it lies in."""
    found = set()
    todo = [(node, "") for node in recording.tree()]
    while todo:
        node, above = todo.pop()
        here = node.label if node.category in ("module", "piece") else above
        names = [here]
        if match := FUSED.fullmatch(node.label):
            names = [f"{here}.{name}" for name in match[1].split(", ") if name != "self"]
        found |= {name[len(prefix) + 1 :] for name in names if name.startswith(prefix + ".")}
        todo += [(child, here) for child in node.children]
    return {".".join(name.split(".")[:n]) for name in found for n in range(1, name.count(".") + 2)}


def test_the_same_tree_down_to_the_components_and_the_same_layers(compiled):
    eager, _ = request(pipelines.build_reference(LAYERS))
    mine, _ = request(compiled)
    assert down_to_components(mine.tree())[0][1] == down_to_components(eager.tree())[0][1]
    computing = {n for n in layers(eager, "denoising.dit") if not n.endswith(("unpatchify", "time_proj", ".act"))}
    assert layers(mine, "denoising.dit") >= computing
    assert layers(mine, "denoising.dit") <= layers(eager, "denoising.dit") | {"blocks"}


def test_gates_need_no_recompile(compiled):
    _, image = request(compiled)
    graphs = _graphs()
    silent, without = request(compiled, LAYERS.with_values(enable_layerwise_nvtx_marker=False))
    stages, only = request(compiled, STAGES)
    assert silent.ranges == []
    assert not labels(stages, "module")
    assert "denoising_step_1_t750" in labels(stages)
    windowed, windows = request(compiled, LAYERS.with_values(nvtx_steps="1"))
    steps = [n for root in windowed.tree() for n in root.walk() if n.label.startswith("denoising_step")]
    assert [any(n.label == "denoising.dit.final_layer" for n in s.walk()) for s in steps] == [False, True]
    for other in (without, only, windows):
        assert torch.equal(other, image)
    assert _graphs() == graphs


@pytest.mark.parametrize("mode", ["component-offload", "snapshot-offload"])
def test_offloading_a_compiled_component_changes_no_bit_and_compiles_nothing(compiled, mode):
    resident, image = request(compiled)
    graphs = _graphs()
    args = LAYERS.with_values(residency={"dit": mode})
    offloaded, other = request(compiled, args)
    assert torch.equal(other, image)
    assert compiled.residency.account.of("dit") == 0
    assert "residency.offload dit" in labels(offloaded)
    assert shape(offloaded.tree())[0][1] == shape(resident.tree())[0][1]
    assert _graphs() == graphs


def test_layerwise_offload_of_a_compiled_component():
    torch._dynamo.reset()
    args = LAYERS.with_values(residency={"dit": "layerwise-offload"})
    pipeline = pipelines.build_reference(args, compile=True)
    pipeline(Batch(**REQUEST, is_warmup=True))
    graphs = _graphs()
    recording, image = request(pipeline, args)
    assert _graphs() == graphs
    assert pipeline.residency.account.peak_bytes <= pipeline.residency.bound_bytes
    dits = [n for root in recording.tree() for n in root.walk() if n.label == "denoising.dit"]
    assert len(dits) == 4
    for dit in dits:
        blocks = [c for c in dit.children if c.label.startswith("denoising.dit.blocks.")]
        assert [b.label for b in blocks] == ["denoising.dit.blocks.0", "denoising.dit.blocks.1"]
        for index, block in enumerate(blocks):
            inner = [n.label for n in block.walk()]
            assert f"denoising.dit.blocks.{index}.attn.to_q" in inner
            assert f"residency.offload dit.blocks.{index}" in inner
    eager, _ = request(pipelines.build_reference(args), args)
    assert {n for n in layers(recording, "denoising.dit") if "attn" in n} == {
        n for n in layers(eager, "denoising.dit") if "attn" in n
    }
    again, same = request(pipeline, args)
    assert torch.equal(same, image)
    assert shape(again.tree())[0][1] == shape(recording.tree())[0][1]


def test_a_component_compiled_by_its_blocks_and_removal():
    torch._dynamo.reset()
    pipeline = pipelines.build_reference(LAYERS)
    dit = pipeline.components["dit"]
    for block in dit.blocks:
        block.compile(backend="fxnvtx")
    with fxnvtx.record() as recording:
        pipeline(Batch(**REQUEST, is_warmup=True))
    assert {r.category for r in recording.ranges} <= {"compile"}
    recording, _ = request(pipeline)
    shown = [x for x in labels(recording, "module") if x.startswith("denoising.dit.blocks.") and x.count(".") == 3]
    assert shown == ["denoising.dit.blocks.0", "denoising.dit.blocks.1"] * 4
    pipeline.residency.remove_nvtx_hooks_for_module(dit)
    silent, _ = request(pipeline, STAGES)
    assert not labels(silent, "module")
    assert labels(request(pipeline)[0], "module") == labels(recording, "module")


def _graphs():
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


class Coder(torch.nn.Module):
    """Works by its methods only, like a VAE."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.last = torch.nn.Linear(8, 8)

    def decode(self, x, scale=1.0):
        return self.last(torch.tanh(self.first(x))) * scale

    def forward(self, x):
        return self.decode(x)


@pytest.mark.parametrize("when", ["before its use", "in its use", "the whole component"])
def test_a_compiled_decode(when):
    """Dynamo reads what it compiles: a wrapped method must be the component's own code to it, and nothing more."""
    torch._dynamo.reset()
    coder = Coder()
    x = torch.ones(2, 8)
    wanted = coder.decode(x)
    compile: dict[str, Any] = {"backend": fxnvtx.backend("eager"), "fullgraph": True}
    compiled: list[Any] = []

    def work(stage, batch):
        with stage.use_component("vae") as vae:
            assert list(inspect.signature(vae.decode).parameters) == ["x", "scale"]
            if when == "in its use" and not compiled:
                compiled.append(torch.compile(vae.decode, **compile))
            decode = compiled[0] if compiled else vae.decode
            batch.latent = vae(x) if when == "the whole component" else decode(x)

    pipeline = pipeline_of({"vae": coder}, {"decoding": Uses(work, "vae")})
    if when == "before its use":
        coder.decode = torch.compile(coder.decode, **compile)  # type: ignore[method-assign]
    elif when == "the whole component":
        coder.compile(**compile)
    graphs = _graphs()
    for warmup in (True, False, False):
        with fxnvtx.record() as recording:
            assert torch.equal(pipeline(Batch(is_warmup=warmup)).latent, wanted)
        if not warmup:
            shown = labels(recording, "module")
            assert {"decoding.vae", "decoding.vae.first", "decoding.vae.last"} <= set(shown), shown
    with fxnvtx.record() as recording:
        pipeline(Batch(), LAYERS.with_values(enable_layerwise_nvtx_marker=False))
    assert not recording.ranges
    assert _graphs() == graphs + 1
