"""One graph serves many blocks; each call shows its own. What cannot be known is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx.modules.explain import regions

from .generated import counted
from .launches import innermost, witness
from .models import Mlp, Same, Unique

pytestmark = pytest.mark.slow


def _labels(recording):
    return [r.label for r in recording.ranges if r.category == "module"]


class Bare(nn.Module):
    """Nothing in it tells one instance from another."""

    def forward(self, x):
        return torch.relu(x).cos()


class Row(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def _regional(model, **options):
    for block in model.blocks:
        block.compile(backend="fxnvtx", **options)
    return model


@pytest.mark.parametrize("dynamic", [None, True])
def test_identical_blocks_compile_once_and_keep_their_names(dynamic):
    model = fxnvtx.instrument(Same(4), "net")
    _regional(model, dynamic=dynamic)
    x = model.inputs().requires_grad_()  # as every later block's input does: no guard tells the first block apart
    with counted() as counters:
        model(x).sum().backward()
    assert counters["graphs"] == 1
    with fxnvtx.record() as recording:
        model(x).sum().backward()
    assert recording.balanced
    labels = _labels(recording)
    parts = ("up", "mid", "down")
    for block in range(4):
        # forward and backward each show the block, and each of its linears at least once in both
        assert labels.count(f"net.blocks.{block}") == 2
        assert all(labels.count(f"net.blocks.{block}.{p}") >= 2 for p in parts)
    forward = labels[: labels.index("backward")]
    linears = [n for n in forward if n.rpartition(".")[2] in parts]
    assert linears == [f"net.blocks.{b}.{p}" for b in range(4) for p in parts]
    backward = [n for n in labels[labels.index("backward") :] if n.count(".") == 2]
    assert backward == [f"net.blocks.{b}" for b in (3, 2, 1, 0)]


def test_a_backward_whose_forward_was_not_watched():
    """Nothing was recorded when the graph was made: the parameters that the backward gets tell the block."""
    model = _regional(fxnvtx.instrument(Same(3), "net"))
    model(model.inputs()).sum().backward()
    result = model(model.inputs()).sum()
    with fxnvtx.record() as recording:
        result.backward()
    assert recording.balanced
    blocks = [n for n in _labels(recording) if n.count(".") == 2]
    assert blocks == ["net.blocks.2", "net.blocks.1", "net.blocks.0"]
    assert _labels(recording).count("backward") == 3


def test_blocks_without_parameters_are_named_by_the_range_around_them():
    model = _regional(fxnvtx.instrument(Row([Bare() for _ in range(3)]), "net"))
    x = torch.randn(4)
    with counted() as counters:
        model(x)
    assert counters["graphs"] == 1
    with fxnvtx.record() as recording:
        model(x)
    assert _labels(recording) == ["net", "net.blocks.0", "net.blocks.1", "net.blocks.2"]


def test_what_cannot_be_known_is_said():
    """The block is called with nothing around it that tells which one it is."""
    model = fxnvtx.instrument(Row([Bare() for _ in range(3)]), "net")
    compiled: Any = torch.compile(Bare.forward, backend="fxnvtx")
    compiled(model.blocks[0], torch.randn(4))
    with fxnvtx.record() as recording:
        compiled(model.blocks[1], torch.randn(4))
    assert _labels(recording) == ["Bare (one of several)"]


def test_tied_weights_in_two_blocks():
    blocks = [Mlp(8, 11, 13) for _ in range(2)]
    blocks[1].up.weight, blocks[1].up.bias = blocks[0].up.weight, blocks[0].up.bias
    model = _regional(fxnvtx.instrument(Row(blocks), "net"))
    x = torch.randn(5, 8)
    model(x)
    with fxnvtx.record() as recording:
        model(x)
    linears = [n for n in _labels(recording) if n.rpartition(".")[2] in ("up", "mid", "down")]
    assert linears == [f"net.blocks.{b}.{p}" for b in range(2) for p in ("up", "mid", "down")]


def test_one_block_under_two_names():
    block = Mlp(8, 11, 13)
    model = Row([block, Mlp(8, 11, 13), block])
    compiled = torch.compile(fxnvtx.instrument(model, "net"), backend="fxnvtx")
    x = torch.randn(5, 8)
    with torch.no_grad():
        compiled(x)
        with fxnvtx.record() as recording:
            compiled(x)
    blocks = [n for n in _labels(recording) if n.count(".") == 2]
    assert blocks == ["net.blocks.0", "net.blocks.1", "net.blocks.2"]


def test_without_instrument_the_class_is_the_root():
    model = Unique(1)
    compiled = torch.compile(model, backend="fxnvtx")
    x = model.inputs()
    with torch.no_grad():
        compiled(x)
        with fxnvtx.record() as recording:
            compiled(x)
    assert _labels(recording)[:3] == ["Unique", "embed", "blocks.0"]
    assert {"blocks.0.up", "blocks.0.mid", "blocks.0.down", "head"} <= set(_labels(recording))


def test_compiled_and_eager_have_the_same_levels():
    """The same paths in the same order; the compiled tree may lack a module whose work was fused into another's."""
    model = fxnvtx.instrument(Unique(2), "net")
    x = model.inputs()
    compiled = torch.compile(model, backend="fxnvtx")
    with torch.no_grad():
        compiled(x)
        with fxnvtx.record() as eager:
            model(x)
        with fxnvtx.record() as graph:
            compiled(x)

    def paths(recording):
        found = []
        for root in recording.tree():
            todo: list[tuple[tuple[str, ...], Any]] = [((), root)]
            while todo:
                above, node = todo.pop()
                if node.category == "module":
                    found.append((*above, node.label))
                todo.extend(((*above, node.label), c) for c in reversed(node.children))
        return found

    assert set(paths(graph)) <= set(paths(eager))
    assert list(dict.fromkeys(paths(graph))) == [p for p in paths(eager) if p in set(paths(graph))]
    assert len(set(paths(graph))) >= len(set(paths(eager))) - 2


def test_another_model_takes_over_the_same_code():
    """Two models with equal code share generated code; each is named by itself."""
    first, second = fxnvtx.instrument(Unique(1), "first"), fxnvtx.instrument(Unique(1), "second")
    x = first.inputs()
    with torch.no_grad():
        compiled = [torch.compile(m, backend="fxnvtx") for m in (first, second)]
        for call in compiled:
            call(x)
        with fxnvtx.record() as recording:
            for call in compiled:
                call(x)
    labels = _labels(recording)
    half = len(labels) // 2
    assert [n.replace("first", "second") for n in labels[:half]] == labels[half:]
    assert "first.blocks.0.up" in labels


def test_static_input_shapes_are_the_payload():
    model = fxnvtx.instrument(Unique(1), "net")
    compiled = torch.compile(model, backend="fxnvtx", dynamic=False)
    with torch.no_grad():
        compiled(model.inputs(5))
        with fxnvtx.record() as recording:
            compiled(model.inputs(5))
    shapes = {r.label: r.payload for r in recording.ranges}
    assert shapes["net.embed"] == [[5, 7]]
    assert shapes["net.blocks.0.mid"] == [[5, 11]]
    assert shapes["net.head"] == [[5, 6]]
    dynamic = torch.compile(model, backend="fxnvtx", dynamic=True)
    with torch.no_grad():
        dynamic(model.inputs(5))
        with fxnvtx.record() as recording:
            dynamic(model.inputs(6))
    assert {r.label: r.payload for r in recording.ranges}["net.blocks.0.mid"] is None  # not fixed: nothing is claimed


def _halved(x):
    y = x / 2
    torch._dynamo.graph_break()
    return y.sin() + 1


class Helped(torch.nn.Module):
    """Work in functions and methods that are no forward, and that Dynamo compiles apart."""

    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(4, 4)

    def _call(self, x):
        y = self.lin(x).relu()
        torch._dynamo.graph_break()
        return y.cos()

    def forward(self, x):
        return _halved(self._call(x)) * 3


def test_functions_of_no_module_are_shown_in_the_nearest_module():
    model = fxnvtx.instrument(torch.nn.Sequential(Helped(), torch.nn.Linear(4, 4)), "net")
    compiled = torch.compile(model, backend="fxnvtx")
    x = torch.randn(2, 4)
    with torch.no_grad():
        compiled(x)
        with witness() as launches, fxnvtx.record() as recording:
            compiled(x)
    assert sorted(set(_labels(recording))) == ["net", "net.0", "net.0.lin", "net.1"]
    assert (
        len([n for n in launches if innermost(recording, n) == "net.0"]) == 5
    )  # twice _call and _halved, once forward
    assert all(innermost(recording, n) for n in launches)
    told = [str(r) for r in regions() if r.name in ("_call()", "_halved()")]
    assert len(told) >= 3
    assert all("shown in the range of the module that runs it" in text for text in told)
    loose = torch.compile(_halved, backend="fxnvtx")
    loose(x)
    with fxnvtx.record() as recording:
        loose(x)
    assert [r.label for r in recording.ranges] == ["_halved()", "_halved()"]


def test_a_function_s_backward_lies_in_the_module_that_ran_it():
    model = fxnvtx.instrument(Helped(), "net")
    compiled = torch.compile(model, backend="fxnvtx")
    x = torch.randn(2, 4)
    compiled(x).sum().backward()
    with fxnvtx.record() as recording:
        compiled(x).sum().backward()
    assert recording.balanced
    assert not [n for n in recording.tree() if n.label not in ("net", "backward")]
    assert {c.label for n in recording.tree() if n.label == "backward" for c in n.children} == {"net"}
