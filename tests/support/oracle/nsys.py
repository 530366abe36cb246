"""Reader of Nsight Systems exports: rows in, one tree per process out."""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fxnvtx.categories import COMPILE
from fxnvtx.errors import CaptureError
from fxnvtx.report.capture import nsys
from fxnvtx.report.capture.schema import HOW_TO_RECORD, Schema, damaged, detect, open_capture
from fxnvtx.report.labels import UNKNOWN, Name
from fxnvtx.report.part import WHOLE, Omitted, Part, Window, omitted
from fxnvtx.report.tree import Node, Tree

from .graphs import BEFORE, LEVEL, NO_TABLE, GraphNodes, place
from .ops import COPY, GRAPH, KERNEL, Op, launches, stage, strays
from .overlap import Compute, Shared
from .sweep import OUTSIDE, Sweep

__all__ = ["read_sqlite"]

GAPS = 10  # of the longest idle times
PUSH_POP, START_END = (59, 70), (60, 71)
NO_LAUNCH = Name(UNKNOWN + "no launching call in this recording", "unknown")


def read_sqlite(
    path: Path,
    exact: bool = False,
    tick: Callable[[int], None] | None = None,
    rank: int | None = None,
    shown: Path | None = None,
    window: Window = WHOLE,
) -> list[Part]:
    """One `Part` per process that emitted ranges or did device work.

    exact: keep the running numbers of torch's emit_nvtx in the names. tick: called now and then with the number of
    rows read since the last call. shown: the file that `path` was made from. Raises CaptureError.
    """
    connection = open_capture(path)
    try:
        if tick is not None:
            # while SQLite sorts, no row comes out; this keeps whoever watches informed
            connection.set_progress_handler(lambda: tick(0), 5_000_000)
        with damaged(shown or path):
            schema = detect(connection, shown or path)
            return Reader(connection, schema, shown or path, exact, tick, window).read(rank)
    finally:
        connection.close()


class Reader(nsys.Reader):
    """What rows say is read as ever; which range launched what is found row by row."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        schema: Schema,
        path: Path,
        exact: bool,
        tick: Callable[[int], None] | None,
        window: Window = WHOLE,
    ) -> None:
        super().__init__(connection, schema, path, exact, tick, window)
        self.operations = 0  # device work of all processes

    def read(self, rank: int | None) -> list[Part]:
        pids = self.processes()
        count = self.operations = stage(self.connection, self.schema)
        seen = bytearray(count + 1)
        if self.schema.has_device_work and count and self.schema.runtime is None:
            self.notes.append("the export has no CUDA API calls: device work cannot be put under ranges")
        parts = [self._process(pid, seen) for pid in pids]
        parts = [part for part in parts if part.tree.root.children or part.side.root.children]
        if not parts and not self.has_ranges:
            raise CaptureError(f"{self.path} holds neither NVTX ranges nor work of a device: {HOW_TO_RECORD}")
        if not parts:
            self.notes.append("the capture holds no push/pop range")
            parts = [Part(str(self.path), 0)]
        for index, part in enumerate(parts):
            part.notes = [*self.notes, *part.notes]
            part.rank = rank if rank is not None and len(parts) == 1 else None
            part.index = index
        return parts

    def _process(self, pid: int, seen: bytearray) -> Part:
        part = Part(str(self.path), (pid >> 24) & 0xFFFFFF)
        part.domains = sorted({name for (owner, _), name in self.domains.items() if owner == pid})
        graph = GraphNodes(self.connection, self.schema, pid)
        shared = Shared(self.connection)
        compute = Compute(self.connection)
        filler = _Filler(self, part.tree, graph, shared, compute)
        if graph.captured:
            # first, because the thread that replays may come before the one that captured
            Sweep(Tree(), filler.captured).run(self.spans(pid, PUSH_POP), graph.points())
        sweep = Sweep(part.tree, filler.launch, compute.watch, gpu=self.operations > 0)
        left_out = self._omitted(pid)
        part.notes.extend(left_out.notes)
        sweep.run(
            left_out.without(self.spans(pid, PUSH_POP)),
            left_out.without(launches(self.connection, self.schema, pid, seen)),
        )
        for op in strays(self.connection, pid, seen):
            filler.add(part.tree.child(part.tree.root, NO_LAUNCH), op)
        shared.settle()
        compute.settle(pid if self.schema.kernel else None)
        part.tree.total()
        part.has_gpu = filler.count > 0
        part.device_calls = self.operations > 0
        part.operations = filler.count
        part.gaps = filler.longest_gaps()
        if sweep.crossing:
            part.notes.append(f"{sweep.crossing:,} ranges cross another one instead of lying inside it")
        self._side(part, pid)
        return part

    def _omitted(self, pid: int) -> Omitted:
        window = self.window
        some = any(owner[0] == pid and name == COMPILE for owner, name in self.categories.items())
        if not some and not window.compiling:
            window = replace(window, compiling=True)  # nothing was: saves a pass over the ranges
        return omitted(lambda: self.spans(pid, PUSH_POP), window)

    def _side(self, part: Part, pid: int) -> None:
        """Start/end ranges: they nest in nothing, so they get a tree of their own that no total counts."""
        if next(self.spans(pid, START_END), None) is None:
            return
        again = bytearray(int(self.connection.execute("SELECT count(*) FROM temp.fx_op").fetchone()[0]) + 1)
        filler = _Filler(self, part.side, None, None, None)
        Sweep(part.side, filler.launch, gpu=self.operations > 0).run(
            self.spans(pid, START_END), launches(self.connection, self.schema, pid, again)
        )
        part.side.root.children.pop(OUTSIDE, None)
        part.side.total()


class _Filler:
    """Puts operations on tree nodes."""

    def __init__(
        self,
        reader: Reader,
        tree: Tree,
        graph: GraphNodes | None,
        shared: Shared | None,
        compute: Compute | None,
    ) -> None:
        self.reader = reader
        self.tree = tree
        self.graph = graph
        self.shared = shared
        self.compute = compute
        self.count = 0
        self.gaps: list[tuple[int, int, int, Node, int, int]] = []  # a heap
        self.least_gap = 0
        self.where: dict[int, Node] = {}  # captured graph node -> the range it was captured in
        self.placed: dict[tuple[int, int], Node] = {}  # (launching node, captured graph node) -> where it counts
        self.names: dict[tuple[int, int], str] = {}

    def captured(self, node: Node, both: Node | None, what: int) -> None:
        """A call made a graph node while its graph was captured: remember the range around it."""
        self.where[what] = node

    def launch(self, node: Node, both: Node | None, what: list[Op]) -> tuple[int, int, int] | None:
        """Count what a call launched for the range around it."""
        first = last = None
        time = 0
        for op in what:
            time += op[8]
            if op[6] is not None and self.graph is not None:
                self._replayed(node, op)
            elif op[3] == GRAPH and self.graph is not None:
                self.add(self.tree.child(node, LEVEL), op)
            else:
                self.add(node, op)
            if both is not None:
                both.gap_self += op[9]
                if op[9] > self.least_gap:
                    self._gap(op, both)
            both = node  # within one launch, the launch's own range holds them all
            if first is None or op[1] < first:
                first = op[1]
            if last is None or op[2] > last:
                last = op[2]
        return (first, last, time)  # type: ignore[return-value]

    def _gap(self, op: Op, both: Node) -> None:
        """Keep the longest times that the device was idle, each with the range around it and what ended it."""
        if len(self.gaps) == GAPS:
            heapq.heappop(self.gaps)
        heapq.heappush(self.gaps, (op[9], op[1], op[0], both, op[3], op[4]))
        if len(self.gaps) == GAPS:
            self.least_gap = self.gaps[0][0]

    def longest_gaps(self) -> list[tuple[int, int, str, str]]:
        """(length, end, text of the range around, operation that ended it), the longest first."""
        return [
            (idle, end, both.name.text or "no range", self.reader.operation(kind, key))
            for idle, end, _, both, kind, key in sorted(self.gaps, reverse=True, key=lambda gap: gap[:3])
        ]

    def add(self, node: Node, op: Op) -> None:
        """Count one operation for one node."""
        self.count += 1
        _row, start, end, kind, key, device, _node, size, credit, _idle, overlapping = op
        node.gpu_sum += end - start
        node.gpu_self += credit
        if kind in (KERNEL, GRAPH):
            node.kernels += 1
        else:
            node.copies += 1
            node.copied_bytes += size
        name = self.names.get((kind, key))
        if name is None:
            name = self.names[kind, key] = self.reader.operation(kind, key)
        node.add_op(name, 1, end - start, credit)
        if overlapping and self.shared is not None:
            self.shared.add(device, start, end, credit, node)
        if kind == COPY and self.compute is not None:
            self.compute.copy(node, start, end)

    def _replayed(self, node: Node, op: Op) -> None:
        assert self.graph is not None
        origin = self.graph.origin.get(op[6])  # type: ignore[arg-type]
        if origin is None:
            self.add(self.tree.child(node, BEFORE if self.graph.known else NO_TABLE), op)
            return
        key = (id(node), origin)
        target = self.placed.get(key)
        if target is None:
            target = self.placed[key] = place(self.tree, node, self.where.get(origin), BEFORE)
        self.add(target, op)
