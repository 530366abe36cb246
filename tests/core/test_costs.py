"""What a change costs depends on what changed: counted in calls made, never in time."""

from __future__ import annotations

import sys
import weakref

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx.compile.region import Anchor, Region
from fxnvtx.modules import Attachments
from fxnvtx.modules.registry import Control, controls_of, entry_of


def net(blocks=3):
    return nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.GELU()) for _ in range(blocks)))


def calls(function):
    """How many Python and C functions were called, our own placing of slots among them."""
    found = {"calls": 0, "placed": 0}

    def count(frame, event, argument):
        if event in ("call", "c_call"):
            found["calls"] += 1
            found["placed"] += event == "call" and frame.f_code.co_name in ("_place", "_remove")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def toggle(model):
    fxnvtx.set_enabled(model, False)
    fxnvtx.set_enabled(model, True)


def instrument_again(model):
    fxnvtx.instrument(model, "m", path="hooks")


def another_name(model):
    fxnvtx.instrument(model, "n", path="hooks")


def in_and_out(model):
    fxnvtx.uninstrument(model)
    fxnvtx.instrument(model, "m", path="hooks")


def root_call(model):
    model(torch.zeros(1, 2))


def changed_call(model):
    model[0] = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    model(torch.zeros(1, 2))


def asks(model):
    entry_of(model[0])
    fxnvtx.explain(model)


regions: weakref.WeakKeyDictionary[nn.Module, Region] = weakref.WeakKeyDictionary()


def region_call(model):
    """As the wrapper that Inductor generates begins: whose call is this?"""
    if model not in regions:
        anchor = Anchor(type(model), weakref.ref(model), {0: "0.0.weight"})
        regions[model] = Region("k", [anchor], True, None, [])
    assert regions[model].call([model[0][0].weight]).base == "m"


def component_use(model):
    attachments = Attachments()
    attachments.enable(model, "m", None)
    attachments.switch(model, False)
    attachments.disable(model)
    attachments.remove(model)
    fxnvtx.instrument(model, "m", path="hooks")


def hooks_object(model):
    hooks = fxnvtx.DiffusionNvtxHooks()
    hooks.register_hooks(model)
    hooks.set_enabled(True)
    hooks.remove_hooks()
    fxnvtx.instrument(model, "m", path="hooks")


def lives_and_dies(model):
    other = fxnvtx.instrument(net(1), path="hooks")
    del other


WHAT = [
    toggle, instrument_again, another_name, in_and_out, root_call, changed_call, asks, region_call, component_use,
    hooks_object, lives_and_dies,
]  # fmt: skip


@pytest.fixture(autouse=True)
def listening():
    with fxnvtx.record() as recording:
        yield recording


@pytest.mark.parametrize("what", WHAT, ids=lambda f: f.__name__)
def test_other_models_cost_nothing(what):
    model = fxnvtx.instrument(net(), "m", path="hooks")
    what(model)
    what(model)
    alone = calls(lambda: what(model))
    others = [fxnvtx.instrument(net(), f"o{i}", path="hooks") for i in range(12)]
    for other in others[::3]:
        fxnvtx.instrument(other[0], "inner", path="hooks")
    what(model)
    assert calls(lambda: what(model)) == alone


def test_a_switch_costs_the_same_for_every_size():
    costs = []
    for blocks in (1, 40):
        model = fxnvtx.instrument(net(blocks), "m", path="hooks")
        toggle(model)
        costs.append(calls(lambda model=model: toggle(model)))
    assert costs[0] == costs[1]
    assert costs[0]["placed"] == 0


def test_a_component_in_use_for_the_second_time_places_nothing():
    attachments, model = Attachments(), net(8)
    attachments.enable(model, "stage.part", None)
    model(torch.zeros(1, 2))
    attachments.disable(model)

    def use():
        attachments.enable(model, "stage.part", None)
        attachments.switch(model, False)
        attachments.switch(model, True)
        attachments.disable(model)

    use()
    assert calls(use)["placed"] == 0


def test_a_component_that_two_stages_use_is_read_once():
    attachments, model = Attachments(), net(8)

    def request():
        for stage in ("draft", "refine"):
            attachments.enable(model, stage, None)
            model(torch.zeros(1, 2))
            attachments.disable(model)

    with fxnvtx.record() as recording:
        request()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Control, "scan", None)  # not to be called
            request()
        model[2] = nn.Sequential(nn.Sigmoid())
        request()
    names = [[r.label for r in recording.ranges if r.label.startswith(s)] for s in ("draft", "refine")]
    assert names[0] == [n.replace("refine", "draft") for n in names[1]]
    assert len(names[0]) == 3 * (1 + 8 * 3) - 1
    assert recording.meta["classes"]["refine.2.0"] == "Linear | Sigmoid"


def test_a_settled_root_call_makes_no_call_per_module():
    """Two per module that has children (is it alive, its children's identities), none per leaf."""
    sizes = []
    for leaves in (2, 40):
        model = nn.ModuleList(nn.Linear(1, 1) for _ in range(leaves))
        control = fxnvtx.instrument(model, "m") and controls_of(model)
        sizes.append(calls(lambda control=control, model=model: control.look(id(model)))["calls"])
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("outer_first", [True, False])
def test_a_module_that_two_calls_name_is_kept_in_line(listening, outer_first):
    """The newest that is switched on names it, and only what both name is touched."""
    model = net(10)
    part = model[4]
    for which in (model, part) if outer_first else (part, model):
        fxnvtx.instrument(which, "part" if which is part else "m")

    def names():
        before = len(listening.ranges)  # no recorder of its own: that would bring everything in line
        model(torch.zeros(1, 2))
        return [r.label for r in listening.ranges[before:] if r.label.startswith(("part", "m.4"))]

    ours, theirs = ["part", "part.0", "part.1"], ["m.4", "m.4.0", "m.4.1"]
    assert names() == (ours if outer_first else theirs)
    for switched, wanted in ((part, theirs), (model, ours)):
        cost = calls(lambda switched=switched: fxnvtx.set_enabled(switched, False))
        assert 0 < cost["placed"] <= 4
        assert names() == wanted  # one that is silent does not silence another
        fxnvtx.set_enabled(switched, True)
    fxnvtx.uninstrument(part)
    assert names() == theirs
    fxnvtx.uninstrument(model)
    assert names() == []
