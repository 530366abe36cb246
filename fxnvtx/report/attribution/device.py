"""Device work: each operation's credit, the idle time before it, and the call that launched it; and of kernels of
replayed CUDA graphs, back through the clones, the call that was captured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..capture.schema import COPY, GRAPH, KERNEL, SET, Schema, Table
from .batches import Batch, Ints, Limits, Mask, Source, Spool, windows
from .names import Interner

__all__ = ["LAUNCHED", "NODE", "NO_CALL", "OVERLAPS", "Device", "GraphNodes", "Origins", "kind_of", "origins"]


PROCESS = ~0xFFFFFF  # globalTid & this = globalPid: the low 24 bits are the thread
TIMES = 1 << 61  # no clock gives more nanoseconds; sums and differences of what is below stay within 64 bits

# flags of an operation
NODE, NO_CALL, OVERLAPS = 1, 2, 4
_KIND = 3  # its kind begins at this bit

# what becomes of an operation on its way: read, credited, and joined with its call
_WORK = {"start": np.int64, "end": np.int64, "name": np.int32, "flags": np.int8, "node": np.int64, "size": np.int64}
_READ = {
    "start": np.int64,
    "end": np.int64,
    "corr": np.int64,
    **{k: _WORK[k] for k in ("name", "flags", "node", "size")},
}
_CREDIT = {"device": np.int32, "credit": np.int64, "idle": np.int64}
_CREDITED = {"corr": np.int64, **_WORK, **_CREDIT}
LAUNCHED = {"call": np.int64, "call_end": np.int64, "corr": np.int64, **_WORK, **_CREDIT}
_CALL = {"corr": np.int64, "tid": np.int64, "start": np.int64, "end": np.int64}

Rows = dict[str, NDArray[Any]]


def kind_of(flags: NDArray[Any]) -> NDArray[Any]:
    """KERNEL, COPY, SET or GRAPH of operations with these flags."""
    return flags >> _KIND


class Device:
    """All operations of a capture, from the tables to `launches` (by thread and call) and `strays` (by process).

    names: the kind and the key of each operation name by its number. count: how many operations there are.
    computing: the processes that have kernels or whole graphs.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._read = Spool(_READ, ("end",), limits)
        self.launches = Spool(LAUNCHED, ("corr", "start"), limits)
        self.strays = Spool(_CREDITED, (), limits)
        self.names: list[tuple[int, int | None]] = []
        self._known: dict[tuple[int, int | None], int] = {}
        self._devices = Interner()
        self._pids = Interner()
        self._pid_of: dict[int, int] = {}  # group -> process
        self.count = 0
        self.pids: set[int] = set()
        self.computing: set[int] = set()

    # ------------------------------------------------------------------------------------------ reading

    def read(self, source: Source, schema: Schema, tick: Any) -> None:
        """All operations, from whatever tables there are."""
        tables: list[tuple[Table | None, int, str | None, str | None]] = [
            (schema.kernel, KERNEL, schema.kernel.pick("demangledName", "shortName") if schema.kernel else None, None),
            (schema.memcpy, COPY, "copyKind", schema.memcpy.pick("bytes") if schema.memcpy else None),
            (schema.memset, SET, None, schema.memset.pick("bytes") if schema.memset else None),
            (schema.graph_trace, GRAPH, "graphId", None),
        ]
        for table, kind, name, size in tables:
            if table is None:
                continue
            node = None if kind == GRAPH or "graphNodeId" not in table.columns else "graphNodeId"
            columns = ["correlationId", schema.process(table), "deviceId", "start", "end", name, node, size]
            for batch in source.batches(columns, f"FROM {table.sql}"):
                self._batch(batch, kind)
                tick(batch.rows)
        self._read.seal()

    def _batch(self, batch: Batch, kind: int) -> None:
        corr, pid, device, start, end, name, node, size = batch.ints
        keep = both(pid[1], both(start[1], end[1]))
        self.pids.update(distinct(pid[0] if pid[1] is None else pid[0][pid[1]]))
        # a graph whose times could not be collected has two zeros (CUPTI's CUpti_ActivityGraphTrace2)
        right = (end[0] >= start[0]) & (end[0] > 0)
        keep = right if keep is None else keep & right
        rows: slice | NDArray[Any] = slice(None) if keep.all() else np.flatnonzero(keep)
        pids, starts, ends = pid[0][rows], start[0][rows], end[0][rows]
        if not len(pids):
            return
        check_times(starts, ends)
        flags = np.full(len(pids), kind << _KIND, np.int8)
        if corr[1] is not None:
            flags[~corr[1][rows]] |= NO_CALL
        if node[1] is None:
            flags |= NODE
        else:
            flags[node[1][rows]] |= NODE
        if kind in (KERNEL, GRAPH):
            self.computing.update(distinct(pids))
        devices = device[0][rows]
        if device[1] is not None:
            devices = np.where(device[1][rows], devices, -1)
        self._read.append(
            self._group(pids, devices),
            (starts, ends, corr[0][rows], self._named(kind, name, rows), flags, node[0][rows], size[0][rows]),
        )
        self.count += len(pids)

    def _group(self, pids: Ints, devices: Ints) -> Ints:
        """One number per process and device."""
        groups = (self._pids(pids) << 32) | self._devices(devices)
        for group in distinct(groups):
            if group not in self._pid_of:
                self._pid_of[group] = int(pids[np.argmax(groups == group)])
        return groups

    def _named(self, kind: int, name: tuple[Ints, Mask | None], rows: Any) -> Ints:
        keys, valid = name[0][rows], None if name[1] is None else name[1][rows]
        distinct, where = np.unique(keys, return_inverse=True)
        numbers = np.array([self._number(kind, key) for key in distinct.tolist()], np.int64)[where]
        return numbers if valid is None or valid.all() else np.where(valid, numbers, self._number(kind, None))

    def _number(self, kind: int, key: int | None) -> int:
        found = self._known.get((kind, key))
        if found is None:
            found = self._known[kind, key] = len(self.names)
            self.names.append((kind, key))
        return found

    # ------------------------------------------------------------------------------------------ credit

    def credited(self) -> Iterator[tuple[int, Rows]]:
        """The operations of one device after the other, by start, with what each has of the device's time."""
        devices = np.argsort(np.argsort(np.array(self._devices.keys(), np.int64)))
        # in this order, because it decides between operations of one call that start together
        for group in sorted(self._read.groups(), key=lambda item: (self._pid_of[item], devices[item & 0xFFFFFFFF])):
            pid = self._pid_of[group]
            before: int | None = None  # when everything that started earlier had ended
            for low, high in windows([self._read], group, self._limits.window):
                rows = self._read.read(group, low, high)
                if not len(rows["start"]):
                    continue
                start, end = rows["start"], rows["end"]
                after = self._read.next_key(group, high) if high is not None else None
                reach = np.maximum.accumulate(end)
                if before is not None:
                    reach = np.maximum(reach, before)
                earlier = np.empty_like(reach)
                earlier[1:] = reach[:-1]
                earlier[0] = start[0] if before is None else before
                following = np.empty_like(start)
                following[:-1] = start[1:]
                following[-1] = reach[-1] if after is None else after
                overlaps = (earlier > start) | (following < reach)
                rows["flags"] = rows["flags"] | (overlaps * OVERLAPS).astype(np.int8)
                rows["credit"] = np.maximum(0, end - np.maximum(start, earlier))
                rows["idle"] = np.maximum(0, start - earlier)
                rows["device"] = np.full(len(start), devices[group & 0xFFFFFFFF], np.int32)
                before = int(reach[-1])
                yield pid, rows
        self._read.close()

    # ------------------------------------------------------------------------------------------ joining

    def join(self, source: Source, schema: Schema, tick: Any) -> None:
        """Fill `launches` and `strays`. A correlation joins one call only: its process's first, by thread and start."""
        work = Spool(_CREDITED, ("start",), self._limits)
        for pid, rows in self.credited():
            lost = rows["flags"] & NO_CALL != 0
            if schema.runtime is None:
                lost[:] = True
            columns = [rows[name] for name in _CREDITED]
            if lost.any():
                self.strays.append(pid, [column[lost] for column in columns])
                columns = [column[~lost] for column in columns]
            work.append(pid, columns)
        work.seal()
        if schema.runtime is not None:
            calls = self._calls(source, schema.runtime, tick)
            for pid in work.groups():
                for low, high in windows([work, calls], pid, self._limits.window):
                    self._meet(pid, work.read(pid, low, high), calls.read(pid, low, high))
            calls.close()
        work.close()
        self.launches.seal()
        self.strays.seal()

    def _calls(self, source: Source, table: Table, tick: Any) -> Spool:
        calls = Spool(_CALL, ("tid", "start"), self._limits)
        for batch in source.batches(["globalTid", "start", "end", "correlationId"], f"FROM {table.sql}"):
            tid, start, end, corr = batch.ints
            keep = end[0] >= start[0]
            for _values, valid in (tid, start, end, corr):
                if valid is not None:
                    keep &= valid
            rows: Any = slice(None) if keep.all() else np.flatnonzero(keep)
            tids = tid[0][rows]
            if len(tids):
                check_times(start[0][rows], end[0][rows])
                calls.append(tids & PROCESS, (corr[0][rows], tids, start[0][rows], end[0][rows]))
            tick(batch.rows)
        calls.seal()
        return calls

    def _meet(self, pid: int, work: Rows, calls: Rows) -> None:
        if not len(work["corr"]):
            return
        keys = calls["corr"]
        if not len(keys):
            self.strays.append(pid, list(work.values()))
            return
        # of several calls the first one: searchsorted's left side
        at = np.minimum(np.searchsorted(keys, work["corr"]), len(keys) - 1)
        met = keys[at] == work["corr"]
        columns = list(work.values())
        if not met.all():
            self.strays.append(pid, [column[~met] for column in columns])
            columns, at = [column[met] for column in columns], at[met]
        corr, *rest = columns
        self.launches.append(calls["tid"][at], [calls["start"][at], calls["end"][at], corr, *rest])


def both(one: Mask | None, other: Mask | None) -> Mask | None:
    """Where both have a value."""
    if one is None or other is None:
        return other if one is None else one
    return one & other


def distinct(values: Ints) -> list[int]:
    """The different values."""
    if len(values) and (values == values[0]).all():
        return [int(values[0])]
    return list(np.unique(values).tolist())


def check_times(*columns: Sequence[int] | Ints) -> None:
    """Raises ValueError for times that cannot be."""
    for column in columns:
        if len(column) and (int(np.min(column)) < -TIMES or int(np.max(column)) > TIMES):
            raise ValueError("a time lies outside of what clocks give")


# ------------------------------------------------------------------------------------------------ replayed CUDA graphs


class GraphNodes:
    """The graph nodes of a capture, by start."""

    def __init__(self, source: Source, schema: Schema) -> None:
        self.known = schema.graph_nodes is not None
        parts: list[tuple[Ints, Ints, Ints, Ints]] = []
        if schema.graph_nodes is not None:
            columns = ["graphNodeId", "coalesce(originalGraphNodeId, graphNodeId)", "start", "globalTid"]
            rest = f"FROM {schema.graph_nodes.sql} WHERE graphNodeId IS NOT NULL AND globalTid IS NOT NULL"
            for batch in source.batches(columns, rest):
                node, original, start, thread = (values for values, _valid in batch.ints)
                parts.append((node, original, start, thread))
        whole = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else [_NONE] * 4
        order = np.argsort(whole[2], kind="stable")
        self.node, self.original, self.start, self.thread = (column[order] for column in whole)

    def of(self, pid: int, used: Ints) -> Origins:
        """Where the nodes that were replayed in a process come from."""
        mine = np.flatnonzero((self.thread & PROCESS) == pid)
        return origins(self.node[mine], self.original[mine], self.start[mine], self.thread[mine], used)


_NONE = np.empty(0, np.int64)


class Origins:
    """captured: nodes that were made while a graph was captured, with the thread and the time of the calls that made
    them. of[i]: which of them the i-th used node goes back to; -1: none in this recording."""

    def __init__(self, used: Ints, of: Ints, captured: Ints, thread: Ints, start: Ints) -> None:
        self.used, self.of = used, of
        self.captured, self.thread, self.start = captured, thread, start

    def __call__(self, nodes: Ints) -> Ints:
        return self.of[np.searchsorted(self.used, nodes)]

    def points(self) -> Iterator[tuple[int, Ints, Ints]]:
        """(thread, places in `captured`, starts) by thread and start."""
        order = np.lexsort([self.captured, self.start, self.thread])
        for thread in np.unique(self.thread).tolist():
            mine = order[self.thread[order] == thread]
            yield thread, mine, self.start[mine]


def origins(node: Ints, original: Ints, start: Ints, thread: Ints, used: Ints) -> Origins:
    """Rows of graph nodes by start: a node is its own original where it was captured, else it is a clone of another one
    (a graph is cloned when it is instantiated, and when it becomes part of another one)."""
    used = np.unique(used)
    is_clone = original != node
    # of several rows of one clone the last one counts, of one captured node the first one
    clones, at = np.unique(node[is_clone][::-1], return_index=True)
    target = original[is_clone][::-1][at]
    follow = _places(clones, target)
    for _ in range(len(clones).bit_length() + 1):  # twice as far with every turn
        on = np.flatnonzero(follow >= 0)
        target[on], follow[on] = target[follow[on]], follow[follow[on]]
    target, clones = target[follow < 0], clones[follow < 0]  # the others go round in a circle
    circle = np.setdiff1d(node[is_clone], clones)
    captured, first = np.unique(node[~is_clone], return_index=True)
    where = np.flatnonzero(~is_clone)[first]
    place = _places(clones, used)
    end = np.where(place >= 0, target[place] if len(target) else used, used)
    of = _places(captured, end)
    of[np.isin(end, circle)] = -1
    wanted = np.unique(of[of >= 0])
    of[of >= 0] = np.searchsorted(wanted, of[of >= 0])
    return Origins(used, of, captured[wanted], thread[where[wanted]], start[where[wanted]])


def _places(among: Ints, keys: Ints) -> Ints:
    """Where each key is among sorted ones; -1: it is not."""
    if not len(among):
        return np.full(len(keys), -1)
    at = np.minimum(np.searchsorted(among, keys), len(among) - 1)
    return np.where(among[at] == keys, at, -1)
