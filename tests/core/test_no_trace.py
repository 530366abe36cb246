"""uninstrument() gives back the model as it was; an instrumented model trains, saves and loads like the plain one."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx.modules.call_slot import SLOT
from fxnvtx.modules.registry import controls, controls_of

from . import zoo
from .test_soundness_forms import x
from .tools import equal, run_recorded

OPTIONS: list[dict[str, Any]] = [{"path": "hooks"}, {"path": "auto"}, {"shapes": True}, {"name": "n", "depth": 1}]


def picture(model):
    """Everything there is to see of a model."""
    return {
        name: (type(m), dict(m.__dict__), list(m.__dict__), m.forward, m.__call__, list(dir(m)), list(m._modules))
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_uninstrument_leaves_no_trace(options):
    model = zoo.Wide()
    before, keys, state = picture(model), list(model.state_dict()), copy.deepcopy(model.state_dict())
    assert fxnvtx.instrument(model, **options) is model
    assert picture(model) == before  # nobody listens
    with fxnvtx.record():
        assert SLOT in model.__dict__
        model(x(2, 3, 4))
        assert fxnvtx.uninstrument(model) is model
        assert picture(model) == before
    assert picture(model) == before
    assert list(model.state_dict()) == keys
    assert equal(dict(model.state_dict()), dict(state))
    assert controls_of(model) is None
    assert run_recorded(model, x(2, 3, 4))[1].ranges == []
    assert fxnvtx.uninstrument(model) is model


def test_a_model_nobody_listens_to_is_untouched():
    model = zoo.Wide()
    before = picture(model)
    fxnvtx.instrument(model)
    model(x(2, 3, 4))
    assert picture(model) == before
    run_recorded(model, x(2, 3, 4))
    assert picture(model) == before
    fxnvtx.instrument(model)
    fxnvtx.set_enabled(model, False)
    assert picture(model) == before
    assert len([c for c in controls() if c.model() is model]) == 1


def test_what_was_in_the_place_before_is_given_back():
    def compiled(*args):
        return model._call_impl(*args) * 2

    model = zoo.Straight()
    wanted = model(x()) * 2
    model._compiled_call_impl = compiled
    model.a._compiled_call_impl = None  # what undoing Module.compile() leaves
    fxnvtx.instrument(model)
    result, recording = run_recorded(model, x())
    assert equal(result[1], wanted)
    assert [r.label for r in recording.ranges] == ["Straight", "a", "b"]
    assert model.__dict__[SLOT] is compiled
    assert model.a.__dict__[SLOT] is None
    fxnvtx.uninstrument(model)
    assert model.__dict__[SLOT] is compiled
    assert model.a.__dict__[SLOT] is None
    assert SLOT not in model.b.__dict__


def train(model, listen, steps=4):
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        with fxnvtx.record() if listen and step % 2 == 0 else torch.enable_grad():
            out = model(x(2, 3, 4, seed=step))
            loss = (out - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("path", ["hooks", "auto"])
@pytest.mark.parametrize("listen", [False, True])
def test_training_is_the_same_to_the_bit(path, listen):
    class Trains(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = zoo.Wide()
            self.drop = nn.Dropout(0.2)
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.drop(self.norm(self.wide(x)))

    torch.manual_seed(0)
    plain = Trains()
    model = copy.deepcopy(plain)
    fxnvtx.instrument(model, path=path)
    assert equal(train(plain, False), train(model, listen))
    assert equal(dict(plain.state_dict()), dict(model.state_dict()))
    assert all(equal(p.grad, q.grad) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


def test_saved_state_fits_both_ways():
    plain, model = zoo.Wide(), fxnvtx.instrument(zoo.Wide())
    file = io.BytesIO()
    with fxnvtx.record():
        torch.save(model.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert equal(plain(x(2, 3, 4)), model(x(2, 3, 4)))


def test_a_saved_module_does_not_need_fxnvtx():
    model = fxnvtx.instrument(zoo.Wide())
    file = io.BytesIO()
    with fxnvtx.record():
        torch.save(model, file)
    assert b"fxnvtx" not in file.getvalue()


def test_moving_and_converting():
    model = fxnvtx.instrument(zoo.OwnTensors())
    with fxnvtx.record():
        assert model.to(torch.float64) is model
        assert model(x().double()).dtype is torch.float64
        assert model.half().float().requires_grad_(False).eval() is model
        assert not any(p.requires_grad for p in model.parameters())
        model.apply(lambda m: m.zero_grad())
        model.share_memory()
        model.add_module("extra", nn.Linear(1, 1))
        del model.extra


def test_random_numbers_are_untouched():
    before = torch.get_rng_state()
    model = zoo.Dropouts.__new__(zoo.Dropouts)
    with torch.random.fork_rng():
        zoo.Dropouts.__init__(model)
    for options in OPTIONS:
        fxnvtx.instrument(model, **options)
    fxnvtx.uninstrument(model)
    assert torch.equal(torch.get_rng_state(), before)
