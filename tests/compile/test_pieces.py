"""A module's call that compiled code does in several places is one call, whoever counts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx.report import from_recording

pytestmark = pytest.mark.slow


class Half(nn.Module):
    """Its function of the input is computed with the other half's, between its own two products."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x):
        return self.first(x) + self.second(self.function(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Half(torch.sin), Half(torch.cos)
        self.again = nn.Linear(24, 24)

    def forward(self, x):
        return self.again(self.again(self.a(x) + self.b(x)))  # twice in one call: two calls


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def calls(recording, category="module"):
    return Counter(r.label for r in recording.ranges if r.category == category)


def test_calls_are_calls() -> None:
    torch.manual_seed(0)
    net, x = fxnvtx.instrument(Net().eval(), "net"), torch.randn(3, 24)
    with torch.no_grad():
        with fxnvtx.record() as eager:
            for _ in range(3):
                net(x)
        compiled = torch.compile(net, backend="fxnvtx")
        compiled(x)
        with fxnvtx.record() as recording:
            for _ in range(3):
                compiled(x)
    wanted, found = calls(eager), calls(recording)
    assert wanted["net.blocks.0.again"] == 6
    pieces = calls(recording, "piece")
    assert pieces, "no call of this model is done in pieces: the test says nothing"
    assert {name: found[name] for name in found} == {name: wanted[name] for name in found}
    assert set(pieces) <= set(found)
    rows = {row.name: row for row in from_recording(recording).rows("module") if row.kind == "range"}
    for name, row in rows.items():
        assert row.calls == wanted[name]
        assert row.each is None or row.each.count == wanted[name]
