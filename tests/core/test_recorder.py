"""What a recorder costs while a model runs, counted; and that threads, other recorders and torn logs do not confuse
it."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from time import perf_counter_ns

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxnvtx
from fxnvtx.ranges import label, local, pop, push
from fxnvtx.ranges.stack import Range, read_events

from .tools import labels, shape


class Leaf(nn.Module):
    def forward(self, x):
        return x


class Chain(nn.Module):
    def __init__(self, children):
        super().__init__()
        self.items = nn.ModuleList(Leaf() for _ in range(children))

    def forward(self, x):
        for item in self.items:
            x = item(x)
        return x


def calls_of_ours(model):
    """How many Python functions of fxnvtx run in one recorded call of the model."""
    seen = []

    def profile(frame, event, _):
        if event == "call" and frame.f_globals.get("__name__", "").startswith("fxnvtx."):
            seen.append(frame.f_code.co_name)

    with fxnvtx.record() as recording:
        model(1)
        sys.setprofile(profile)
        model(1)
        sys.setprofile(None)
    assert len(recording.ranges) == 2 * (len(model.items) + 1)
    return len(seen)


@pytest.mark.parametrize(("path", "each"), [("hooks", 1), ("fx", 3)])
def test_python_calls_a_range(path, each):
    few, many = (fxnvtx.instrument(Chain(n), "m", path=path) for n in (2, 12))
    assert calls_of_ours(many) - calls_of_ours(few) == 10 * each


@pytest.mark.slow
def test_no_object_is_made_before_somebody_reads():
    model = fxnvtx.instrument(Chain(20), "m")

    def made():
        gc.collect()
        return sum(type(found) is Range for found in gc.get_objects())

    before = made()
    with fxnvtx.record() as recording:
        for _ in range(5):
            model(1)
    assert made() == before
    assert len(recording.ranges) == made() - before == 5 * 21


def test_threads_that_began_before_and_after_the_recorder():
    ready, begin, done = threading.Event(), threading.Event(), threading.Event()

    def early():
        with fxnvtx.range("unheard"):
            ready.set()
            begin.wait(30)
            with fxnvtx.range("early"):
                pass
        done.set()

    first = threading.Thread(target=early)
    first.start()
    ready.wait(30)
    with fxnvtx.record() as recording:
        begin.set()
        done.wait(30)
        for name in ("late", "later"):  # the system may give the second the id of the first
            thread = threading.Thread(target=fxnvtx.range(name)(lambda: push(label("left open"))))
            thread.start()
            thread.join()
    first.join()
    assert shape(recording.tree()) == (("early", ()), ("late", (("left open", ()),)), ("later", (("left open", ()),)))


def test_what_no_recorder_wants_any_more_is_freed():
    class Payload:
        pass

    payload = Payload()
    alive = weakref.ref(payload)
    first, second = fxnvtx.record(), fxnvtx.record()
    one = first.__enter__()
    with fxnvtx.range("r", payload=payload):
        pass
    second.__enter__()
    first.__exit__(None, None, None)
    del payload, one, first
    gc.collect()
    assert alive() is None
    second.__exit__(None, None, None)
    assert local.stack.log is None


def test_recorders_that_come_and_go_between_a_push_and_its_pop():
    managers = [fxnvtx.record() for _ in range(3)]
    recordings = []
    opened = []
    for index, manager in enumerate(managers):
        recordings.append(manager.__enter__())
        opened.append(push(label(f"r{index}")))
    managers[1].__exit__(None, None, None)
    for entry in reversed(opened):
        pop(entry)
    for manager in (managers[0], managers[2]):
        manager.__exit__(None, None, None)
    assert shape(recordings[0].tree()) == (("r0", (("r1", (("r2", ()),)),)),)
    assert shape(recordings[2].tree()) == (("r2", ()),)
    assert [(r.label, r.end_ns) for r in recordings[1].ranges] == [("r1", None), ("r2", None)]
    assert [r.balanced for r in recordings] == [True, False, True]


@given(st.lists(st.integers(0, 3), max_size=40), st.sets(st.integers(0, 80)))
def test_a_log_with_holes_tells_no_lies(steps, torn):
    """An interrupt may fall between a push and what it writes. What is left says of each range what it says without
    the holes, or that it is open; ranges after a hole are not taken for each other."""
    log: list = []
    opened: list = []
    times = iter(range(1, 1000))
    for step in steps:
        if step and opened:
            log.append((opened.pop(), next(times)))
        else:
            opened.append((label(f"r{len(log)}"), None, None, next(times)))
            log.append((opened[-1],))
    whole = [event for events in log for event in events]
    rest = [event for index, events in enumerate(log) if index not in torn for event in events]
    true = {r.label: r for r in read_events(1, whole)[0]}
    for found in read_events(1, rest)[0]:
        assert (found.start_ns, found.leaked) == (true[found.label].start_ns, False)
        assert found.end_ns in (None, true[found.label].end_ns)


def test_a_recorder_that_began_later_does_not_take_an_end_for_a_beginning():
    before, after = (label("before"), None, None, 5), (label("after"), None, None, 15)
    found, _ = read_events(1, [after, before, 16, before, after, 17], since=10)
    assert [(r.label, r.start_ns, r.end_ns) for r in found] == [("after", 15, 17)]


def test_an_interrupt_in_mid_push():
    """Ctrl-C between the two halves of a push: what is pushed and popped afterwards is paired as ever."""
    with fxnvtx.record() as recording, fxnvtx.range("outer"):
        assert local.stack.log is not None
        local.stack.log.append((label("cut off"), None, None, perf_counter_ns()))
        with fxnvtx.range("inner"):
            pass
    assert labels(recording) == ["outer", "cut off", "inner"]
    assert [r.end_ns is None for r in recording.ranges] == [False, True, False]
