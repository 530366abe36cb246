"""Reader of Nsight Systems exports: rows in, one tree per process out."""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fxnvtx.categories import COMPILE, MODULE
from fxnvtx.categories import PIECE as PIECE_CATEGORY
from fxnvtx.errors import CaptureError
from fxnvtx.report.labels import UNKNOWN, Name, clean, infer_category, numbered
from fxnvtx.report.part import Part
from fxnvtx.report.schema import HOW_TO_RECORD, Schema, damaged, detect, open_capture
from fxnvtx.report.tree import Node, Tree
from fxnvtx.report.window import WHOLE, Omitted, Window, omitted

from .graphs import BEFORE, LEVEL, NO_TABLE, GraphNodes, place
from .ops import COPY, GRAPH, KERNEL, PROCESS, Op, launches, stage, strays
from .overlap import Compute, Shared
from .sweep import OUTSIDE, PIECE, Span, Sweep

__all__ = ["read_sqlite"]

GAPS = 10  # of the longest idle times
PUSH_POP, START_END = (59, 70), (60, 71)
NO_LAUNCH = Name(UNKNOWN + "no launching call in this recording", "unknown")
CROSS_THREAD = "ranges that end on another thread than they began on were left out"


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


class Reader:
    def __init__(
        self,
        connection: sqlite3.Connection,
        schema: Schema,
        path: Path,
        exact: bool,
        tick: Callable[[int], None] | None,
        window: Window = WHOLE,
    ) -> None:
        self.connection = connection
        self.schema = schema
        self.path = path
        self.exact = exact
        self.window = window
        self.tick = tick
        self.notes: list[str] = list(schema.notes)
        self.texts: dict[int, str] = {}
        assert schema.nvtx is not None
        self.nvtx = schema.nvtx
        self.has_ranges = schema.nvtx.name in schema.tables  # a table of them, be it empty
        self.has_strings = schema.strings is not None
        self.copy_names = self._enum("ENUM_CUDA_MEMCPY_OPER")
        self.domains, self.categories = self._registered()
        self.operations = 0  # device work of all processes
        self.last = 0  # the last moment of any range
        self.aside: dict[int, int] = {}  # process -> number of start/end ranges

    def read(self, rank: int | None) -> list[Part]:
        pids = self.processes()
        count = self.operations = stage(self.connection, self.schema)
        seen = bytearray(count + 1)
        if self.schema.has_device_work and count and self.schema.runtime is None:
            self.notes.append("the export has no CUDA API calls: device work cannot be put under ranges")
        parts = [self._process(pid, seen) for pid in pids]
        parts = [part for part in parts if part.tree.root.kids or part.side.root.kids]
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

    # ------------------------------------------------------------------------------------------ small tables

    def _enum(self, table: str) -> dict[int, str]:
        try:
            return dict(self.connection.execute(f"SELECT id, label FROM {table}").fetchall())
        except sqlite3.OperationalError:
            return {}

    def text(self, key: int) -> str:
        text = self.texts.get(key)
        if text is None:
            row = None
            if self.has_strings:
                row = self.connection.execute("SELECT value FROM StringIds WHERE id = ?", (key,)).fetchone()
            text = self.texts[key] = str(row[0]) if row else f"(text {key} is missing)"
        return text

    def _registered(self) -> tuple[dict[tuple[int, int], str], dict[tuple[int, int, int], str]]:
        """Names of domains by (process, domain), and of categories by (process, domain, category)."""
        nvtx = self.nvtx
        domains: dict[tuple[int, int], str] = {}
        categories: dict[tuple[int, int, int], str] = {}
        for kind, tid, domain, category, text, key in self.connection.execute(
            f"SELECT eventType, globalTid, {nvtx.pick('domainId', default='0')}, {nvtx.pick('category')}, text,"
            f" {nvtx.pick('textId')} FROM {nvtx.sql} WHERE eventType IN (33, 75) ORDER BY start DESC"
        ):
            if tid is None:
                continue
            name = text if text is not None else self.text(key) if key is not None else ""
            pid = tid & ~0xFFFFFF
            if kind == 75:
                domains[pid, domain or 0] = name
            elif category is not None:
                categories[pid, domain or 0, category] = name
        return domains, categories

    def processes(self) -> list[int]:
        """Every process with a range or an operation, and what is wrong with their rows."""
        kinds = ", ".join(map(str, PUSH_POP + START_END))
        other_end = f"{self.nvtx.pick('endGlobalTid')} != globalTid"
        found: set[int] = set()
        lost = 0
        for pid, last, backwards, elsewhere, aside in self.connection.execute(
            f"SELECT globalTid & {PROCESS}, max(max(start), max(coalesce(end, start))), sum(end < start),"
            f" sum(eventType IN ({kinds}) AND {other_end}), sum(eventType IN ({', '.join(map(str, START_END))}))"
            f" FROM {self.nvtx.sql} GROUP BY 1"
        ):
            self.last = max(self.last, last or 0)
            lost += elsewhere or 0
            if backwards:
                self.notes.append(f"{backwards:,} ranges end before they begin and were left out")
            if pid is None:
                self.notes.append("some ranges do not say which thread they are from and were left out")
                continue
            found.add(pid)
            self.aside[pid] = aside
        for table in (self.schema.kernel, self.schema.memcpy, self.schema.memset, self.schema.graph_trace):
            if table is not None:
                found.update(
                    row[0]
                    for row in self.connection.execute(f"SELECT DISTINCT {self.schema.process(table)} FROM {table.sql}")
                    if row[0] is not None
                )
        if lost:
            self.notes.append(f"{lost:,} {CROSS_THREAD}")
        return sorted(found)

    # ------------------------------------------------------------------------------------------ one process

    def spans(self, pid: int, kinds: tuple[int, ...]) -> Iterator[Span]:
        nvtx, exact, last = self.nvtx, self.exact, self.last
        payload = nvtx.pick("int64Value", "uint64Value", "int32Value", "uint32Value")
        rows = self.connection.execute(
            f"SELECT globalTid, start, end, {nvtx.pick('textId')}, text, {nvtx.pick('domainId', default='0')},"
            f" {nvtx.pick('category')}, {payload} FROM {nvtx.sql}"
            f" WHERE eventType IN ({', '.join(map(str, kinds))}) AND globalTid BETWEEN ? AND ?"
            f" AND (end IS NULL OR end >= start)"
            f" AND ({nvtx.pick('endGlobalTid')} IS NULL OR {nvtx.pick('endGlobalTid')} = globalTid)"
            " ORDER BY globalTid, start, coalesce(end, 9223372036854775807) DESC, rowid",
            (pid, pid | 0xFFFFFF),
        )
        names: dict[Any, Name] = {}
        tick = self.tick
        for done, (tid, start, end, key, text, domain, category, value) in enumerate(rows, 1):
            where = (key if key is not None else text, domain, category)
            name = names.get(where)
            if name is None:
                if text is None:
                    text = self.text(key) if key is not None else ""
                name = self._name(pid, text if exact else clean(text), domain or 0, category)
                if len(names) > 200_000:
                    names.clear()  # texts that never repeat
                names[where] = name
            if name[1] == PIECE_CATEGORY:
                name, value = Name(name[0], MODULE, name[2]), PIECE
            elif value is not None and not exact and name[1] in ("step", "request"):
                name = Name(numbered(name[0], name[1], value), name[1], name[2])
            if tick is not None and not done & 0x3FFF:
                tick(0x4000)
            if end is None:
                yield tid, start, max(last, start), name, value, True
            else:
                yield tid, start, end, name, value, False

    def device_work(self, pid: int) -> Iterator[tuple[int, int, int, int, str]]:
        """(device, stream, start, end, name) of every operation, by device, stream and start."""
        sources = []
        for kind, table in enumerate((self.schema.kernel, self.schema.memcpy, self.schema.memset)):
            if table is not None:
                name = (table.pick("demangledName", "shortName"), "copyKind", "0")[kind]
                sources.append(
                    f"SELECT deviceId AS device, {table.pick('streamId', default='0')} AS stream, start, end,"
                    f" {kind} AS kind, {name} AS name FROM {table.sql}"
                    f" WHERE {self.schema.process(table)} = {pid} AND end >= start"
                )
        if not sources:
            return
        names: dict[tuple[int, int], str] = {}
        for device, stream, start, end, kind, key in self.connection.execute(
            " UNION ALL ".join(sources) + " ORDER BY device, stream, start"
        ):
            if (kind, key) not in names:
                names[kind, key] = self.operation(kind, key)
            yield device, stream, start, end, names[kind, key]

    def operation(self, kind: int, key: int) -> str:
        """What an operation is called: the kernel's name, or the kind of copy."""
        if kind == KERNEL:
            return self.text(key)
        if kind == COPY:
            return f"[memcpy {self.copy_names.get(key, key)}]"
        return "[memset]" if kind != GRAPH else f"[CUDA graph {key}]"

    def _name(self, pid: int, text: str, domain: int, category: int | None) -> Name:
        spelled = self.domains.get((pid, domain), "")
        named = self.categories.get((pid, domain, category)) if category is not None else None
        return Name(text, named or infer_category(text), "" if spelled == "fxnvtx" else spelled)

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
        if not self.aside.get(pid):
            return
        again = bytearray(int(self.connection.execute("SELECT count(*) FROM temp.fx_op").fetchone()[0]) + 1)
        filler = _Filler(self, part.side, None, None, None)
        Sweep(part.side, filler.launch, gpu=self.operations > 0).run(
            self.spans(pid, START_END), launches(self.connection, self.schema, pid, again)
        )
        part.side.root.kids.pop(OUTSIDE, None)
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
