"""Intervals that overlap: unions of device work per range, residency work hidden behind compute; the longest idle
times; and what the host did with the device besides launching: waits, allocations, and how much was in use by then.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..capture.schema import Schema
from .batches import Batch, Ints, Limits, Source, Spool, windows
from .device import PROCESS, check_times, distinct
from .forest import EARLIEST, Forest

__all__ = [
    "COMMUNICATION",
    "COMPUTE",
    "COPYING",
    "Gaps",
    "Moves",
    "Shared",
    "Waits",
    "cover_before",
    "own_parts",
    "unions",
]


COMPUTE, COMMUNICATION, COPYING, SETTING = 0, 1, 2, 3  # what an operation is for


def own_parts(group: Ints, start: Ints, end: Ints, reach: Ints) -> tuple[Ints, Ints]:
    """What each interval adds to the union of its group's earlier ones, and how far each group (0, 1, ...) reaches
    after all of them. Sorted by group, and by start within each; `reach`: how far the groups reach before (pure)."""
    # the furthest end so far within a group: ranks instead of ends, so that a group's number can stand before them
    order = np.argsort(end, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(end))
    furthest = np.maximum.accumulate(group * len(end) + rank) - group * len(end)
    upto = np.maximum(end[order][furthest], reach[group])
    before = reach[group]
    same = group[1:] == group[:-1]
    before[1:][same] = upto[:-1][same]
    after = reach.copy()
    last = np.append(~same, True) if len(group) else np.zeros(0, np.bool_)
    after[group[last]] = upto[last]
    return np.maximum(0, end - np.maximum(start, before)), after


class Shared:
    """Operations that overlap others on their device: every range's own union, where it is more than its credit, and
    how much communication and copying other kernels hide."""

    def __init__(self, forest: Forest, limits: Limits) -> None:
        self._forest = forest
        self._limits = limits
        columns = {"start": np.int64, "end": np.int64, "credit": np.int64, "node": np.int64, "role": np.int8}
        self._rows = Spool(columns, ("end",), limits)

    def add(self, device: Ints, start: Ints, end: Ints, credit: Ints, node: Ints, role: Ints) -> None:
        self._rows.append(device, (start, end, credit, node, role))

    def settle(self) -> None:
        """Set gpu_shared, communication_hidden and copying_hidden of every node concerned."""
        self._rows.seal()
        for device in self._rows.groups():
            self._hidden(device)
        parents = np.array(self._forest.parents)
        depths = np.array(self._forest.depths)
        sums = self._forest.sums["gpu_shared"]
        for device in self._rows.groups():
            reach = np.full(len(parents), EARLIEST)
            for low, high in windows([self._rows], device, self._limits.window):
                rows = self._rows.read(device, low, high)
                node = rows["node"]
                for depth in range(int(depths[node].max()) if len(node) else -1, -1, -1):
                    here = np.flatnonzero(depths[node] == depth)
                    line = node[here]
                    order = here[np.argsort(line, kind="stable")]
                    line = node[order]
                    groups, group = np.unique(line, return_inverse=True)
                    own, reach[groups] = own_parts(group, rows["start"][order], rows["end"][order], reach[groups])
                    sums.add(line, own - rows["credit"][order])
                    node[here] = np.maximum(parents[node[here]], 0)
        self._rows.close()

    def _hidden(self, device: int) -> None:
        asked = _questions(self._limits)
        compute = False
        for low, high in windows([self._rows], device, self._limits.window):
            rows = self._rows.read(device, low, high)
            compute = compute or bool((rows["role"] == COMPUTE).any())
            some = (rows["role"] == COMMUNICATION) | (rows["role"] == COPYING)
            _ask(asked, rows["start"][some], rows["end"][some], (rows["node"] << 1 | (rows["role"] == COPYING))[some])
        asked.seal()
        if compute:
            for key, covered, sign in _answers(asked, self._compute(device), self._limits):
                copying = key & 1 == 1
                self._forest.sums["copying_hidden"].add((key >> 1)[copying], covered[copying], sign)
                self._forest.sums["communication_hidden"].add((key >> 1)[~copying], covered[~copying], sign)
        asked.close()

    def _compute(self, device: int) -> Iterator[tuple[Ints, Ints]]:
        for low, high in windows([self._rows], device, self._limits.window):
            rows = self._rows.read(device, low, high)
            some = rows["role"] == COMPUTE
            yield rows["start"][some], rows["end"][some]


class Moves:
    """How much of the residency work passed while something computed."""

    def __init__(self, forest: Forest, limits: Limits) -> None:
        self._forest = forest
        self._limits = limits
        self._moves = Spool({"start": np.int64, "end": np.int64, "node": np.int64}, (), limits)
        self._modules = Spool({"start": np.int64, "end": np.int64}, (), limits)

    def residency(self, thread: int, start: Ints, end: Ints, node: Ints) -> None:
        """Residency ranges."""
        self._moves.append(thread, (start, end, node))

    def modules(self, thread: int, start: Ints, end: Ints, node: Ints) -> None:
        """Outermost modules' ranges: what computes, where there are no kernels to tell."""
        self._modules.append(thread, (start, end))

    def copies(self, start: Ints, end: Ints, node: Ints) -> None:
        """Copies on the device: residency work where a residency range launched them."""
        forest = self._forest
        if not forest.has_residency:
            return
        inside = np.array(forest.residency)[node]
        rows = np.flatnonzero(inside >= 0)
        if len(rows):
            self._moves.append(-1, (start[rows], end[rows], inside[rows]))

    def settle(self, kernels: Callable[[], Spool] | None) -> None:
        """Set resident and overlap. kernels: gives times of what computes; None: modules on other threads do."""
        self._moves.seal()
        self._modules.seal()
        threads = self._moves.groups()
        spool = kernels() if kernels is not None and threads else self._modules
        for thread in threads:
            others = [group for group in spool.groups() if group != thread or kernels is not None]
            self._settle(thread, [(spool, group) for group in others])
        spool.close()
        self._modules.close()
        self._moves.close()

    def _settle(self, thread: int, compute: list[tuple[Spool, int]]) -> None:
        sums = self._forest.sums
        asked = _questions(self._limits)
        for low, high in windows([self._moves], thread, self._limits.window):
            rows = self._moves.read(thread, low, high)
            sums["resident"].add(rows["node"], rows["end"] - rows["start"])
            _ask(asked, rows["start"], rows["end"], rows["node"])
        asked.seal()
        for key, covered, sign in _answers(asked, _merged(compute, self._limits), self._limits):
            sums["overlap"].add(key, covered, sign)
        asked.close()


def _questions(limits: Limits) -> Spool:
    return Spool({"at": np.int64, "key": np.int64, "sign": np.int8}, (), limits)


def _ask(asked: Spool, start: Ints, end: Ints, key: Ints) -> None:
    """How much of an interval is covered: what is before its end less what is before its start, two questions that need
    not meet."""
    asked.append(0, (start, key, -1))
    asked.append(0, (end, key, 1))


def _answers(asked: Spool, intervals: Iterator[tuple[Ints, Ints]], limits: Limits) -> Iterator[tuple[Ints, Ints, int]]:
    """(keys, how much of the intervals lies before each moment, sign) for all questions."""
    pieces = unions(intervals)
    piece = next(pieces, None)
    done = 0  # how much the pieces before this one cover
    for low, high in windows([asked], 0, limits.window):
        rows = asked.read(0, low, high)
        at = rows["at"]
        if not len(at):
            continue
        total = np.zeros(len(at), np.int64)
        total += done
        while piece is not None:
            start, end = piece
            # all of it counts for later questions once it lies before all of them
            total += cover_before(start, end, at)
            if int(end[-1]) > int(at[-1]):
                break
            done += int((end - start).sum())
            piece = next(pieces, None)
        for sign in (-1, 1):
            some = rows["sign"] == sign
            if some.any():
                yield rows["key"][some], total[some], sign


def cover_before(start: Ints, end: Ints, at: Ints) -> Ints:
    """How much of disjoint, sorted intervals lies before each moment (pure)."""
    length = end - start
    whole = np.concatenate([[0], np.cumsum(length)])
    index = np.searchsorted(start, at, "right")
    last = np.maximum(index - 1, 0)
    into = np.where(index > 0, np.minimum(at - start[last], length[last]), 0)
    return np.where(index > 0, whole[last], 0) + into


def unions(batches: Iterable[tuple[Ints, Ints]]) -> Iterator[tuple[Ints, Ints]]:
    """Merge intervals that come in batches, sorted by start within and between them (pure)."""
    held: tuple[int, int] | None = None
    for start, end in batches:
        if not len(start):
            continue
        if held is not None:
            start, end = np.append(held[0], start), np.append(held[1], end)
        reach = np.maximum.accumulate(end)
        begins = np.append(True, start[1:] > reach[:-1])
        first = np.flatnonzero(begins)
        last = np.append(first[1:], len(start)) - 1
        starts, ends = start[first], reach[last]
        held = (int(starts[-1]), int(ends[-1]))  # the next batch may reach into it
        if len(starts) > 1:
            yield starts[:-1], ends[:-1]
    if held is not None:
        yield np.array([held[0]]), np.array([held[1]])


def _merged(compute: list[tuple[Spool, int]], limits: Limits) -> Iterator[tuple[Ints, Ints]]:
    """Intervals of several groups, all by start."""
    if len(compute) == 1:
        spool, group = compute[0]
        for low, high in windows([spool], group, limits.window):
            rows = spool.read(group, low, high)
            yield rows["start"], rows["end"]
        return
    whole = Spool({"start": np.int64, "end": np.int64}, (), limits)
    for spool, group in compute:
        for low, high in windows([spool], group, limits.window):
            rows = spool.read(group, low, high)
            whole.append(0, (rows["start"], rows["end"]))
    whole.seal()
    yield from _merged([(whole, 0)], limits)
    whole.close()


# ---------------------------------------------------------------------------------------------------------- idle times


_KEPT = 10
_STEP = 1_000


class Gaps:
    """Takes in operations and keeps the longest idle times before one, the earlier of two that are equally long."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, int, int]] = []  # idle, start, device, node, name
        self._least = 0

    def add(self, rows: dict[str, NDArray[Any]], node: Ints) -> None:
        """Operations as they were launched, and the range that waited for each."""
        places = np.flatnonzero(rows["idle"] > self._least)
        while len(places):
            # a few at a time, because those rule out most others
            some, places = places[:_STEP], places[_STEP:]
            columns = [rows[name][some].tolist() for name in ("idle", "start", "device")]
            for gap in zip(*columns, node[some].tolist(), rows["name"][some].tolist(), strict=True):
                self._one(gap)
            places = places[rows["idle"][places] > self._least]

    def _one(self, gap: tuple[int, int, int, int, int]) -> None:
        if gap[0] <= self._least:
            return
        if len(self._heap) == _KEPT:
            heapq.heappop(self._heap)
        heapq.heappush(self._heap, gap)
        if len(self._heap) == _KEPT:
            self._least = self._heap[0][0]

    def longest(self) -> list[tuple[int, int, int, int]]:
        """(length, end, node, name of the operation that ended it), the longest first."""
        found = sorted(self._heap, reverse=True, key=lambda gap: gap[:3])
        return [(idle, start, node, name) for idle, start, _device, node, name in found]


# ----------------------------------------------------------------------------------------------- waits and allocations


WAIT, ALLOCATION, RELEASE = 0, 1, 2
_ON_HOST = (0, 1)  # kinds of memory: pageable and pinned
# `cudaStreamSynchronize_v3020`, `cuCtxSynchronize`, `hipDeviceSynchronize`
_WAITING = "value GLOB 'cu*Synchronize*' OR value GLOB 'hip*Synchronize*'"
_ROW = {"start": np.int64, "end": np.int64, "kind": np.int8, "size": np.int64, "used": np.int64}


class Waits:
    """Calls that wait, and (de)allocations, by thread. used: bytes of the process that are allocated after each, as
    far as the capture saw them being allocated. has_memory: whether the capture tells of allocations."""

    def __init__(self, source: Source, schema: Schema, limits: Limits, tick: Any) -> None:
        self.rows = Spool(_ROW, (), limits)
        self.has_memory = False
        self._used: dict[int, int] = {}
        runtime = schema.runtime
        if runtime is None:
            return
        if (
            schema.strings is not None
            and "nameId" in runtime.columns
            and source.exists(f"FROM {schema.strings.sql} WHERE {_WAITING}")
        ):
            named = f"nameId IN (SELECT id FROM {schema.strings.sql} WHERE {_WAITING})"
            for batch in source.batches(["globalTid", "start", "end"], f"FROM {runtime.sql} WHERE {named}"):
                self._waits(batch)
                tick(batch.rows)
        if schema.memory is not None:
            memory = schema.memory
            columns = [
                "r.globalTid",
                "r.start",
                "r.end",
                "m.memoryOperationType",
                "m.bytes",
                "m.globalPid",
                "m.memKind",
            ]
            join = (
                f"FROM {memory.sql} m LEFT JOIN {runtime.sql} r ON r.correlationId = m.correlationId"
                f" AND r.globalTid & {PROCESS} = m.globalPid ORDER BY m.start"
            )
            for batch in source.batches(columns, join):
                self._memory(batch)
                tick(batch.rows)
        self.rows.seal()

    def _waits(self, batch: Batch) -> None:
        tid, start, end = batch.ints
        keep = _whole(end[0] >= start[0], tid, start, end)
        check_times(start[0][keep], end[0][keep])
        length = end[0][keep] - start[0][keep]
        self.rows.append(tid[0][keep], (start[0][keep], end[0][keep], WAIT, length, 0))

    def _memory(self, batch: Batch) -> None:
        tid, start, end, kind, size, pid, where = batch.ints
        device = _whole((kind[0] <= 1) & ~np.isin(where[0], _ON_HOST), kind, size, pid)
        self.has_memory = self.has_memory or bool(device.any())
        change = np.where(device, np.where(kind[0] == 0, size[0], -size[0]), 0)
        used = np.zeros(batch.rows, np.int64)
        for process in distinct(pid[0]):
            mine = pid[0] == process
            upto = self._used.get(process, 0) + np.cumsum(change[mine])
            used[mine] = upto
            self._used[process] = int(upto[-1])
        keep = _whole(device & (end[0] >= start[0]), tid, start, end)
        check_times(start[0][keep], end[0][keep])
        which = np.where(kind[0] == 0, ALLOCATION, RELEASE)[keep]
        self.rows.append(tid[0][keep], (start[0][keep], end[0][keep], which, size[0][keep], used[keep]))


def count_waits(forest: Forest, node: Ints, rows: dict[str, NDArray[Any]]) -> None:
    """Count rows for the ranges they lie in."""
    for kind, counter in ((WAIT, "waited"), (ALLOCATION, "allocated"), (RELEASE, "released")):
        some = rows["kind"] == kind
        if some.any():
            forest.sums[counter].add(node[some], rows["size"][some])
    some = rows["kind"] == ALLOCATION
    if some.any():
        forest.count_peaks(node[some], rows["used"][some])


def _whole(keep: NDArray[np.bool_], *columns: tuple[Ints, NDArray[np.bool_] | None]) -> NDArray[np.bool_]:
    for _values, valid in columns:
        if valid is not None:
            keep = keep & valid
    return keep
