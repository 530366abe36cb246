"""What Dynamo's variable for a module answers when it is asked for the attribute that holds a slot."""

from __future__ import annotations

import logging
import types
from typing import Any

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx import compile as compiled
from fxnvtx import errors
from fxnvtx.compile import reads_none

from .generated import counted


def _asking():
    """A module whose own code asks for the attribute."""

    class Asking(nn.Module):
        def forward(self, x):
            return x + 1 if self._compiled_call_impl is None else x - 1

    return Asking()


def test_a_slot_is_not_there_for_dynamo_and_may_come_and_go():
    model = fxnvtx.instrument(nn.Sequential(_asking()), "net")
    call = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.ones(2)
    with counted() as counters:
        with fxnvtx.record():
            assert torch.equal(call(x), x + 1)
        assert torch.equal(call(x), x + 1)
    assert counters["graphs"] == 1


def test_what_others_put_there_is_theirs():
    model = _asking()
    model._compiled_call_impl = lambda x: x  # no product of torch.compile
    assert not reads_none(model)
    assert torch.equal(torch.compile(lambda x: model.forward(x), backend="eager")(torch.ones(2)), torch.zeros(2))


def test_a_module_compiled_in_place_is_inlined_as_it_is_without_us():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[0].compile(backend="eager")
    assert not reads_none(model[0])  # not instrumented: torch's own way
    fxnvtx.instrument(model, "net")
    assert reads_none(model[0])
    x = torch.ones(2, 3)
    expected = model(x)
    with counted() as counters:
        call = torch.compile(model, backend="eager", fullgraph=True)
        with fxnvtx.record():
            assert torch.equal(call(x), expected)
        assert torch.equal(call(x), expected)
    assert counters["graphs"] == 1


@pytest.mark.parametrize(
    "missing", [{}, {"UnspecializedNNModuleVariable": type("Other", (), {}), "NNModuleVariable": 1}]
)
def test_a_torch_without_the_place_is_left_alone_and_said(missing, caplog, monkeypatch):
    monkeypatch.setattr(errors, "_said", set())
    caplog.set_level(logging.WARNING, logger="fxnvtx")
    stand_in: Any = types.SimpleNamespace(**missing)
    compiled._patch(stand_in)
    assert "graph breaks" in caplog.text
