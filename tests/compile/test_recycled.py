"""Parameters and modules that die and others that get their addresses: the names follow what is there now."""

from __future__ import annotations

import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxnvtx

from .models import Mlp, Same

BLOCKS = 3


def _called(model, x):
    with torch.no_grad(), fxnvtx.record() as recording:
        model(x)
    return [r.label for r in recording.ranges if r.category == "module"]


def _regional():
    model = fxnvtx.instrument(Same(BLOCKS), "net")
    for block in model.blocks:
        block.compile(backend=fxnvtx.backend("eager"))
    return model


def renew_all(model, block):
    """As load_state_dict(assign=True) does: every parameter is another object, at an address some other one had."""
    for name, old in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(old.detach().clone()))
    gc.collect()


def renew_in_reverse(model, block):
    """The new parameters of one block are made where those of another just died."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, _ in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        delattr(model.get_submodule(owner), last)
    for name, value in sorted(state.items(), reverse=True):
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(value))


def swap_weights(model, block):
    """Two blocks exchange their parameters, none dies."""
    one, other = model.blocks[block], model.blocks[(block + 1) % BLOCKS]
    for (path, mine), (_, theirs) in zip(list(one.named_parameters()), list(other.named_parameters()), strict=True):
        owner, _, last = path.rpartition(".")
        setattr(one.get_submodule(owner), last, theirs)
        setattr(other.get_submodule(owner), last, mine)


def replace_block(model, block):
    made = Mlp(8, 11, 13)
    made.load_state_dict(model.blocks[block].state_dict())
    made.compile(backend=fxnvtx.backend("eager"))
    model.blocks[block] = made
    del made
    fxnvtx.instrument(model, "net")


def in_place(model, block):
    with torch.no_grad():
        for parameter in model.blocks[block].parameters():
            parameter.mul_(0.5)


EDITS = (renew_all, renew_in_reverse, swap_weights, replace_block, in_place)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(edits=st.lists(st.tuples(st.sampled_from(EDITS), st.integers(0, BLOCKS - 1)), min_size=1, max_size=5))
def test_blocks_keep_their_names_through_any_change_of_weights(edits):
    torch._dynamo.reset()
    model, x = _regional(), torch.randn(4, 8)
    expected = ["net"]
    for block in range(BLOCKS):
        expected += [f"net.blocks.{block}{part}" for part in ("", ".norm", ".up", ".mid", ".down")]
    assert _called(model, x) == expected
    for edit, block in edits:
        edit(model, block)
        assert _called(model, x) == expected


def test_a_weight_update_is_seen_however_the_addresses_fall():
    model, x = _regional(), torch.randn(4, 8)
    expected = _called(model, x)
    for _ in range(10):
        renew_in_reverse(model, 0)
        assert _called(model, x) == expected
        renew_all(model, 0)
        assert _called(model, x) == expected
