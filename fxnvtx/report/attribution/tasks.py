"""Start/end ranges that nest all the same, as those of a coroutine do that nothing else ran beside.

Such a range goes into its thread's tree like a push/pop range. It stays beside the tree where another start/end range
of the thread that is neither around it nor inside it overlaps it in time, where something that is not inside it was
begun meanwhile, and where it crosses a push/pop range. Ranges of other tools that do so without a word are not known
as tasks, so only fxnvtx's own come here: before a range that does not lie in what began last, it emits a mark that
says what it does lie in.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...categories import TASK_SWITCH
from ...recording import Range
from ..capture.schema import MARK, PUSH_POP, START_END, Table
from .batches import Ints, Source

__all__ = ["Switch", "Task", "apart", "beside", "crossed", "rows_that_nest"]

_OPEN_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Task:
    """A start/end range. number: its id among those of the thread. end: a large one where it is still open."""

    start: int
    end: int
    number: int


@dataclass(frozen=True)
class Switch:
    """From this time on, what the thread begins lies in the range with this number; in none where there is none."""

    time: int
    number: int


def apart(events: Iterable[Task | Switch]) -> list[bool]:
    """For each start/end range among the events of one thread, which come in their order, whether nothing of another
    chain happened meanwhile.

    What begins lies in what began last and is still open, or, after that one's end, in what is around it; unless a
    switch says otherwise.
    """
    walk = _Walk()
    for event in events:
        if isinstance(event, Task):
            walk.begin(event)
        else:
            walk.switch(event)
    return [place not in walk.shared for place in range(len(walk.tasks))]


class _Walk:
    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.shared: set[int] = set()  # those that something of another chain happened in
        self._numbered: dict[int, int] = {}
        self._parent: list[int] = []
        self._now = -1
        self._open: dict[int, None] = {}
        self._alone: dict[int, None] = {}  # the open ones of which that is not known yet
        self._ends: list[tuple[int, int]] = []

    def begin(self, task: Task) -> None:
        place = len(self.tasks)
        self.tasks.append(task)
        self._to(task.start)
        around = self._around(self._now)
        self._parent.append(around[0] if around else -1)
        if len(self._open) > len(around):
            self.shared.add(place)
        self._share(around)
        for above in around:
            if self.tasks[above].end < task.end:
                self.shared.update((above, place))
        self._numbered[task.number] = self._now = place
        self._open[place] = self._alone[place] = None
        heappush(self._ends, (task.end, place))

    def switch(self, switch: Switch) -> None:
        self._to(switch.time)
        self._now = self._numbered.get(switch.number, -1)
        self._share(self._around(self._now))

    def _to(self, time: int) -> None:
        while self._ends and self._ends[0][0] <= time:
            place = heappop(self._ends)[1]
            del self._open[place]
            self._alone.pop(place, None)

    def _around(self, place: int) -> list[int]:
        """The range and those around it, as far as they are open, the innermost first."""
        found = []
        while place >= 0:
            if place in self._open:
                found.append(place)
            place = self._parent[place]
        return found

    def _share(self, around: list[int]) -> None:
        """Something begins inside of these, and so not inside of others that are open."""
        if len(self._alone) + len(around) and not self._alone.keys() <= set(around):
            for place in [place for place in self._alone if place not in around]:
                self.shared.add(place)
                del self._alone[place]


def crossed(start: Ints, end: Ints, other_start: Ints, other_end: Ints) -> NDArray[np.bool_]:
    """Which of some ranges overlap one of the others without lying inside it or around it."""
    if not len(other_start):
        return np.zeros(len(start), np.bool_)
    order = np.argsort(other_start, kind="stable")
    begins = other_start[order]
    latest = _over(np.maximum, other_end[order], np.searchsorted(begins, start, "right"), np.searchsorted(begins, end))
    order = np.argsort(other_end, kind="stable")
    ends = other_end[order]
    first = _over(np.minimum, other_start[order], np.searchsorted(ends, start, "right"), np.searchsorted(ends, end))
    some_later, some_earlier = latest[1], first[1]
    found: NDArray[np.bool_] = (some_later & (latest[0] > end)) | (some_earlier & (first[0] < start))
    return found


def _over(function: np.ufunc, values: Ints, low: NDArray[np.intp], high: NDArray[np.intp]) -> tuple[Ints, Any]:
    """The function over values[low:high], for each pair, and whether there are any."""
    some = low < high
    # two bounds each, of which every other result is what lies between two pairs
    bounds = np.stack([low, np.maximum(high, low)], axis=1).ravel()
    return function.reduceat(np.append(values, values[-1]), bounds)[::2], some


def rows_that_nest(
    connection: sqlite3.Connection,
    source: Source,
    nvtx: Table,
    domains: dict[tuple[int, int], str],
    text_of: Callable[[int | None], str],
) -> list[int]:
    """The rowids of a capture's start/end ranges that go into their threads' trees. domains: by (process, domain)."""
    events: dict[int, list[Task | Switch]] = {}  # by thread
    shown: dict[int, list[int]] = {}  # the rows of those of them that are ranges; 0 for one that is not shown at all
    kinds = ", ".join(map(str, START_END))
    for row, kind, tid, start, end, number, domain, text, key, payload, wrong in connection.execute(
        f"SELECT rowid, eventType, globalTid, start, coalesce(end, {_OPEN_END}), {nvtx.pick('rangeId')},"
        f" {nvtx.pick('domainId', default='0')}, text, {nvtx.pick('textId')},"
        f" {nvtx.pick('int64Value', 'uint64Value')},"
        f" coalesce({nvtx.pick('endGlobalTid')} != globalTid, 0) FROM {nvtx.sql} WHERE eventType IN ({kinds}, {MARK})"
        f" AND globalTid IS NOT NULL AND start IS NOT NULL AND coalesce(end, {_OPEN_END}) >= start"
        " ORDER BY start, 5 DESC, rowid"
    ):
        if domains.get((tid & ~0xFFFFFF, domain or 0)) != "fxnvtx":
            continue
        if kind != MARK:
            events.setdefault(tid, []).append(Task(start, end, number or 0))
            shown.setdefault(tid, []).append(0 if wrong else row)
        elif tid in events and (text if text is not None else text_of(key)) == TASK_SWITCH:
            events[tid].append(Switch(start, payload or 0))
    found: dict[int, tuple[Ints, Ints, Ints]] = {}
    for tid, some in events.items():
        tasks = [event for event in some if isinstance(event, Task)]
        kept = [
            (task.start, task.end, row)
            for task, row, alone in zip(tasks, shown[tid], apart(some), strict=True)
            if alone and row
        ]
        if kept:
            start, end, row = np.array(kept, np.int64).T
            found[tid] = start, end, row
    if not found:
        return []
    bad = {tid: np.zeros(len(rows[0]), np.bool_) for tid, rows in found.items()}
    columns = ["globalTid", "start", f"coalesce(end, {_OPEN_END})"]
    pushed = f"eventType IN ({', '.join(map(str, PUSH_POP))}) AND globalTid IS NOT NULL AND start IS NOT NULL"
    for batch in source.batches(columns, f"FROM {nvtx.sql} WHERE {pushed}"):
        threads, starts, ends = (values for values, _valid in batch.ints)
        for tid, (start, end, _row) in found.items():
            mine = threads == tid
            if mine.any():
                bad[tid] |= crossed(start, end, starts[mine], ends[mine])
    rows: list[int] = np.sort(np.concatenate([row[~bad[tid]] for tid, (_start, _end, row) in found.items()])).tolist()
    return rows


def beside(ranges: Iterable[Range]) -> frozenset[int]:
    """The numbers (`Range.crossing`) of those start/end ranges of a recording that do not nest: what `rows_that_nest`
    finds of a capture of the same run."""
    threads: dict[int, list[Range]] = {}
    for item in ranges:
        threads.setdefault(item.thread_id, []).append(item)
    around = {item.crossing: item for item in ranges if item.crossing}
    found: set[int] = set()
    for tid, mine in threads.items():
        tasks = [item for item in mine if item.crossing]
        if not tasks:
            continue
        events: list[Task | Switch] = []
        for item in mine:
            inside = around.get(item.inside)
            while inside is not None and inside.thread_id != tid:
                inside = around.get(inside.inside)
            events.append(Switch(item.start_ns, 0 if inside is None else inside.crossing))
            if item.crossing:
                events.append(Task(item.start_ns, _end(item), item.crossing))
        pushed = [item for item in mine if not item.crossing]
        bad = crossed(*_times(tasks), *_times(pushed))
        found.update(
            item.crossing for item, alone, bad_ in zip(tasks, apart(events), bad, strict=True) if bad_ or not alone
        )
    return frozenset(found)


def _end(item: Range) -> int:
    return _OPEN_END if item.end_ns is None else item.end_ns


def _times(ranges: list[Range]) -> tuple[Ints, Ints]:
    return np.array([item.start_ns for item in ranges], np.int64), np.array([_end(item) for item in ranges], np.int64)
