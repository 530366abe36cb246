"""insert_ranges(): a valid graph with balanced range nodes around every module call, and the same function."""

from __future__ import annotations

import copy
import operator
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn

import fxnvtx
from fxnvtx import insert_ranges
from fxnvtx.errors import InstrumentError, SelectionError
from fxnvtx.modules.fx_graph import RANGE_NODES, has_ranges, range_pop, range_push
from fxnvtx.ranges import local

from . import zoo
from .test_soundness_forms import x
from .tools import equal, run_recorded, shape
from .trees import W, build, recipes


class EveryKind(nn.Module):
    """All kinds of nodes: placeholder with a default, get_attr, call_function, call_method, call_module, output."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("shift", torch.randn(4))
        self.blocks = nn.ModuleList([zoo.Straight(), zoo.Loop()])
        self.seq = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))

    shift: torch.Tensor

    def forward(self, x, scale=2.0, *, extra=None):
        x = self.blocks[0](x) * self.weight
        x = torch.relu(x).view(-1, 4) + self.shift
        for block in self.blocks:
            x = block(x)
        return {"y": self.seq(x) * scale, "extra": [extra, x]}


def traced(model=None):
    torch.manual_seed(0)
    return fx.symbolic_trace(model if model is not None else EveryKind().eval())


def kinds(gm):
    return [n.target for n in gm.graph.nodes if n.target in RANGE_NODES]


EXPECTED = (
    (
        "EveryKind",
        (
            ("blocks.0", (("blocks.0.a", ()), ("blocks.0.b", ()))),
            ("blocks.0", (("blocks.0.a", ()), ("blocks.0.b", ()))),
            ("blocks.1", (*((f"blocks.1.layers.{i}", ()) for i in range(3)), ("blocks.1.norm", ()))),
            ("seq", (("seq.0", ()),)),
        ),
    ),
)


def test_the_tree_is_that_of_the_hooks_path():
    gm = insert_ranges(traced())
    gm.graph.lint()
    assert kinds(gm).count(range_push) == kinds(gm).count(range_pop) == 14
    result, recording = run_recorded(gm, x(), extra=1)
    assert recording.balanced
    assert shape(recording.tree()) == EXPECTED
    torch.manual_seed(0)
    hooked = fxnvtx.instrument(EveryKind().eval(), path="hooks")
    found, wanted = run_recorded(hooked, x(), extra=1)
    assert shape(wanted.tree()) == EXPECTED
    assert equal(result, found)


@pytest.mark.parametrize(
    "options", [{}, {"depth": 1}, {"include": "blocks.*"}, {"exclude": None}, {"name": "n"}, {"root": False}]
)
def test_the_same_function_in_every_mode(options):
    plain = traced()
    gm = insert_ranges(plain, **options)
    for mode in (True, False):
        plain.train(mode)
        gm.train(mode)
        for args, kwargs in (((x(),), {}), ((x(), 0.5), {"extra": None}), ((), {"x": x()})):
            torch.manual_seed(1)
            wanted = plain(*args, **kwargs)
            torch.manual_seed(1)
            assert equal(gm(*args, **kwargs), wanted)
            torch.manual_seed(1)
            result, recording = run_recorded(gm, *args, **kwargs)
            assert equal(result[1], wanted)
            assert recording.balanced
    assert gm.state_dict().keys() == plain.state_dict().keys()
    assert all(a is b for a, b in zip(gm.parameters(), plain.parameters(), strict=True))


def test_the_original_is_not_changed():
    plain = traced()
    code, nodes = plain.code, list(plain.graph.nodes)
    gm = insert_ranges(plain)
    assert plain.code == code
    assert list(plain.graph.nodes) == nodes
    assert not has_ranges(plain)
    assert has_ranges(gm)


def test_twice_is_once():
    gm = insert_ranges(traced())
    assert insert_ranges(gm) is gm
    assert fxnvtx.instrument(gm) is gm


def test_dead_code_elimination_keeps_them():
    gm = insert_ranges(traced())
    before = len(kinds(gm))
    assert all(n.is_impure() for n in gm.graph.nodes if n.target in RANGE_NODES)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    gm.graph.lint()
    assert len(kinds(gm)) == before
    assert shape(run_recorded(gm, x())[1].tree()) == EXPECTED


def test_removal_gives_the_code_back():
    plain = traced()
    gm = insert_ranges(plain)
    assert fxnvtx.uninstrument(gm) is gm
    gm.graph.lint()
    assert not has_ranges(gm)
    assert gm.code == plain.code
    assert run_recorded(gm, x())[1].ranges == []
    assert equal(gm(x()), plain(x()))
    assert shape(run_recorded(insert_ranges(gm), x())[1].tree()) == EXPECTED


def test_removal_from_a_graph_without_ranges_changes_nothing():
    plain = traced()
    plain.graph.on_generate_code(lambda before: lambda body: ["# mine\n", *(before(body) if before else body)])
    plain.recompile()
    code = plain.code
    assert "# mine" in code
    assert fxnvtx.uninstrument(plain) is plain
    assert plain.code == code
    gm = insert_ranges(plain)
    assert "# mine" in gm.code
    assert shape(run_recorded(gm, x())[1].tree()) == EXPECTED
    assert "# mine" in fxnvtx.uninstrument(gm).code


class Stop(BaseException):
    pass


@pytest.mark.parametrize("kind", [ValueError, Stop])
def test_balanced_when_any_node_raises(kind):
    gm = insert_ranges(traced())
    nodes = [
        n
        for n in gm.graph.nodes
        if n.op in {"call_function", "call_method", "call_module"} and n.target not in RANGE_NODES
    ]
    assert len(nodes) >= 15

    def fail(*args, **kwargs):
        raise kind

    for index in range(len(nodes)):
        broken = copy.deepcopy(gm)
        node = [n for n in broken.graph.nodes if n.op.startswith("call_") and n.target not in RANGE_NODES][index]
        node.op, node.target = "call_function", fail
        broken.recompile()
        with fxnvtx.record() as recording, fxnvtx.range("outside"):
            fxnvtx.range_push("mine")
            before = list(local.stack)
            with pytest.raises(kind):
                broken(x())
            assert local.stack == before
            fxnvtx.range_pop()
        assert recording.balanced
        assert shape(recording.tree())[0][1][0][0] == "mine"


def test_a_range_leaked_in_the_graph_does_not_close_the_callers():
    """A hook closes a handle over the graph's own: the graph must not then close what is not its own."""
    from fxnvtx.ranges import label, pop, push

    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x)

    gm: Any = insert_ranges(fx.symbolic_trace(Leaky()))
    with fxnvtx.record():
        fxnvtx.range_push("callers")
        handle = push(label("handle"))

        def close_outer(*_):
            pop(handle)
            raise ValueError

        gm.a.register_forward_hook(close_outer)
        with pytest.raises(ValueError):
            gm(x())
        assert [e.text for e in local.stack.labels] == ["callers"]
        fxnvtx.range_pop()
    assert local.stack == []


def test_selection():
    assert shape(run_recorded(insert_ranges(traced(), "dit", depth=1), x())[1].tree()) == (
        ("dit", (("dit.blocks.0", ()), ("dit.blocks.0", ()), ("dit.blocks.1", ()), ("dit.seq", ()))),
    )
    tree = shape(run_recorded(insert_ranges(traced(), exclude=[nn.Linear], root=False), x())[1].tree())
    assert [label for label, _ in tree] == ["blocks.0", "blocks.0", "blocks.1", "seq"]
    assert tree[3] == ("seq", (("seq.1", ()),))
    with pytest.raises(SelectionError):
        insert_ranges(traced(), include="nope.*")
    with pytest.raises(InstrumentError):
        insert_ranges(EveryKind())  # type: ignore[arg-type]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(recipes(traceable=True, depth=4))
def test_any_traceable_tree(recipe):
    sample = torch.randn(3, W, generator=torch.Generator().manual_seed(0))
    model = build(recipe).eval()
    gm = insert_ranges(fx.symbolic_trace(model), "m")
    gm.graph.lint()
    found, recording = run_recorded(gm, sample)
    assert equal(found[1], model(sample))
    wanted = run_recorded(fxnvtx.instrument(model, "m", path="hooks"), sample)[1]
    assert recording.balanced
    assert shape(recording.tree()) == shape(wanted.tree())


def test_a_graph_written_by_hand_without_metadata():
    root = nn.Module()
    root.add_module("blocks", nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    graph = fx.Graph()
    value = graph.placeholder("x")
    for index in (0, 1):
        value = graph.call_module(f"blocks.{index}", (value,))
        value = graph.call_function(operator.mul, (value, 2))
    graph.output(value)
    gm = fx.GraphModule(root, graph)
    inserted = insert_ranges(gm, "hand")
    assert shape(run_recorded(inserted, x())[1].tree()) == (("hand", (("hand.blocks.0", ()), ("hand.blocks.1", ()))),)
    assert equal(inserted(x()), gm(x()))


def test_an_empty_graph_and_an_identity():
    empty = fx.GraphModule(nn.Module(), fx.Graph())
    insert_ranges(empty, "e").graph.lint()
    gm = insert_ranges(fx.symbolic_trace(nn.Identity()))
    assert gm(3) == 3
    assert run_recorded(gm, 3)[1].balanced


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_only_metadata(strict):
    torch.manual_seed(0)
    model = zoo.Wide().eval()
    sample = x(2, 3, W)
    module = torch.export.export(model, (sample,), strict=strict).module()
    assert not any(n.op == "call_module" and "guards" not in str(n.target) for n in module.graph.nodes)
    gm = insert_ranges(module, "wide")
    gm.graph.lint()
    assert equal(gm(sample), module(sample))
    result, recording = run_recorded(gm, sample)
    assert equal(result[1], model(sample))
    assert recording.balanced
    wanted = run_recorded(fxnvtx.instrument(model, "wide", path="hooks"), sample)[1]
    assert shape(recording.tree()) == shape(wanted.tree())


def test_skip_types_are_known_by_name_in_an_exported_program():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(self.drop(x))

    module = torch.export.export(Drops(), (x(),)).module()
    assert [r.label for r in run_recorded(insert_ranges(module, "d"), x())[1].ranges] == ["d", "d.a"]
    kept = insert_ranges(module, "d", exclude=nn.Linear)
    assert [r.label for r in run_recorded(kept, x())[1].ranges] == ["d", "d.drop"]


def test_a_graph_that_dynamo_captured():
    """Its nodes are spread: each maximal run of one module call gets one range."""
    torch._dynamo.reset()
    caught = []

    def keep(gm, inputs):
        caught.append(insert_ranges(gm, "captured"))
        caught[-1].graph.lint()
        return caught[-1].forward

    model = zoo.Wide().eval()
    sample = x(2, 3, W)
    wanted = model(sample)
    compiled = torch.compile(model, backend=keep)
    assert torch.allclose(compiled(sample), wanted)
    with fxnvtx.record() as recording:
        compiled(sample)
    assert recording.balanced
    assert len(caught) == 1
    seen = [r.label for r in recording.ranges]
    hooked = run_recorded(fxnvtx.instrument(model, "captured", path="hooks"), sample)[1]
    assert shape(recording.tree()) == shape(hooked.tree()), seen
    fxnvtx.uninstrument(model)
    torch._dynamo.reset()


@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_the_same_function(copier):
    gm = insert_ranges(traced())
    made = copier(gm)
    result, recording = run_recorded(made, x())
    assert equal(result[1], gm(x()))
    assert recording.balanced
    if copier is copy.deepcopy:
        assert shape(recording.tree()) == EXPECTED


def test_hooks_on_the_graph_module_are_kept():
    plain = traced()
    plain.register_forward_pre_hook(lambda m, args: (args[0] + 1, *args[1:]))
    plain.register_forward_hook(lambda m, args, kwargs, out: out["y"], with_kwargs=True)
    assert equal(insert_ranges(plain)(x()), plain(x()))
