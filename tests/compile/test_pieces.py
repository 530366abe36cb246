"""A module's call that compiled code does in several places is one call, whoever counts."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx.compile.runtime import Resolved
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


def test_the_ways_between_rows_are_found_once(monkeypatch):
    """Counted, not timed: what a second call shows was worked out in the first."""
    model = fxnvtx.instrument(Net().eval(), "net")
    compiled = torch.compile(model, backend="fxnvtx")
    worked_out = []
    original = Resolved.move
    monkeypatch.setattr(Resolved, "move", lambda self, *way: worked_out.append(way) or original(self, *way))  # type: ignore[func-returns-value]
    x = torch.randn(3, 24)
    with torch.no_grad():
        compiled(x)
    shown = []
    for _ in range(3):
        with fxnvtx.record() as recording, torch.no_grad():
            compiled(x)
        shown.append([(r.label, r.category) for r in recording.ranges])
        assert bool(worked_out) == (len(shown) == 1)
        worked_out.clear()
    assert shown[0] == shown[1] == shown[2]


def test_code_that_never_goes_the_same_way_twice_keeps_few_places():
    rows: list[Any] = [((("m", index), fxnvtx.ranges.label(f"m{index}", "module")),) for index in range(40)]
    resolved = Resolved(rows)
    draw = random.Random(0)
    for _ in range(2000):
        place = resolved.start
        for row in draw.sample(range(1, 41), 20):
            _, _, place = place.moves.get(row) or resolved.move(place, row)
    assert len(resolved._places) <= 8193 + 4 * 41
