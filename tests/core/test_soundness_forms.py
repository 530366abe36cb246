"""Whatever a forward is written like, the instrumented model gives the plain one's value, error and random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx.errors import TraceError

from . import zoo
from .twins import Twins


def x(*shape, seed=0):
    return torch.randn(*(shape or (3, zoo.W)), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", zoo.TRACEABLE, ids=lambda k: k.__name__)
def test_straight_line_levels_take_the_fx_path(kind):
    twins = Twins(kind)
    assert twins.traced()
    for seed in range(3):
        assert twins.agree(x(seed=seed))[0] == "value"
    assert twins.holds()
    if kind is not zoo.UnpackChild:  # whose child cannot
        fxnvtx.instrument(kind(), path="fx")


@pytest.mark.parametrize("kind", zoo.REFUSED, ids=lambda k: k.__name__)
def test_everything_else_is_refused_with_a_reason(kind):
    assert not Twins(kind).traced()
    with pytest.raises(TraceError) as caught:
        fxnvtx.instrument(kind(), path="fx")
    assert kind.__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [k for k in zoo.REFUSED if k is not zoo.StarArgs], ids=lambda k: k.__name__)
def test_refused_levels_agree_too(kind):
    twins = Twins(kind)
    for seed in range(3):
        assert twins.agree(x(seed=seed))[0] == "value"


def test_an_optional_argument_that_comes_and_goes():
    twins = Twins(zoo.Optional)
    for cond in (None, x(seed=1), None, x(seed=2)):
        twins.agree(x(), cond)
        twins.agree(x(), cond=cond)


def test_star_arguments():
    twins = Twins(zoo.StarArgs)
    twins.agree(x())
    twins.agree(x(), x(seed=1))
    twins.agree(x(), y=x(seed=2))
    assert twins.agree()[1] is IndexError


def test_keyword_only_arguments():
    twins = Twins(zoo.KeywordOnly)
    twins.agree(x())
    twins.agree(x(), y=[1, {"k": x()}], gain=-0.0)
    assert twins.agree(x(), 1)[1] is TypeError
    assert twins.agree(x(), z=1)[1] is TypeError


@pytest.mark.parametrize(
    "kind", [zoo.Straight, zoo.Loop, zoo.Attention, zoo.ShadowedArgument], ids=lambda k: k.__name__
)
def test_calls_that_do_not_fit(kind):
    twins = Twins(kind)
    for args, kwargs in (((), {}), ((x(), 1, 2, 3), {}), ((x(),), {"nope": 1}), ((x(),), {"x": x(), "input": x()})):
        assert twins.agree(*args, **kwargs)[1] is TypeError
    assert twins.agree("text")[0] == "error"
    assert twins.agree(None)[0] == "error"
    assert twins.agree(x(3, 9, 9))[0] == "error"


def test_argument_names_that_mean_something():
    twins = Twins(zoo.ShadowedArgument)
    twins.agree(x(), 3.0, "kept")
    twins.agree(input=x(), type=2.0, getattr=[1])


def test_nested_inputs_and_outputs():
    twins = Twins(zoo.NestedInputs)
    batch = {"x": x()}
    twins.agree(batch, [(0, x(seed=1))])
    twins.agree(batch=batch, extra=((0, x(seed=1)), 2))
    assert twins.agree({}, [])[1] is KeyError
    assert twins.agree(batch, [])[1] is IndexError


def test_unpacking_that_does_not_fit():
    twins = Twins(zoo.UnpackChild)
    assert twins.agree(x())[0] == "value"
    for parts in (1, 3, 0, 2):
        twins.each(lambda m, parts=parts: setattr(m.pair, "parts", parts))  # type: ignore[misc]
        assert twins.agree(x())[1] is ValueError if parts != 2 else twins.agree(x())[0] == "value"
    twins = Twins(zoo.Attention)
    assert twins.agree(x(2, 3, 4))[0] == "value"
    assert twins.agree(x(3, 4))[1] is ValueError
    assert twins.agree(x(1, 2, 3, 4))[1] is ValueError


def test_a_list_that_a_child_writes_into():
    (kept, _) = Twins(zoo.SharedList).agree(x())[1]
    assert len(kept) == 3


def test_random_numbers_drawn_inside():
    for kind in (zoo.RandomFactory, zoo.RandomLike, zoo.Dropouts):
        twins = Twins(kind)
        torch.manual_seed(7)
        first = twins.agree(x())[1]
        second = twins.agree(x())[1]
        assert not torch.equal(first, second)


def test_factories_follow_the_input():
    twins = Twins(zoo.SymbolicFactory)
    for rows in (1, 5):
        twins.agree(x(rows, zoo.W))


def test_recursion():
    twins = Twins(zoo.Recursive)
    twins.agree(x(), 3)
    (root,) = twins.tree
    assert root == (
        "Recursive",
        (("a", ()), ("Recursive", (("a", ()), ("Recursive", (("a", ()), ("Recursive", (("a", ()),))))))),
    )


def test_modes_of_torch_around_the_call():
    for kind in (zoo.Wide, zoo.Straight, zoo.OwnTensors):
        twins = Twins(kind)
        data = x(2, 3, zoo.W)
        with torch.no_grad():
            assert not twins.agree(data)[1].requires_grad
        with torch.inference_mode():
            assert twins.agree(data)[1].is_inference()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            twins.agree(data)
        torch.set_default_dtype(torch.float64)
        try:
            twins.agree(data)
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            twins.agree(data)


def test_other_kinds_of_tensors():
    twins = Twins(lambda: nn.Sequential(nn.Linear(4, 4), zoo.Straight()))
    twins.agree(x().requires_grad_())
    twins.agree(x()[::2])
    twins.agree(x().to(torch.float64))  # an error, the same one
    twins.agree(torch.nn.Parameter(x()))
    twins.agree(torch.randn(0, 4))
    twins.agree(torch.nested.nested_tensor([x(2, 4), x(3, 4)]).to_padded_tensor(0.0))
    twins.agree(x(3, 5))
    twins.agree(x(4, 4).to_sparse())


@pytest.mark.parametrize("tied_first", [False, True])
def test_a_tied_module_of_a_class_does_not_decide_for_its_untied_sisters(tied_first):
    class Fresh(zoo.Straight):
        pass

    def tied():
        model: Any = Fresh()
        model.b = model.a
        return model

    def untied():  # the same names get ranges as in the tied one: Identity gets none
        model: Any = Fresh()
        model.b = nn.Identity()
        return model

    for make in (tied, untied, tied, untied)[not tied_first :]:
        twins = Twins(make)
        twins.agree(x())
        assert twins.traced() == (make is untied)
