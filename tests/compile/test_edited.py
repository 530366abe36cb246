"""A model that changes after instrument() and after it was compiled: the next call shows it as it is by then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxnvtx

from ..core.test_structure import Lora, W, sample


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(W, W)
        self.down = nn.Linear(W, W)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def seen(recording, start):
    """Ranges of modules, without what Inductor made of several."""
    return {r.label for r in recording.ranges[start:] if r.category == "module"}


PLAIN = {f"net.blocks.{i}.{n}" for i in range(2) for n in ("up", "down")}
# lora_B is no kernel of its own: its product and the sum around it are one call
ADAPTED = PLAIN | {f"net.blocks.1.up.{n}" for n in ("base_layer", "lora_A")}


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_an_adapter_after_the_first_compiled_call(how):
    torch._dynamo.reset()
    model = fxnvtx.instrument(Net().eval(), "net")
    if how == "blocks":
        for block in model.blocks:
            block.compile(backend="fxnvtx")
    run = torch.compile(model, backend="fxnvtx") if how == "whole" else model
    edited: Any = model.blocks[1]
    with fxnvtx.record() as recording, torch.no_grad():
        for change, wanted in (
            (lambda: None, PLAIN),
            (lambda: setattr(edited, "up", Lora(edited.up).eval()), ADAPTED),
            (lambda: setattr(edited, "up", edited.up.base_layer), PLAIN),
        ):
            change()
            before = len(recording.ranges)
            found = run(sample())
            shown = seen(recording, before)
            assert wanted <= shown
            assert shown <= {f"net.{name}" if name else "net" for name, _ in model.named_modules()}
            torch.testing.assert_close(found, Net.forward(model, sample()))
    assert recording.balanced
    fxnvtx.uninstrument(model)
