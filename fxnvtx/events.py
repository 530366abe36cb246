"""From a thread's log of events to ranges: pure functions, run when a recording is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .stack import Entry, Event

__all__ = ["Range", "RangeMark", "read_events"]


@dataclass(frozen=True)
class Range:
    """One closed push/pop pair, or one still open when the recording stopped (end_ns None).

    `depth` counts the enclosing ranges of the same thread in the same recording. Times are nanoseconds of
    `time.perf_counter_ns()`. `leaked`: it was closed by an enclosing range's pop, not by its own.
    """

    label: str
    category: str
    payload: Any
    thread_id: int
    depth: int
    start_ns: int
    end_ns: int | None
    leaked: bool = False


@dataclass(frozen=True)
class RangeMark:
    """One instant."""

    label: str
    category: str
    payload: Any
    thread_id: int
    time_ns: int


class _Opened:
    __slots__ = ("depth", "end_ns", "entry", "leaked")

    def __init__(self, entry: Entry, depth: int) -> None:
        self.entry = entry
        self.depth = depth
        self.end_ns: int | None = None
        self.leaked = False


def read_events(thread_id: int, events: Iterable[Event], since: int = 0) -> tuple[list[Range], list[RangeMark]]:
    """The ranges and marks of one stack in order of their starts.

    Ranges that started before `since` (nanoseconds) belong to no recording that began then: their ends are passed over.
    """
    found: list[_Opened] = []
    marks: list[RangeMark] = []
    stack: list[_Opened] = []
    # one behind the last: what an entry means shows in the event after it
    for event, following in itertools.pairwise([*events, ()]):
        if type(event) is int:
            continue
        assert type(event) is tuple
        if len(event) == 3:
            text, payload, time = event
            marks.append(RangeMark(text.text, text.category, payload, thread_id, time))
        elif type(following) is int:
            closing = _take(stack, event)
            if closing is not None:
                closing.end_ns, closing.leaked = abs(following), following < 0
        elif event[3] >= since:
            found.append(_Opened(event, len(stack)))
            stack.append(found[-1])
    return [_range(thread_id, opened) for opened in found], marks


def _take(stack: list[_Opened], entry: Entry) -> _Opened | None:
    for index in range(len(stack) - 1, -1, -1):
        if stack[index].entry is entry:
            return stack.pop(index)
    return None


def _range(thread_id: int, opened: _Opened) -> Range:
    text, _, payload, start = opened.entry[:4]
    return Range(text.text, text.category, payload, thread_id, opened.depth, start, opened.end_ns, opened.leaked)
