"""Every launch lies in the range of the module that it belongs to. The shapes say which; fxnvtx is not asked."""

from __future__ import annotations

import re
from time import perf_counter_ns

import pytest
import torch

import fxnvtx
from fxnvtx.modules import instrument

from .launches import check_nesting, empty_ranges, enclosing, innermost, witness
from .models import Broken, Twice, Unique, linear_shapes, widths_of_blocks

pytestmark = pytest.mark.slow


def _whole(model):
    return torch.compile(model, backend="fxnvtx")


def _dynamic(model):
    return torch.compile(model, backend="fxnvtx", dynamic=True)


def _regional(model):
    for block in model.blocks:
        block.compile(backend="fxnvtx")
    return model


def _method(model):
    model.compile(backend="fxnvtx")
    return model


def _function(model):
    return torch.compile(lambda x: model(x) * 2, backend="fxnvtx")


def _replaced(model):
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="fxnvtx")
    return model


WAYS = {
    "whole": (Unique, _whole),
    "dynamic": (Unique, _dynamic),
    "regional": (Unique, _regional),
    "method": (Unique, _method),
    "function": (Unique, _function),
    "replaced": (Unique, _replaced),
    "broken": (Broken, _whole),
    "twice and tied": (Twice, _whole),
}


def _check(recording, launches, names, widths, backward_from_ns):
    """All matmuls in the innermost range of their module; all launches in some range; no range without a launch."""
    assert recording.balanced
    check_nesting(recording)
    matmuls = [n for n in launches if n.name in ("addmm", "mm")]
    seen = set()
    for launch in matmuls:
        sizes = {n for shape in launch.shapes for n in shape}
        owners = {f"net.{o}" for pair, found in names.items() if pair <= sizes for o in found}
        assert len(owners) >= 1, launch
        assert innermost(recording, launch) in owners, (launch, [r.label for r in enclosing(recording, launch)])
        labels = [r.label for r in enclosing(recording, launch)]
        assert labels.count("backward") == int(launch.start_ns > backward_from_ns), (launch, labels)
        assert len(set(labels)) == len(labels), labels  # each level once
        seen.add(innermost(recording, launch))
    assert {o for found in names.values() for o in found} & {s[4:] for s in seen if s is not None}
    generated = 0
    for launch in launches:
        labels = [r.label for r in enclosing(recording, launch)]
        assert labels, launch
        blocks = {widths[n] for shape in launch.shapes for n in shape if n in widths}
        if launch.name.startswith("cpp") and len(blocks) == 1:
            block = blocks.pop()
            named = [n.replace("again", "blocks.0") for n in labels]
            fused = [n for n in named if n.startswith("fused(") and re.search(rf"\b{re.escape(block)}\b", n)]
            assert f"net.{block}" in named or fused, (launch, labels)
            generated += 1
    assert generated >= 4 * len(set(widths.values()))
    return matmuls, seen


@pytest.mark.parametrize("way", WAYS)
def test_every_matmul_is_inside_its_own_module(way):
    make, compiling = WAYS[way]
    model = make()
    names, widths = linear_shapes(model), widths_of_blocks(model)
    instrument(model, "net")
    compiled = compiling(model)
    x = model.inputs()
    compiled(x).sum().backward()  # compiles forward and backward
    with witness() as launches, fxnvtx.record() as recording:
        result = compiled(x)
        middle = perf_counter_ns()
        result.sum().backward()
    # only what is compiled leaves launches; the eager rest of a regional model does not
    matmuls, seen = _check(recording, launches, names, widths, middle)
    inside = {n for found in names.values() for n in found if way not in ("regional", "replaced") or "blocks" in n}
    if way == "twice and tied":
        inside = {n for n in inside if not n.startswith("again")}
        seen = {s.replace("net.again", "net.blocks.0") for s in seen}
    assert seen == {f"net.{n}" for n in inside}
    assert len(matmuls) >= 3 * len(inside) - 1  # forward, gradient of weight and of input (the first has no input's)
    if way not in ("regional", "replaced", "broken"):
        assert empty_ranges(recording, launches) == []
