"""What compiled ranges keep alive, several threads, checkpointing, compiled autograd, and failures of our own code."""

from __future__ import annotations

import gc
import logging
import threading
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fxnvtx
from fxnvtx import errors
from fxnvtx.compile import module_index, region
from fxnvtx.compile import provenance as launch_sites

from .launches import enclosing, innermost, witness
from .models import Same, Unique, linear_shapes

pytestmark = pytest.mark.slow


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(errors, "_said", set())
    caplog.set_level(logging.WARNING, logger="fxnvtx")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "fxnvtx"]


def _labels(recording):
    return [r.label for r in recording.ranges if r.category == "module"]


def test_compiled_code_keeps_neither_model_nor_inputs():
    model = fxnvtx.instrument(Unique(1), "net")
    compiled = torch.compile(model, backend="fxnvtx")
    x = model.inputs()
    with fxnvtx.record():
        compiled(x).sum().backward()
        compiled(x).sum().backward()
    alive = weakref.ref(model), weakref.ref(model.get_parameter("blocks.0.up.weight")), weakref.ref(x)
    del model, compiled, x
    gc.collect()
    assert [a() for a in alive] == [None, None, None]


def test_threads_that_run_one_compiled_model():
    model = fxnvtx.instrument(Unique(1), "net")
    compiled = torch.compile(model, backend="fxnvtx")
    x = model.inputs()
    with torch.no_grad():
        expected = compiled(x)
    wrong = []

    def run():
        with torch.no_grad():
            for _ in range(30):
                if not torch.equal(compiled(x), expected):
                    wrong.append("result")

    with fxnvtx.record() as recording:
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert recording.balanced
    by_thread: dict[int, list[str]] = {}
    for item in recording.ranges:
        by_thread.setdefault(item.thread_id, []).append(item.label)
    assert len(by_thread) == 4
    one = next(iter(by_thread.values()))
    assert all(labels == one for labels in by_thread.values())
    assert one[: len(one) // 30] * 30 == one


class Checkpointed(Unique):
    """The blocks are recomputed in backward."""

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x).sin()


def test_recomputation_belongs_to_its_module_in_backward():
    model = fxnvtx.instrument(Checkpointed(2), "net")
    names = linear_shapes(model)
    compiled = torch.compile(model, backend="fxnvtx")
    x = model.inputs()
    compiled(x).sum().backward()
    with witness() as launches, fxnvtx.record() as recording:
        result = compiled(x).sum()
        forward = len(launches)
        result.backward()
    assert recording.balanced
    for number, launch in enumerate(launches):
        labels = [r.label for r in enclosing(recording, launch)]
        assert (labels[0] == "backward") == (number >= forward)
        if launch.name in ("mm", "addmm"):
            sizes = {n for shape in launch.shapes for n in shape}
            owners = {f"net.{o}" for pair, found in names.items() if pair <= sizes for o in found}
            assert innermost(recording, launch) in owners, (launch, labels)


def test_compiled_autograd_runs_as_before():
    model = fxnvtx.instrument(Unique(1), "net")
    x = model.inputs()
    compiled = torch.compile(model, backend="fxnvtx")
    compiled(x).sum().backward()
    assert model.embed.weight.grad is not None
    expected = model.embed.weight.grad.clone()
    model.zero_grad()
    with fxnvtx.record() as recording, torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: compiled(x).sum().backward(), backend="fxnvtx")()
    assert torch.allclose(model.embed.weight.grad, expected, atol=1e-5)  # type: ignore[arg-type]
    assert fxnvtx.ranges.local.stack == []
    assert recording.balanced


def test_naming_that_fails_leaves_the_model_alone(said, monkeypatch):
    model = fxnvtx.instrument(Same(1), "net")
    x = model.inputs()
    compiled = torch.compile(model, backend="fxnvtx")
    expected = compiled(x)

    def fail(*args, **kwargs):
        raise RuntimeError("naming is broken")

    monkeypatch.setattr(region, "bind", fail)
    with fxnvtx.record() as recording:
        assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(x), expected)
    assert _labels(recording) == ["net", "net"]  # the eager path's own, one for each call
    assert len(said()) == 1
    assert "naming is broken" in said()[0]


@pytest.mark.parametrize("where", ["graph", "owners"])
def test_reading_that_fails_leaves_the_compilation_alone(said, monkeypatch, where):
    def fail(*args, **kwargs):
        raise RuntimeError("reading is broken")

    model = Unique(1)
    x = model.inputs()
    expected = torch.compile(model, backend="inductor")(x)
    if where == "graph":
        monkeypatch.setattr(module_index.ModuleIndex, "read", fail)
    else:
        monkeypatch.setattr(launch_sites, "_launch_of", fail)
    fxnvtx.instrument(model, "net")
    compiled = torch.compile(model, backend="fxnvtx")
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        assert torch.equal(compiled(x), expected)
    with fxnvtx.record() as recording:
        compiled(x)
    assert recording.balanced
    assert recording.ranges[0].label == "net"
    if where == "owners":
        assert recording.ranges[1].label == "owner unknown (its owner could not be looked up)"
    assert len(said()) == 1
    assert "reading is broken" in said()[0]
