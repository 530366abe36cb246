"""An instrumented model that another backend compiles: a line says so, explain() tells, or ours takes over if asked."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx.compile import dynamo
from fxnvtx.modules.explain import regions

from .generated import counted, kernel_hashes, without_graph_caches
from .models import Same, Unique, in_place, regional, whole


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(dynamo, "_said", set())
    monkeypatch.setattr(dynamo, "_unsaid", {})
    caplog.set_level(logging.WARNING, logger="fxnvtx")
    return lambda: [r.getMessage() for r in caplog.records if "compiled by" in r.getMessage()]


@pytest.mark.parametrize("way", [whole, in_place, regional])
def test_it_is_said_once_to_who_listens(way, said):
    model = fxnvtx.instrument(Same(2), "net")
    call = way(model, "eager")
    x = model.inputs()
    call(x)
    assert said() == []  # nobody listens
    with fxnvtx.record():
        call(x)
    assert len(said()) == 1
    assert 'net was compiled by "eager"' in said()[0]
    assert 'backend="fxnvtx"' in said()[0]
    torch._dynamo.reset()
    with fxnvtx.record():
        call(x)
    assert len(said()) == 1


def test_explain_tells_what_happened():
    model = fxnvtx.instrument(Unique(1), "net")
    torch.compile(model, backend="aot_eager")(model.inputs())
    last = regions()[-1]
    assert (last.name, last.backend, last.path) == ("Unique", "aot_eager", "none")
    assert "compiled with backend" in str(fxnvtx.explain(model))


def test_a_sequential_root_that_records_nothing_says_why(said, caplog):
    model = fxnvtx.instrument(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "row")
    call = torch.compile(model, backend="eager")
    with fxnvtx.record():
        call(torch.ones(2, 3))
    assert len(said()) >= 1
    assert "no instrumented model was called" not in caplog.text


def test_compiling_in_place_after_instrument_keeps_the_models_own_range():
    """Module.compile() puts its callable where the slot was; no listener comes later that would put things right."""
    model = fxnvtx.instrument(Same(2), "net")
    x = model.inputs()
    with fxnvtx.record() as recording:
        model.compile(backend="eager")
        model(x)
        first = len([r for r in recording.ranges if r.label == "net"])
        model(x)
        assert len([r for r in recording.ranges if r.label == "net"]) == first + 1
    fxnvtx.uninstrument(model)
    assert model._compiled_call_impl is not None  # the user's own is what stays


def test_what_is_not_instrumented_or_ours_is_not_spoken_of(said):
    fxnvtx.instrument(keep := Unique(1), "net")
    with fxnvtx.record():
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
        torch.compile(nn.Linear(3, 3), backend="eager")(torch.ones(2, 3))
        torch.compile(keep, backend=fxnvtx.backend("eager"))(keep.inputs())
    assert said() == []


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["environment", "argument"])
def test_inductor_means_ours_where_it_is_asked_for(asked, monkeypatch, said):
    model = Unique(1)
    x = model.inputs()
    with counted() as plain, without_graph_caches():
        expected = torch.compile(model, options={"max_fusion_size": 8})(x)
        kernels = kernel_hashes()
    fxnvtx.instrument(model, "net", compile=asked == "argument")
    if asked == "environment":
        monkeypatch.setenv(dynamo.TAKE_PART, "1")
    with counted() as ours, without_graph_caches():
        if asked == "environment":
            call = torch.compile(model, options={"max_fusion_size": 8})
        else:
            model.compile(options={"max_fusion_size": 8})
            call = model
        with fxnvtx.record() as recording:
            result = call(x)
            result.sum().backward()
    assert torch.equal(result, expected)
    assert plain == ours
    assert set(kernels) <= set(kernel_hashes())
    assert {"net", "net.blocks.0.up", "net.head", "backward"} <= {r.label for r in recording.ranges}
    assert said() == []


def test_one_models_choice_is_no_others_and_no_other_backends(said):
    fxnvtx.instrument(chosen := Same(1), "chosen", compile=True)
    fxnvtx.instrument(other := Unique(1), "other")
    with fxnvtx.record() as recording:
        torch.compile(chosen, backend="eager")(chosen.inputs())
        torch.compile(other)(other.inputs())
    assert len(said()) == 2
    assert not any(r.label.startswith("other.blocks") for r in recording.ranges)
    fxnvtx.instrument(chosen, "chosen")
    torch._dynamo.reset()
    with fxnvtx.record() as recording:
        torch.compile(chosen)(chosen.inputs())
    assert not any(r.label.startswith("chosen.blocks") for r in recording.ranges)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,))


def test_branches_that_run_eagerly_are_said_to_be_missing(said):
    """torch compiles them by itself, and their modules are not called then."""
    model = fxnvtx.instrument(Branches(), "net")
    x = torch.ones(1, 4)
    with torch.no_grad(), fxnvtx.record() as recording:
        assert torch.equal(model(x), model.a(x))
    assert {r.label for r in recording.ranges if r.category == "module"} == {"net", "net.a"}  # the second: by the test
    assert len(said()) == 1
    assert "torch.cond" in said()[0]
