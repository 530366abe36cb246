"""A whole capture: its tables into spools, and one `Part` per process out of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...categories import COMPILE, REQUEST, STEP
from ..capture.nsys import Reader
from ..capture.schema import COPY, GRAPH, SET
from ..labels import UNKNOWN, Name, Span, category_of
from ..part import Omitted, Part
from ..tree import Node, Tree
from ..work import different
from . import NONE
from .batches import Ints, Limits, Source, Spool, windows
from .device import NODE, OVERLAPS, PROCESS, Device, GraphNodes, Origins, distinct, kind_of
from .forest import BEFORE, EARLIEST, LEVEL, NO_TABLE, ROOT, Forest, place
from .names import Names
from .overlaps import COMMUNICATION, COMPUTE, COPYING, SETTING, Gaps, Moves, Shared, Waits, count_waits
from .ranges import Ranges
from .threads import HAS_PAYLOAD, OPEN, Calls, Spans, Threads, calls_of, cut, without

__all__ = ["OUTSIDE", "Capture"]

OUTSIDE = Name(UNKNOWN + "launched outside every range", "unknown")
NO_LAUNCH = Name(UNKNOWN + "no launching call in this recording", "unknown")
# NCCL's, RCCL's and NVSHMEM's kernels, and the collectives that serving stacks bring along
_COMMUNICATES = re.compile(
    r"nccl|rccl|nvshmem|oneccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|cross_device_reduce|multimem",
    re.IGNORECASE,
)


class Capture:
    """Reads everything when it is made; `part` gives the trees of a process."""

    def __init__(self, reader: Reader, source: Source, limits: Limits) -> None:
        self._reader = reader
        self._limits = limits
        self.names = Names(reader.text, reader.name, reader.exact, different(reader.entries))
        self.device = Device(limits)
        tick = reader.tick or (lambda rows: None)
        ranges = Ranges(reader, self.names, source, limits, tick)
        self.spans, self.aside, self.last, self.notes = ranges.spans, ranges.aside, ranges.last, ranges.notes
        self.device.read(source, reader.schema, tick)
        self.pids = ranges.pids | self.device.pids
        self.device.join(source, reader.schema, tick)
        self.waits = Waits(source, reader.schema, limits, tick)
        self.graph_nodes = GraphNodes(source, reader.schema)
        # what each operation's name is for
        self.roles = np.array([_role(kind, reader.operation(kind, key)) for kind, key in self.device.names], np.int8)

    def close(self) -> None:
        """Forget all rows."""
        for spool in (self.spans, self.aside, self.device.launches, self.device.strays, self.waits.rows):
            spool.close()

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
            lambda rows, node: count_waits(filler.forest, node, rows),
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
        part.side.root.children.pop(OUTSIDE, None)
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
