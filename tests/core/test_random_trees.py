"""For any model: the same ranges whatever the path, the same outputs to the bit, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import fxnvtx
from fxnvtx.errors import TraceError
from fxnvtx.modules.call_slot import SLOT
from fxnvtx.modules.registry import controls_of

from .tools import equal, outcome, run_recorded, shape
from .trees import Chain, Decides, Looped, Twice, W, Wraps, build, recipes

slow = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def expected_tree(model, sample):
    """What torch's own forward hooks see, without the modules that get no range."""
    from fxnvtx.modules.selection import DEFAULT_EXCLUDE, is_callable_module

    calls: list = []
    stack = [calls]
    handles = []

    def enter(module, *_):
        children: list = []
        stack[-1].append((module, children))
        stack.append(children)

    def leave(*_):
        stack.pop()

    for module in dict.fromkeys(model.modules()):
        if is_callable_module(module) and (not isinstance(module, DEFAULT_EXCLUDE) or module is model):
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
    outcome(model, sample)
    [h.remove() for h in handles]
    return calls


def names_agree(expected, found, names, prefix=""):
    """Same nesting; every label is one of the module's names."""
    assert len(expected) == len(found)
    for (module, children), (label, below) in zip(expected, found, strict=True):
        assert label in names[id(module)], (label, names[id(module)])
        names_agree(children, below, names)


def check(recipe, seed, traceable=False):
    sample = torch.randn(3, W, generator=torch.Generator().manual_seed(seed))
    plain = build(recipe)
    torch.manual_seed(seed)
    wanted = outcome(plain, sample)
    assert wanted[0] == "value"
    trees = {}
    for path in ("hooks", "auto", "fx"):
        model = build(recipe)
        before = [dict(m.__dict__) for m in model.modules()]
        try:
            fxnvtx.instrument(model, "m", path=path)
        except TraceError:
            assert path == "fx"
            assert not traceable
            continue
        torch.manual_seed(seed)
        assert equal(model(sample), wanted[1])
        torch.manual_seed(seed)
        found, recording = run_recorded(model, sample)
        assert found[0] == "value", found
        assert equal(found[1], wanted[1])
        assert recording.balanced
        trees[path] = shape(recording.tree())
        fxnvtx.uninstrument(model)
        assert [dict(m.__dict__) for m in model.modules()] == before
    assert trees["auto"] == trees["hooks"]
    assert trees.get("fx", trees["hooks"]) == trees["hooks"]
    assert not traceable or "fx" in trees
    names: dict[int, set[str]] = {}
    for name, module in plain.named_modules(remove_duplicate=False):
        names.setdefault(id(module), set()).add(f"m.{name}" if name else "m")
    torch.manual_seed(seed)  # a Dropout may come before a branch that looks at the data
    names_agree(expected_tree(plain, sample), trees["hooks"], names)
    return trees


@pytest.mark.slow
@slow
@given(recipes(), st.integers(0, 3))
@example((Chain, (Twice, ("leaf",), ("tied", 0)), (Looped, ("tied", 0), ("tied", 1))), 0)
@example((Decides, (Wraps, ("tied", 0)), (nn.Sequential, ("drop",), ("tied", 2))), 1)
def test_every_path_shows_the_same_tree(recipe, seed):
    check(recipe, seed)


@pytest.mark.slow
@settings(slow, max_examples=30)
@given(recipes(traceable=True), st.integers(0, 3))
def test_straight_line_models_take_the_fx_path_as_a_whole(recipe, seed):
    assert "fx" in check(recipe, seed, traceable=True)


@settings(max_examples=40, deadline=None)
@given(recipes(depth=4), st.sampled_from(["hooks", "auto"]), st.integers(0, 4))
def test_depth_cuts_the_same_tree(recipe, path, depth):
    sample = torch.randn(3, W, generator=torch.Generator().manual_seed(0))
    model = fxnvtx.instrument(build(recipe), "m", path="hooks")
    # A tied module lies at several depths; where a path is too deep it goes by another name or by none.
    if len(list(model.named_modules(remove_duplicate=False))) != len(list(model.modules())):
        return
    torch.manual_seed(0)  # a Dropout may come before a branch that looks at the data
    full = shape(run_recorded(model, sample)[1].tree())
    fxnvtx.instrument(model, "m", path=path, depth=depth)
    torch.manual_seed(0)
    assert shape(run_recorded(model, sample)[1].tree()) == cut(full, depth)


def cut(tree, depth):
    return () if depth < 0 else tuple((label, cut(children, depth - 1)) for label, children in tree)


@settings(max_examples=60, deadline=None)
@given(recipes(depth=4), st.data())
def test_any_order_of_instrumenting_switching_and_calling(recipe, data):
    """At every point the outputs are the plain ones and the stack is clean; in the end nothing is left."""
    sample = torch.randn(3, W, generator=torch.Generator().manual_seed(1))
    plain, model = build(recipe).eval(), build(recipe).eval()
    wanted = plain(sample)
    before = [dict(m.__dict__) for m in model.modules()]
    parts = [model, *model.children()]
    for _ in range(data.draw(st.integers(1, 10))):
        part = data.draw(st.sampled_from(parts))
        match data.draw(st.sampled_from(["hooks", "auto", "out", "on", "off", "call", "record"])):
            case "hooks" | "auto" as path:
                fxnvtx.instrument(part, data.draw(st.sampled_from(["a", "b", None])), path=path)
            case "out":
                fxnvtx.uninstrument(part)
            case "on" | "off" as switch:
                if controls_of(part) is not None:
                    fxnvtx.set_enabled(part, switch == "on")
            case "call":
                assert equal(model(sample), wanted)
            case "record":
                found, recording = run_recorded(model, sample)
                assert equal(found[1], wanted)
                assert recording.balanced
                assert all(SLOT not in m.__dict__ for m in model.modules())
    for part in parts:
        fxnvtx.uninstrument(part)
    assert run_recorded(model, sample)[1].ranges == []
    assert [dict(m.__dict__) for m in model.modules()] == before
