"""Children that torch.compile has wrapped, inside compiled parents: they keep their layers and their names."""

from __future__ import annotations

import pytest
import torch

import fxnvtx

from .models import Same, Twice, Unique


def _labels(call, x, backward=False):
    with fxnvtx.record() as recording:
        result = call(x)
        if backward:
            result.sum().backward()
    assert recording.balanced
    return [r.label for r in recording.ranges if r.category == "module"]


def _wrap_blocks(model):
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend=fxnvtx.backend("eager"))
    return model


def _wrap_leaves(model):
    for block in model.blocks:
        block.up = torch.compile(block.up, backend="eager")
        block.norm = torch.compile(block.norm, backend=fxnvtx.backend("eager"))
    return model


def _wrap_twice(model):
    _wrap_leaves(model)
    return _wrap_blocks(model)


@pytest.mark.parametrize("wrap", [_wrap_blocks, _wrap_leaves, _wrap_twice])
@pytest.mark.parametrize("make", [Unique, Same, Twice])
@pytest.mark.parametrize("first", ["instrument", "wrap"])
def test_wrapped_children_of_a_compiled_parent(make, wrap, first):
    torch.manual_seed(0)
    plain = fxnvtx.instrument(make(), "net")
    x = plain.inputs()
    unwrapped = torch.compile(plain, backend=fxnvtx.backend("eager"))
    unwrapped(x)
    expected = _labels(unwrapped, x)
    steps = [wrap, lambda m: fxnvtx.instrument(m, "net")]
    model = make()
    for step in steps if first == "wrap" else reversed(steps):
        model = step(model)
    call = torch.compile(model, backend=fxnvtx.backend("eager"))
    call(x)
    assert _labels(call, x) == expected
    with fxnvtx.record():
        torch._dynamo.reset()
        call(x)
    assert _labels(call, x) == expected


def test_wrapped_blocks_called_one_by_one():
    model = _wrap_twice(fxnvtx.instrument(Same(3), "net"))
    x = model.inputs()
    plain = _labels(fxnvtx.instrument(Same(3), "net"), x)
    model(x)
    assert _labels(model, x) == plain


@pytest.mark.slow
def test_wrapped_children_under_inductor_forward_and_backward():
    model = fxnvtx.instrument(Unique(1), "net")
    model.blocks[0] = torch.compile(model.blocks[0], backend="fxnvtx")  # type: ignore[assignment]
    call = torch.compile(model, backend="fxnvtx")
    x = model.inputs()
    call(x)
    labels = _labels(call, x, backward=True)
    forward, backward = labels[: labels.index("backward")], labels[labels.index("backward") :]
    for part in ("net.blocks.0.up", "net.blocks.0.mid", "net.blocks.0.down", "net.head"):
        assert part in forward
        assert part in backward
