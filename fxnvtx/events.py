"""From a thread's log of events to ranges: pure functions, run when a recording is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from .crossing import Crossing
from .stack import Entry, Event

__all__ = ["Range", "RangeMark", "in_order", "read_events"]


@dataclass(frozen=True)
class Range:
    """One closed range, or one still open when the recording stopped (end_ns None).

    `depth` counts the enclosing ranges in the same recording. Times are nanoseconds of `time.perf_counter_ns()`.
    `leaked`: it was closed by an enclosing range's pop, not by its own. `crossing`: a number of its own for a
    start/end range (of a coroutine or generator: it may cross others of its thread), 0 for a push/pop pair.
    `inside`: the number of the innermost start/end range around it, 0 for none.
    """

    label: str
    category: str
    payload: Any
    thread_id: int
    depth: int
    start_ns: int
    end_ns: int | None
    leaked: bool = False
    crossing: int = 0
    inside: int = 0


@dataclass(frozen=True)
class RangeMark:
    """One instant."""

    label: str
    category: str
    payload: Any
    thread_id: int
    time_ns: int


class _Opened:
    """`place`: how many push/pop ranges it lies in within the start/end range around it."""

    __slots__ = ("end_ns", "entry", "inside", "leaked", "place")

    def __init__(self, entry: Entry | Crossing, inside: int, stack: list[_Opened]) -> None:
        self.entry = entry
        self.inside = inside
        self.place: int = 0 if not stack or stack[-1].inside != inside else stack[-1].place + 1
        self.end_ns: int | None = None
        self.leaked = False


def read_events(
    thread_id: int, events: Iterable[Event], since: int = 0, known: frozenset[int] = frozenset()
) -> tuple[list[Range], list[RangeMark]]:
    """The ranges and marks of one stack in order of their starts. Of what lies in a start/end range, one of `known`,
    `depth` counts from there; `in_order` completes it.

    Ranges that started before `since` (nanoseconds) belong to no recording that began then: their ends are passed over.
    """
    found: list[_Opened] = []
    marks: list[RangeMark] = []
    stack: list[_Opened] = []
    within: Crossing | None = None
    # one behind the last: what an entry means shows in the event after it
    for event, following in itertools.pairwise([*events, ()]):
        if type(event) is int:
            continue
        if type(event) is Crossing:
            within = event
            if event.start_ns >= since:
                found.append(_Opened(event, 0 if event.parent is None else event.parent.nearest(known), stack))
            continue
        assert type(event) is tuple
        if len(event) == 1:
            within = event[0]
        elif len(event) == 3:
            text, payload, time = event
            marks.append(RangeMark(text.text, text.category, payload, thread_id, time))
        elif type(following) is int:
            closing = _take(stack, event)
            if closing is not None:
                closing.end_ns, closing.leaked = abs(following), following < 0
        elif event[3] >= since:
            while within is not None and within.end_ns is not None and within.end_ns <= event[3]:
                within = within.parent
            found.append(_Opened(event, 0 if within is None else within.nearest(known), stack))
            stack.append(found[-1])
    return [_range(thread_id, opened) for opened in found], marks


def in_order(ranges: list[Range]) -> list[Range]:
    """Ranges of all threads by start, with the depth that each has in the whole."""
    ranges = sorted(ranges, key=lambda r: r.start_ns)  # stable: a thread's own order survives ties
    if not any(r.crossing for r in ranges):
        return ranges
    depths = {0: -1}
    for position, item in enumerate(ranges):
        if item.inside:
            item = ranges[position] = replace(item, depth=item.depth + depths.get(item.inside, -1) + 1)
        if item.crossing:
            depths[item.crossing] = item.depth
    return ranges


def _take(stack: list[_Opened], entry: Entry) -> _Opened | None:
    for index in range(len(stack) - 1, -1, -1):
        if stack[index].entry is entry:
            return stack.pop(index)
    return None


def _range(thread_id: int, opened: _Opened) -> Range:
    entry = opened.entry
    if isinstance(entry, Crossing):
        text, payload, start, end, number = entry.label, entry.payload, entry.start_ns, entry.end_ns, entry.number
    else:
        (text, _, payload, start), end, number = entry[:4], opened.end_ns, 0
    place, leaked, inside = opened.place, opened.leaked, opened.inside
    return Range(text.text, text.category, payload, thread_id, place, start, end, leaked, number, inside)
