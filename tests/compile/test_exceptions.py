"""A kernel that raises, at every launch position: the stack is as it was, and the next call is whole."""

from __future__ import annotations

import pytest
import torch

import fxnvtx
from fxnvtx import ranges

from .launches import KernelError, witness
from .models import Same, Unique

pytestmark = pytest.mark.slow


def _labels(recording):
    return [r.label for r in recording.ranges]


def test_every_launch_of_forward_and_backward():
    model = fxnvtx.instrument(Unique(1), "net")
    compiled = torch.compile(model, backend="fxnvtx")
    x = model.inputs()
    compiled(x).sum().backward()
    with witness() as launches, fxnvtx.record() as whole:
        result = compiled(x)
        forward = len(launches)
        result.sum().backward()
    assert forward > 4
    assert len(launches) - forward > 6
    for position in range(len(launches)):
        outer = ranges.label("outer")
        with fxnvtx.record() as recording:
            entry = ranges.push(outer)
            before = list(ranges.local.stack)
            with witness(fail_at=position) as seen, pytest.raises(KernelError):
                compiled(x).sum().backward()
            assert len(seen) == position + 1
            assert ranges.local.stack == before, position
            ranges.pop(entry)
        assert recording.balanced, position
        assert ranges.local.stack == []
        assert all(r.end_ns is not None and not r.leaked for r in recording.ranges)
    with fxnvtx.record() as after:
        compiled(x).sum().backward()
    assert _labels(after) == _labels(whole)


def test_a_failing_block_of_a_regional_model():
    model = fxnvtx.instrument(Same(), "net")
    for block in model.blocks:
        block.compile(backend="fxnvtx")
    x = model.inputs()
    with torch.no_grad():
        model(x)
        with witness() as launches, fxnvtx.record() as whole:
            model(x)
        for position in range(len(launches)):
            with fxnvtx.record() as recording, witness(fail_at=position), pytest.raises(KernelError):
                model(x)
            assert ranges.local.stack == []
            assert recording.balanced
        with fxnvtx.record() as after:
            model(x)
    assert _labels(after) == _labels(whole)
