"""A recording holds every range of every thread while it ran, nested as they were."""

from __future__ import annotations

import threading

import pytest

import fxnvtx

from .tools import labels, shape


def test_nested_recorders_each_see_what_ran_while_they_listened():
    with fxnvtx.range("before"):
        pass
    with fxnvtx.record() as outer, fxnvtx.range("a"):
        with fxnvtx.record() as inner, fxnvtx.range("b"):
            pass
        with fxnvtx.range("c"):
            pass
    assert shape(outer.tree()) == (("a", (("b", ()), ("c", ()))),)
    assert shape(inner.tree()) == (("b", ()),)
    assert [r.depth for r in inner.ranges] == [0]
    assert outer.balanced
    assert inner.balanced


def test_the_same_recorder_order_can_be_left_in_any_order():
    first, second = fxnvtx.record(), fxnvtx.record()
    one = first.__enter__()
    two = second.__enter__()
    with fxnvtx.range("both"):
        pass
    first.__exit__(None, None, None)
    with fxnvtx.range("second only"):
        pass
    second.__exit__(None, None, None)
    assert labels(one) == ["both"]
    assert labels(two) == ["both", "second only"]
    assert not fxnvtx.ranges.emit.sinks


def test_a_range_open_at_the_end_is_marked_and_stays_so():
    with fxnvtx.record() as recording:
        entry = fxnvtx.range("open")
        entry.__enter__()
        with fxnvtx.range("closed"):
            pass
    assert [(r.label, r.end_ns is None) for r in recording.ranges] == [("open", True), ("closed", False)]
    assert not recording.balanced
    entry.__exit__(None, None, None)
    assert recording.ranges[0].end_ns is None  # later pops do not rewrite what was recorded
    assert recording.tree()[0].end_ns is None


def test_a_range_opened_before_the_recorder_is_not_in_it():
    with fxnvtx.record() as outer, fxnvtx.range("outside"), fxnvtx.record() as inner:
        with fxnvtx.range("x"), fxnvtx.range("y"):
            pass
        with fxnvtx.range("z"):
            pass
    assert shape(inner.tree()) == (("x", (("y", ()),)), ("z", ()))
    assert inner.balanced
    assert len(outer.ranges) == 4


def test_an_exception_ends_the_recording_and_keeps_it():
    with pytest.raises(KeyboardInterrupt), fxnvtx.record() as recording, fxnvtx.range("r"):
        raise KeyboardInterrupt
    assert labels(recording) == ["r"]
    assert recording.balanced
    assert not fxnvtx.ranges.emit.sinks
    assert not fxnvtx.ranges.emit.active


def test_reading_while_it_records():
    with fxnvtx.record() as recording, fxnvtx.range("r"):
        assert [(r.label, r.end_ns) for r in recording.ranges] == [("r", None)]
        assert not recording.balanced
    assert recording.balanced


def test_ranges_are_sorted_by_start_and_nested_in_time():
    def work():
        for _ in range(300):
            with fxnvtx.range("a"), fxnvtx.range("b"):
                pass

    with fxnvtx.record() as recording:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    starts = [r.start_ns for r in recording.ranges]
    assert starts == sorted(starts)
    for root in recording.tree():
        (child,) = root.children
        assert root.start_ns <= child.start_ns <= child.end_ns <= root.end_ns  # type: ignore[operator]
    assert len(recording.tree()) == 2400


def test_a_closed_range_takes_no_later_child():
    """What lies between the two on the stack was never recorded, so depth alone cannot tell."""
    from fxnvtx.ranges import label, local, pop, push

    with fxnvtx.record() as recording:
        closed = push(label("closed"))
        pop(closed)
        local.stack.append((label("nvtx only"),))  # what the paths that serve NVTX alone leave on a stack
        later = push(label("later"))
        pop(later)
        del local.stack[:]
    assert shape(recording.tree()) == (("closed", ()), ("later", ()))


def test_marks_are_kept_apart_from_ranges():
    from fxnvtx.ranges import label, mark_now

    mark_now(label("unheard"))
    with fxnvtx.record() as recording:
        mark_now(label("m", "op"), 4)
    assert [(m.label, m.category, m.payload) for m in recording.marks] == [("m", "op", 4)]
    assert recording.ranges == []


def test_a_walk_visits_in_order_of_start():
    with fxnvtx.record() as recording, fxnvtx.range("1"):
        with fxnvtx.range("2"), fxnvtx.range("3"):
            pass
        with fxnvtx.range("4"):
            pass
    (root,) = recording.tree()
    assert [n.label for n in root.walk()] == ["1", "2", "3", "4"]


def test_ten_thousand_ranges_deep():
    entries = [fxnvtx.range("deep") for _ in range(10_000)]
    with fxnvtx.record() as recording:
        for entry in entries:
            entry.__enter__()
        for entry in reversed(entries):
            entry.__exit__(None, None, None)
    (root,) = recording.tree()
    assert sum(1 for _ in root.walk()) == 10_000
    assert recording.balanced
