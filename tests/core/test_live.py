"""Who wants to be told of every range at once is told of what a recorder keeps, in the order in which it happens."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import fxnvtx
from fxnvtx import ranges
from fxnvtx.ranges import emit

from .test_recorder import Chain
from .tools import shape


class Told:
    def __init__(self):
        self.events = []
        self.stack = []
        self.roots = []
        self.marks = []

    def opened(self, entry):
        assert entry.level == len(self.stack)
        assert entry.end_ns is None
        node: tuple[str, list] = (entry.label.text, [])
        (self.stack[-1][1] if self.stack else self.roots).append(node)
        self.stack.append(node)

    def closed(self, entry):
        assert entry.end_ns >= entry.start_ns
        assert self.stack.pop()[0] == entry.label.text
        if entry.leaked:
            self.events.append(entry.label.text)

    def marked(self, mark):
        self.marks.append(mark.label.text)

    def stray_pop(self):
        self.events.append("stray")

    @property
    def tree(self):
        def walk(nodes):
            return tuple((text, walk(children)) for text, children in nodes)

        return walk(self.roots)


@pytest.fixture
def told():
    listener = Told()
    ranges.add_sink(listener)
    yield listener
    ranges.remove_sink(listener)
    assert not emit.active


@pytest.mark.parametrize("path", ["hooks", "fx", "auto"])
def test_it_hears_what_a_recorder_keeps(told, path):
    model = fxnvtx.instrument(nn.Sequential(Chain(3), Chain(2)), "m", path=path, shapes=path == "auto")
    with fxnvtx.record() as recording, fxnvtx.range("outer", category="stage"):
        model(1)
    assert told.tree == shape(recording.tree())
    assert told.stack == []
    assert told.marks == [m.label for m in recording.marks]


def test_leaks_and_strays(told):
    with fxnvtx.range("a"):
        fxnvtx.range_push("leaked")
    fxnvtx.range_pop()
    assert told.tree == (("a", (("leaked", ()),)),)
    assert told.events == ["leaked", "stray"]


def test_one_that_comes_and_goes_in_mid_call():
    model = fxnvtx.instrument(Chain(4), "m")

    counted: list[str] = []

    class Counting:
        opened = closed = lambda self, entry: counted.append(entry.label.text)

    listener: Any = Counting()
    model.items[1].register_forward_pre_hook(lambda *_: ranges.add_sink(listener))
    model.items[3].register_forward_pre_hook(lambda *_: ranges.remove_sink(listener))
    with fxnvtx.record() as recording:
        model(1)
        assert ranges.local.stack == []
        model(1)
        ranges.remove_sink(listener)
    assert recording.balanced
    assert len(recording.ranges) == 10
    assert {"m.items.2", "m.items.3"} <= set(counted) <= {f"m.items.{i}" for i in range(1, 4)}
