"""DiffusionNvtxHooks: starts switched off, counts what it newly instruments, and can be taken out at any time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx import DiffusionNvtxHooks
from fxnvtx.errors import InstrumentError
from fxnvtx.modules.call_slot import SLOT

from . import zoo
from .test_naming import Block, Model
from .test_soundness_forms import x
from .tools import labels, run_recorded


def seen(model):
    return labels(run_recorded(model, x())[1])


def test_it_starts_switched_off():
    hooks, model = DiffusionNvtxHooks(), Model().eval()
    hooks.register_hooks(model)
    assert not hooks.enabled
    assert seen(model) == []
    hooks.set_enabled(True)
    assert seen(model)[:2] == ["Model", "blocks.0"]
    hooks.set_enabled(False)
    assert seen(model) == []


def test_it_counts_what_was_not_instrumented_before():
    hooks, model = DiffusionNvtxHooks(), Model().eval()
    total = 13  # the model, 2 blocks of 4 (attn, a, b), left, seq, seq.0: no ModuleList, ModuleDict, Dropout, Identity
    assert hooks.register_hooks(model) == total - 1
    assert hooks.register_hooks(model) == 0
    model.blocks.append(Block())
    assert hooks.register_hooks(model) == 4
    assert hooks.register_hooks(nn.Sequential(model, nn.Linear(4, 4))) == 2
    assert DiffusionNvtxHooks().register_hooks(model) == 0
    hooks.remove_hooks()


def test_a_model_that_instrument_knows_counts_as_known():
    model = fxnvtx.instrument(zoo.Straight())
    assert DiffusionNvtxHooks().register_hooks(model) == 0


def test_skip_types():
    model = Model().eval()
    for skip in ((nn.Linear,), [nn.Linear], {nn.Linear}, nn.Linear, iter([nn.Linear])):
        hooks = DiffusionNvtxHooks(skip_types=skip)
        hooks.register_hooks(model)
        hooks.set_enabled(True)
        found = seen(model)
        assert "blocks.0.drop" in found
        assert "blocks.0.attn.a" not in found
        hooks.remove_hooks()
        assert seen(model) == []
    with pytest.raises(InstrumentError):
        DiffusionNvtxHooks(skip_types=5)  # type: ignore[arg-type]
    with pytest.raises(InstrumentError):
        DiffusionNvtxHooks(skip_types=[5])  # type: ignore[list-item]


def test_prefix():
    hooks, model = DiffusionNvtxHooks(), zoo.Straight()
    hooks.register_hooks(model, prefix="transformer")
    hooks.set_enabled(True)
    assert seen(model) == ["transformer", "transformer.a", "transformer.b"]
    hooks.register_hooks(model, prefix="vae")
    assert seen(model) == ["vae", "vae.a", "vae.b"]


def test_several_models_are_switched_and_removed_together():
    hooks, one, two = DiffusionNvtxHooks(), zoo.Straight(), zoo.Loop()
    hooks.set_enabled(True)
    assert hooks.register_hooks(one, "one") == 3
    assert hooks.register_hooks(two, "two") == 5
    assert seen(one)[0] == "one"
    assert seen(two)[0] == "two"
    with fxnvtx.record():
        hooks.remove_hooks()
        assert all(SLOT not in m.__dict__ for model in (one, two) for m in model.modules())
        hooks.remove_hooks()
    assert seen(one) == seen(two) == []
    hooks.remove_hooks()
    assert hooks.register_hooks(one) == 3  # and can be used again


def test_removal_leaves_what_others_instrumented():
    model = fxnvtx.instrument(zoo.Straight(), "mine")
    hooks = DiffusionNvtxHooks()
    hooks.register_hooks(nn.Sequential(model), "theirs")
    hooks.remove_hooks()
    assert seen(model) == ["mine", "mine.a", "mine.b"]


def test_switching_and_removing_in_the_middle_of_a_forward():
    hooks, model = DiffusionNvtxHooks(), zoo.Loop()
    hooks.register_hooks(model)
    hooks.set_enabled(True)
    handle = model.layers[1].register_forward_pre_hook(lambda *_: hooks.set_enabled(False))
    assert seen(model) == ["Loop", "layers.0", "layers.1", "layers.2", "norm"]
    assert seen(model) == []
    handle.remove()
    handle = model.layers[1].register_forward_pre_hook(lambda *_: hooks.set_enabled(True))
    assert seen(model) == []
    assert len(seen(model)) == 5
    handle.remove()
    handle = model.layers[1].register_forward_pre_hook(lambda *_: hooks.remove_hooks())
    assert seen(model)[:3] == ["Loop", "layers.0", "layers.1"]
    assert seen(model) == []


def test_a_compiled_wrapper_stands_for_its_model():
    model = zoo.Straight()
    hooks = DiffusionNvtxHooks()
    compiled: Any = torch.compile(model, backend="eager")
    assert hooks.register_hooks(compiled) == 3
    hooks.set_enabled(True)
    assert seen(model) == ["Straight", "a", "b"]
    hooks.remove_hooks()


@pytest.mark.parametrize("bad", [None, "model", nn.Linear, 3])
def test_only_modules_can_be_registered(bad):
    with pytest.raises(InstrumentError) as caught:
        DiffusionNvtxHooks().register_hooks(bad)
    assert "\n" not in str(caught.value)


def test_outputs_are_the_plain_ones():
    hooks, model = DiffusionNvtxHooks(), Model().eval()
    wanted = model(x())
    hooks.register_hooks(model)
    hooks.set_enabled(True)
    assert torch.equal(run_recorded(model, x())[0][1], wanted)


def test_shapes_and_depth():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU())
    hooks = fxnvtx.DiffusionNvtxHooks(shapes=True, depth=1)
    assert hooks.register_hooks(net, "m") == 3
    hooks.set_enabled(True)
    with fxnvtx.record() as recording:
        net(torch.ones(2, 4))
    assert [r.label for r in recording.ranges] == ["m", "m.0", "m.1"]
    assert [m.label for m in recording.marks] == [f"{r.label} in=[[2, 4]]" for r in recording.ranges]
    hooks.remove_hooks()
