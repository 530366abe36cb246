"""Same kernels, same numbers to the bit, same graphs; no recompile when listeners or switches change."""

from __future__ import annotations

import copy

import pytest
import torch

import fxnvtx

from .generated import counted, forget_generated_code, kernel_hashes, without_graph_caches, wrapper_sources
from .models import Broken, Same, Unique

pytestmark = pytest.mark.slow


def _run(model, backend, regional=False):
    """(outputs, gradients, counters, kernels) of one compilation from scratch."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    x = model.inputs()
    if backend == "fxnvtx":
        fxnvtx.instrument(model, "net")
    forget_generated_code()
    with counted() as counters, without_graph_caches(), fxnvtx.record() as recording:
        if regional:
            for block in model.blocks:
                block.compile(backend=backend)
            compiled = model
        else:
            compiled = torch.compile(model, backend=backend)
        result = compiled(x)
        result.sum().backward()
        compiled(model.inputs(BATCH_2))  # another batch: a recompile with dynamic shapes
    gradients = [p.grad for p in model.parameters()]
    assert (backend == "fxnvtx") == bool([r for r in recording.ranges if r.category == "module"])
    return result.detach(), gradients, counters, kernel_hashes()


BATCH_2 = 9


@pytest.mark.parametrize(("make", "regional"), [(Unique, False), (Broken, False), (Same, True)], ids=lambda v: str(v))
def test_same_kernels_same_bits_same_graphs(make, regional):
    model = make()
    plain = _run(model, "inductor", regional)
    ours = _run(model, "fxnvtx", regional)
    assert torch.equal(plain[0], ours[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], ours[1], strict=True))
    assert plain[2] == ours[2]
    assert plain[3] == ours[3]
    assert len(plain[3]) >= 3


def test_the_generated_code_differs_by_our_lines_only():
    model = Unique(1)
    _run(model, "inductor")
    plain = wrapper_sources()
    _run(model, "fxnvtx")
    ours = wrapper_sources()

    def bare(source):
        lines = (line.strip() for line in source.splitlines())
        skipped = ("import fxnvtx", "from fxnvtx", "_fxnvtx_", "if _fxnvtx_at", "try:", "finally:", "pass", "#", "//")
        return [line for line in lines if line and not line.startswith(skipped)]

    assert sorted(map(bare, plain)) == sorted(map(bare, ours))
    assert all("_fxnvtx" in source for source in ours)
    assert not any("_fxnvtx" in source for source in plain)


def test_switching_and_listening_never_recompile():
    model = fxnvtx.instrument(Unique(1), "net")
    compiled = torch.compile(model, backend="fxnvtx")
    x = model.inputs()
    with counted() as counters:
        first = compiled(x)
        with fxnvtx.record() as recording:
            assert torch.equal(compiled(x), first)
        assert "net.blocks.0.up" in {r.label for r in recording.ranges}
        fxnvtx.set_enabled(model, False)
        with fxnvtx.record() as recording:
            assert torch.equal(compiled(x), first)
        assert recording.ranges == []
        fxnvtx.set_enabled(model, True)
        with fxnvtx.record() as recording:
            assert torch.equal(compiled(x), first)
        assert "net.blocks.0.up" in {r.label for r in recording.ranges}
        fxnvtx.uninstrument(model)
        with fxnvtx.record() as recording:
            assert torch.equal(compiled(x), first)
        assert {r.label for r in recording.ranges} >= {"Unique", "blocks.0.up"}  # labels without a name
    assert counters["graphs"] == 1


def test_options_reach_labels_without_a_recompile():
    model = fxnvtx.instrument(Unique(1), "net")
    compiled = torch.compile(model, backend="fxnvtx")
    x = model.inputs()
    with counted() as counters:
        compiled(x)
        fxnvtx.instrument(model, "other", exclude=["blocks.0.mid", torch.nn.LayerNorm], depth=2)
        with fxnvtx.record() as recording:
            compiled(x)
        labels = {r.label for r in recording.ranges}
        assert {"other", "other.embed", "other.blocks.0", "other.blocks.0.up"} <= labels
        assert "other.blocks.0.mid" not in labels
        assert "other.blocks.0.norm" not in labels
        fxnvtx.instrument(model, "other", depth=1)
        with fxnvtx.record() as recording:
            compiled(x)
        assert {r.label for r in recording.ranges if r.category == "module"} == {
            "other",
            "other.embed",
            "other.blocks.0",
            "other.head",
        }
    assert counters["graphs"] == 1
