"""A whole capture: its tables into spools, and one `Part` per process out of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...categories import COMPILE, REQUEST, STEP
from ..capture.nsys import Reader
from ..capture.schema import COPY, GRAPH, PUSH_POP, SET, START_END, Table
from ..graphs import BEFORE, LEVEL, NO_TABLE, place
from ..labels import UNKNOWN, Name, Span, category_of
from ..part import Omitted, Part, inside
from ..tree import Node, Tree
from . import waits
from .batches import Batch, Ints, Source
from .device import NODE, OVERLAPS, PROCESS, Device, both, check_times, distinct, kind_of
from .forest import EARLIEST, ROOT, Forest
from .gaps import Gaps
from .graph_nodes import GraphNodes, Origins
from .names import Names
from .nesting import NONE
from .overlaps import COMMUNICATION, COMPUTE, COPYING, SETTING, Moves, Shared
from .spool import Limits, Spool, windows
from .threads import HAS_PAYLOAD, OPEN, SPAN, SPAN_TIES, Calls, Spans, Threads

__all__ = ["OUTSIDE", "Capture"]

OUTSIDE = Name(UNKNOWN + "launched outside every range", "unknown")
NO_LAUNCH = Name(UNKNOWN + "no launching call in this recording", "unknown")
CROSS_THREAD = "ranges that end on another thread than they began on were left out"
# NCCL's, RCCL's and NVSHMEM's kernels, and the collectives that serving stacks bring along
_COMMUNICATES = re.compile(
    r"nccl|rccl|nvshmem|oneccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|cross_device_reduce|multimem",
    re.IGNORECASE,
)
_OPEN_END = np.iinfo(np.int64).max


class Capture:
    """Reads everything when it is made; `part` gives the trees of a process."""

    def __init__(self, reader: Reader, source: Source, limits: Limits) -> None:
        self._reader = reader
        self._limits = limits
        self.names = Names(reader.text, reader.name, reader.exact)
        self.spans = Spool(SPAN, SPAN_TIES, limits)
        self.aside = Spool(SPAN, SPAN_TIES, limits)
        self.device = Device(limits)
        self.last = 0  # the last moment of any range
        self.notes: list[str] = []
        self.pids: set[int] = set()
        tick = reader.tick or (lambda rows: None)
        if reader.has_ranges:
            self._read_ranges(source, tick)
        self.device.read(source, reader.schema, tick)
        self.pids |= self.device.pids
        self.device.join(source, reader.schema, tick)
        self.waits = waits.Waits(source, reader.schema, limits, tick)
        self.graph_nodes = GraphNodes(source, reader.schema)
        # what each operation's name is for
        self.roles = np.array([_role(kind, reader.operation(kind, key)) for kind, key in self.device.names], np.int8)

    def close(self) -> None:
        """Forget all rows."""
        for spool in (self.spans, self.aside, self.device.launches, self.device.strays, self.waits.rows):
            spool.close()

    # ------------------------------------------------------------------------------------------ reading

    def _read_ranges(self, source: Source, tick: Any) -> None:
        nvtx = self._reader.nvtx
        payload = nvtx.pick("int64Value", "uint64Value", "int32Value", "uint32Value")
        # most captures have none of these, and a look is cheaper than a column
        text, elsewhere, value = _present(source, nvtx, ("text", nvtx.pick("endGlobalTid"), payload))
        columns = [
            "eventType", "globalTid", "start", "end", elsewhere, nvtx.pick("textId"), nvtx.pick("domainId"),
            nvtx.pick("category"), value,
        ]  # fmt: skip
        backwards: dict[int, int] = {}
        lost, nobody = 0, False
        for batch in source.batches(columns, f"FROM {nvtx.sql}", text and "coalesce(text, '')"):
            lost += self._ranges(batch, backwards)
            valid = batch.ints[1][1]
            nobody = nobody or valid is not None
            tick(batch.rows)
        self.spans.seal()
        self.aside.seal()
        if nobody:
            self.notes.append("some ranges do not say which thread they are from and were left out")
        for _pid, count in sorted(backwards.items()):
            self.notes.append(f"{count:,} ranges end before they begin and were left out")
        if lost:
            self.notes.append(f"{lost:,} {CROSS_THREAD}")

    def _ranges(self, batch: Batch, backwards: dict[int, int]) -> int:
        """Take in the ranges of a batch; returns how many of them end on another thread."""
        kind, tid, start, end, end_tid, strings, domain, category, payload = batch.ints
        whole = both(start[1], end[1])
        wrong = end[0] < start[0] if whole is None else whole & (end[0] < start[0])
        self._moments(start, end)
        pids = tid[0] & PROCESS
        if wrong.any():
            for pid in pids[wrong if tid[1] is None else wrong & tid[1]].tolist():
                backwards[pid] = backwards.get(pid, 0) + 1
        self.pids.update(distinct(pids if tid[1] is None else pids[tid[1]]))
        elsewhere = np.zeros(batch.rows, np.bool_)
        if end_tid[1] is None or end_tid[1].any():
            told = both(end_tid[1], tid[1])
            elsewhere = end_tid[0] != tid[0] if told is None else told & (end_tid[0] != tid[0])
        lost = 0
        for spool, kinds in ((self.spans, PUSH_POP), (self.aside, START_END)):
            mine = (kind[0] == kinds[0]) | (kind[0] == kinds[1])
            lost += int((mine & elsewhere).sum())
            keep = mine & ~wrong & ~elsewhere
            for valid in (tid[1], start[1]):
                if valid is not None:
                    keep &= valid
            if keep.any():
                rows: Any = slice(None) if keep.all() else np.flatnonzero(keep)
                texts = batch.texts
                if texts is not None and not isinstance(rows, slice):
                    texts = [texts[row] for row in rows.tolist()]  # type: ignore[assignment]
                name = self.names.raw(
                    pids[rows], _some(strings, rows), texts, _some(domain, rows), _some(category, rows)
                )
                self._append(spool, tid[0][rows], start[0][rows], _some(end, rows), _some(payload, rows), name)
        return lost

    def _moments(self, start: tuple[Ints, Any], end: tuple[Ints, Any]) -> None:
        for values, valid in (start, end):
            some = values if valid is None else values[valid]
            if len(some):
                self.last = max(self.last, int(some.max()))

    def _append(
        self, spool: Spool, tid: Ints, start: Ints, end: tuple[Ints, Any], payload: tuple[Ints, Any], name: Ints
    ) -> None:
        flags = np.zeros(len(name), np.int8)
        ends = end[0]
        check_times(start, ends)
        if end[1] is not None:
            ends = np.where(end[1], ends, _OPEN_END)
            flags[~end[1]] |= OPEN
        flags[slice(None) if payload[1] is None else payload[1]] |= HAS_PAYLOAD
        spool.append(tid, (start, -ends, name, payload[0], flags))

    # ------------------------------------------------------------------------------------------ one process

    def part(self, pid: int) -> Part:
        """The trees of one process."""
        part = Part(str(self._reader.path), (pid >> 24) & 0xFFFFFF)
        part.domains = sorted({name for (owner, _), name in self._reader.domains.items() if owner == pid})
        filler = Filler(self, part.tree)
        omitted = self._reader.omitted(pid, lambda: self._heads(pid))
        if self._reader.window.between is not None:
            begins = [self.spans.first_key(group) for group in self.spans.groups() if group & PROCESS == pid]
            if begins:
                omitted.cut_to(self._reader.window.between, min(begins))
        part.notes.extend(omitted.notes)
        filler.origins = self._origins(pid)
        if len(filler.origins.captured):
            # first, because the thread that replays may come before the one that captured
            filler.captured = self._captured(filler.origins)
        computes = self._reader.schema.kernel is not None and pid in self.device.computing
        moves = filler.moves = Moves(filler.forest, self._limits)
        shared = filler.shared = Shared(filler.forest, self._limits)
        threads = Threads(
            filler.forest, filler.outside, filler.launch, moves.residency, None if computes else moves.modules,
            lambda rows, node: waits.count(filler.forest, node, rows),
        )  # fmt: skip
        for thread in self._threads(pid, self.spans):
            self._run(threads, thread, self.spans, omitted)
        filler.strays(pid, omitted.clip)
        shared.settle()
        moves.settle((lambda: self._kernels(pid)) if computes else None)
        filler.forest.fill(self._operation)
        part.tree.total()
        part.operations = filler.forest.operations
        part.has_gpu = part.operations > 0
        part.device_calls = self.device.count > 0
        part.has_memory = self.waits.has_memory
        part.gaps = [
            (idle, end, filler.forest.nodes[node].name.text or "no range", self._operation(name))
            for idle, end, node, name in filler.gaps.longest()
        ]
        if threads.crossing:
            part.notes.append(f"{threads.crossing:,} ranges cross another one instead of lying inside it")
        self._side(part, pid, Omitted(omitted.clip))
        return part

    def _side(self, part: Part, pid: int, omitted: Omitted) -> None:
        """Start/end ranges: they nest in nothing, so they get a tree of their own that no total counts."""
        if not any(group & PROCESS == pid for group in self.aside.groups()):
            return
        filler = Filler(self, part.side)
        threads = Threads(filler.forest, filler.outside, filler.launch)
        for thread in self._threads(pid, self.aside):
            self._run(threads, thread, self.aside, omitted)
        filler.forest.fill(self._operation)
        part.side.root.kids.pop(OUTSIDE, None)
        part.side.total()

    def _heads(self, pid: int) -> Iterator[Span]:
        """The ranges by which requests and steps are told apart: outermost ones, and those of a few categories."""
        for thread in sorted(group for group in self.spans.groups() if group & PROCESS == pid):
            until = EARLIEST  # the end of the outermost range that came last
            for low, high in windows([self.spans], thread, self._limits.window):
                spans = self._spans(self.spans.read(thread, low, high))
                kinds = [category_of(name) in (REQUEST, STEP, COMPILE) for name in self.names.names]
                wanted = np.array(kinds, np.bool_)[spans.name] if len(spans.start) else np.empty(0, np.bool_)
                # none of the ranges that start before the outermost one's end is outermost itself
                row = int(np.searchsorted(spans.start, until))
                while row < len(spans.start):
                    wanted[row] = True
                    until = int(spans.end[row])
                    row = max(row + 1, int(np.searchsorted(spans.start, until)))
                for row in np.flatnonzero(wanted).tolist():
                    name = self.names.names[int(spans.name[row])]
                    yield thread, int(spans.start[row]), int(spans.end[row]), name, None, bool(spans.is_open[row])

    def _threads(self, pid: int, spans: Spool) -> list[int]:
        groups = {*spans.groups(), *self.device.launches.groups(), *self.waits.rows.groups()}
        return sorted(group for group in groups if group & PROCESS == pid)

    def _run(self, threads: Threads, thread: int, spans: Spool, omitted: Omitted) -> None:
        launches = self.device.launches
        times = omitted.times.get(thread, [])
        others, clip = self.waits.rows, omitted.clip
        threads.run(
            thread,
            [spans, launches, others],
            self._limits.window,
            lambda low, high: cut(self._spans(without(spans.read(thread, low, high), "start", times)), clip),
            lambda low, high: calls_of(without(launches.read(thread, low, high), "call", times, clip)),
            lambda low, high: without(others.read(thread, low, high), "start", times, clip),
        )
        if self._reader.tick is not None:
            self._reader.tick(0)

    def _spans(self, rows: dict[str, NDArray[Any]]) -> Spans:
        start, end = rows["start"], -rows["neg_end"]
        is_open = rows["flags"] & OPEN != 0
        if is_open.any():
            end[is_open] = np.maximum(self.last, start[is_open])
        name, piece = self.names.final(rows["name"], rows["payload"], rows["flags"] & HAS_PAYLOAD != 0)
        payload = np.where(piece, 0, rows["payload"]) if piece.any() else rows["payload"]
        return Spans(start, end, name, payload, is_open, piece)

    def _operation(self, number: int) -> str:
        return self._reader.operation(*self.device.names[number])

    # ------------------------------------------------------------------------------------------ CUDA graphs

    def _origins(self, pid: int) -> Origins:
        used = [np.empty(0, np.int64)]
        for thread in self.device.launches.groups():
            if thread & PROCESS == pid:
                for low, high in windows([self.device.launches], thread, self._limits.window):
                    rows = self.device.launches.read(thread, low, high)
                    used.append(np.unique(rows["node"][rows["flags"] & NODE != 0]))
        return self.graph_nodes.of(pid, np.concatenate(used))

    def _captured(self, origins: Origins) -> list[Node]:
        """The range around each captured node, in a tree of its own."""
        forest = Forest(Tree(), self.names)
        found: list[Node] = [forest.tree.root] * len(origins.captured)

        def launch(calls: Calls, around: Ints, both: Ints) -> None:
            for at, number in zip(calls.what.tolist(), around.tolist(), strict=True):
                found[at] = forest.nodes[number]

        threads = Threads(forest, lambda: forest.below(ROOT, OUTSIDE), launch)
        for thread, places, starts in origins.points():

            def calls(low: int | None, high: int | None, places: Ints = places, starts: Ints = starts) -> Calls:
                first = 0 if low is None else int(np.searchsorted(starts, low))
                last = len(starts) if high is None else int(np.searchsorted(starts, high))
                at = starts[first:last]
                return Calls(at, at, at, at, np.zeros(len(at), np.int64), places[first:last])

            def spans(low: int | None, high: int | None, thread: int = thread) -> Spans:
                return self._spans(self.spans.read(thread, low, high))

            points = Spool({"start": np.int64}, (), self._limits)
            points.append(thread, (starts,))
            points.seal()
            threads.run(thread, [self.spans, points], self._limits.window, spans, calls)
        return found

    def _kernels(self, pid: int) -> Spool:
        """When kernels ran, as one group."""
        kernels = Spool({"start": np.int64, "end": np.int64}, (), self._limits)
        sources = [(self.device.launches, thread) for thread in self.device.launches.groups()]
        for spool, group in [*sources, (self.device.strays, pid)]:
            if group & PROCESS == pid:
                for low, high in windows([spool], group, self._limits.window):
                    rows = spool.read(group, low, high)
                    kind = kind_of(rows["flags"])
                    some = (kind != COPY) & (kind != SET)
                    kernels.append(0, (rows["start"][some], rows["end"][some]))
        kernels.seal()
        return kernels


class Filler:
    """Puts device work on the nodes of one tree. origins, shared, moves: None where these are not asked for."""

    def __init__(self, capture: Capture, tree: Tree) -> None:
        self._capture = capture
        self.forest = Forest(tree, capture.names, device=capture.device.count > 0)
        self.origins: Origins | None = None
        self.captured: list[Node] = []
        self.shared: Shared | None = None
        self.moves: Moves | None = None
        self.gaps = Gaps()
        self._placed: dict[int, int] = {}  # (launching node, captured node) -> where it counts
        self._runs: dict[int, int] = {}  # the same key -> how often

    def outside(self) -> int:
        return self.forest.below(ROOT, OUTSIDE)

    def launch(self, calls: Calls, around: Ints, both: Ints) -> None:
        """Count what calls launched for the ranges around them."""
        rows, begins = calls.what
        node = np.repeat(around, np.diff(np.append(begins, len(rows["start"]))))
        self.forest.sums["launching"].add(around, calls.end - calls.start)
        self.forest.sums["queued"].add(around, np.maximum(0, calls.first - calls.end))
        # within one launch, the launch's own range holds them all
        waited = node.copy()
        waited[begins] = both
        some = (waited != NONE) & (rows["idle"] > 0)
        self.forest.sums["gap_self"].add(waited[some], rows["idle"][some])
        self.gaps.add({name: rows[name][some] for name in ("idle", "start", "device", "name")}, waited[some])
        self._add(self._replayed(node, rows), rows)

    def strays(self, pid: int, clip: tuple[int, int] | None) -> None:
        """Operations that no recorded call launched."""
        spool = self._capture.device.strays
        for low, high in windows([spool], pid, self._capture._limits.window):
            rows = without(spool.read(pid, low, high), "start", [], clip)
            if len(rows["start"]):
                self._add(np.full(len(rows["start"]), self.forest.below(ROOT, NO_LAUNCH)), rows)

    def _add(self, node: Ints, rows: dict[str, NDArray[Any]]) -> None:
        kind = kind_of(rows["flags"])
        self.forest.count_operations(node, rows, kind)
        role = self._capture.roles[rows["name"]]
        for which, counter in ((COMMUNICATION, "communication"), (COPYING, "copying")):
            mine = role == which
            if mine.any():
                self.forest.sums[counter].add(node[mine], (rows["end"] - rows["start"])[mine])
        if self.shared is not None:
            some = np.flatnonzero(rows["flags"] & OVERLAPS)
            if len(some):
                device, start, end, credit = (rows[name][some] for name in ("device", "start", "end", "credit"))
                self.shared.add(device, start, end, credit, node[some], role[some])
        if self.moves is not None:
            copies = np.flatnonzero(kind == COPY)
            if len(copies):
                self.moves.copies(rows["start"][copies], rows["end"][copies], node[copies])

    def _replayed(self, node: Ints, rows: dict[str, NDArray[Any]]) -> Ints:
        """Where operations of CUDA graphs count; the others stay where they are."""
        if self.origins is None:
            return node
        is_node = rows["flags"] & NODE != 0
        whole = np.flatnonzero(~is_node & (kind_of(rows["flags"]) == GRAPH))
        single = np.flatnonzero(is_node)
        if len(whole) or len(single):
            node = node.copy()
        for number in distinct(node[whole]) if len(whole) else ():
            node[whole[node[whole] == number]] = self.forest.below(number, LEVEL)
        if len(single):
            # 0 for those that go back to nothing
            origins = self.origins(rows["node"][single]) + 1
            keys, first, where, counts = np.unique((node[single] << 32) | origins, True, True, True)
            calls = rows["call"][single][first]
            places = [self._place(key, call) for key, call in zip(keys.tolist(), calls.tolist(), strict=True)]
            for key, number, count in zip(keys.tolist(), places, counts.tolist(), strict=True):
                # a graph runs each of its nodes once: how often this one ran is how often its layer was replayed
                self._runs[key] = self._runs.get(key, 0) + count
                placed = self.forest.nodes[number]
                placed.replays = max(placed.replays, self._runs[key])
            node[single] = np.array(places, np.int64)[where]
        return node

    def _place(self, key: int, call: int) -> int:
        found = self._placed.get(key)
        if found is None:
            number, origin = key >> 32, (key & 0xFFFFFFFF) - 1
            if origin < 0:
                found = self.forest.below(number, BEFORE if self._capture.graph_nodes.known else NO_TABLE)
            else:
                launched = self.forest.nodes[number]
                launched.first = self.forest.started(number)
                later = self.forest.starts_after(call)
                found = self.forest.number(place(self.forest.tree, launched, self.captured[origin], BEFORE, later))
            self._placed[key] = found
        return found


def _role(kind: int, name: str) -> int:
    if kind == COPY:
        return COPYING
    return SETTING if kind == SET else COMMUNICATION if _COMMUNICATES.search(name) else COMPUTE


def calls_of(rows: dict[str, NDArray[Any]]) -> Calls:
    """Launched operations, by call, as calls."""
    call, corr = rows["call"], rows["corr"]
    if not len(call):
        return Calls(call, call, call, call, call, (rows, np.empty(0, np.int64)))
    begins = np.flatnonzero(np.append(True, (call[1:] != call[:-1]) | (corr[1:] != corr[:-1])))
    first = np.minimum.reduceat(rows["start"], begins)
    last = np.maximum.reduceat(rows["end"], begins)
    time = np.add.reduceat(rows["credit"], begins)
    return Calls(call[begins], rows["call_end"][begins], first, last, time, (rows, begins))


def cut(spans: Spans, clip: tuple[int, int] | None) -> Spans:
    """The ranges cut to a time, without those that have no part in it."""
    if clip is None or not len(spans.start):
        return spans
    low, high = clip
    rows = np.flatnonzero(inside(spans.start, spans.end, low, high))
    start, end = np.maximum(spans.start[rows], low), np.minimum(spans.end[rows], high)
    order = np.lexsort([-end, start])  # stable: ranges that were cut alike stay in their order
    rows = rows[order]
    return Spans(
        start[order], end[order], spans.name[rows], spans.payload[rows], spans.is_open[rows], spans.piece[rows]
    )  # fmt: skip


def without(
    rows: dict[str, NDArray[Any]], start: str, times: list[tuple[int, int]], clip: tuple[int, int] | None = None
) -> dict[str, NDArray[Any]]:
    """The rows that do not start within any of these times, which are sorted; and within `clip`."""
    if clip is not None:
        kept = (rows[start] >= clip[0]) & (rows[start] < clip[1])
        rows = {name: column[kept] for name, column in rows.items()}
    if not times or not len(rows[start]):
        return rows
    bounds = np.array(times, np.int64)
    place = np.searchsorted(bounds[:, 0], rows[start], "right") - 1
    kept = (place < 0) | (rows[start] >= bounds[place, 1])
    return {name: column[kept] for name, column in rows.items()}


def _present(source: Source, nvtx: Table, columns: tuple[str, ...]) -> list[str | None]:
    """The columns of ranges that are not NULL in all of them, None for the others."""
    kinds = ", ".join(map(str, PUSH_POP + START_END))
    asked = [f"{column} IS NOT NULL" for column in columns]
    if not source.exists(f"FROM {nvtx.sql} WHERE eventType IN ({kinds}) AND ({' OR '.join(asked)})"):
        return [None] * len(columns)
    return [
        column if source.exists(f"FROM {nvtx.sql} WHERE eventType IN ({kinds}) AND {test}") else None
        for column, test in zip(columns, asked, strict=True)
    ]


def _some(column: tuple[Ints, Any], rows: Any) -> tuple[Ints, Any]:
    return column[0][rows], None if column[1] is None else column[1][rows]
