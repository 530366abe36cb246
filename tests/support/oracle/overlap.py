"""Intervals that overlap: unions of device work per range, and residency work hidden behind compute."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from itertools import count

from fxnvtx.report.tree import Node

from .spill import Spill

__all__ = ["Compute", "Shared", "covered", "union"]

_number = count()


def union(intervals: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Merge intervals that come sorted by start."""
    held: tuple[int, int] | None = None
    for start, end in intervals:
        if held is None:
            held = (start, end)
        elif start <= held[1]:
            if end > held[1]:
                held = (held[0], end)
        else:
            yield held
            held = (start, end)
    if held is not None:
        yield held


def covered(wanted: Iterable[tuple[int, int, int]], cover: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """For every (start, end, key) sorted by start: (key, how much of it the cover covers), as they end.

    The cover is disjoint and sorted. Only the intervals open at one time are held.
    """
    pieces = iter(cover)
    piece = next(pieces, None)
    recent: list[tuple[int, int]] = []  # pieces that a later, longer interval may still need
    for start, end, key in wanted:
        recent = [item for item in recent if item[1] > start]
        while piece is not None and piece[0] < end:
            if piece[1] > start:
                recent.append(piece)
            piece = next(pieces, None)
        yield key, sum(max(0, min(end, item[1]) - max(start, item[0])) for item in recent)


class Shared:
    """Operations that overlap others on their device: every range's own union, where it is more than its credit."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._rows = Spill(connection, f"fx_shared_{next(_number)}", ("device", "start", "end", "credit", "node"))
        self._index: dict[int, int] = {}
        self._nodes: list[Node] = []

    def add(self, device: int, start: int, end: int, credit: int, node: Node) -> None:
        index = self._index.get(id(node))
        if index is None:
            index = self._index[id(node)] = len(self._nodes)
            self._nodes.append(node)
        self._rows.add((device, start, end, credit, index))

    def settle(self) -> None:
        """Set gpu_shared of every node concerned."""
        reach: dict[int, int] = {}
        device_now: int | None = None
        lines: dict[int, list[Node]] = {}
        for device, start, end, credit, index in self._rows.sorted_by("device", "start", '"end"'):
            if device != device_now:
                device_now, reach = device, {}
            line = lines.get(index)
            if line is None:
                node: Node | None = self._nodes[index]
                line = lines[index] = []
                while node is not None:
                    line.append(node)
                    node = node.parent
            for node in line:
                until = reach.get(id(node), start)
                own = end - (start if start > until else until)
                if own > 0:
                    reach[id(node)] = end
                    node.gpu_shared += own
                node.gpu_shared -= credit
        self._rows.drop()


class Compute:
    """How much of the residency work passed while something computed."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        number = next(_number)
        self._moves = Spill(connection, f"fx_moves_{number}", ("thread", "start", "end", "node"))
        self._modules = Spill(connection, f"fx_modules_{number}", ("thread", "start", "end"))
        self._nodes: list[Node] = []
        self._index: dict[int, int] = {}

    def watch(self, node: Node, thread: int, start: int, end: int) -> None:
        if node.name.category == "residency":
            self._moves.add((thread, start, end, self._place(node)))
        else:
            self._modules.add((thread, start, end))

    def copy(self, node: Node, start: int, end: int) -> None:
        """A copy on the device: residency work where a residency range launched it."""
        at: Node | None = node
        while at is not None:
            if at.name.category == "residency":
                self._moves.add((-1, start, end, self._place(at)))
                return
            at = at.parent

    def _place(self, node: Node) -> int:
        index = self._index.get(id(node))
        if index is None:
            index = self._index[id(node)] = len(self._nodes)
            self._nodes.append(node)
        return index

    def settle(self, pid: int | None) -> None:
        """Set resident and overlap; pid: whose kernels compute, None: modules on other threads do."""
        kernels = False
        if pid is not None:
            row = self._connection.execute(
                "SELECT 1 FROM temp.fx_op WHERE pid = ? AND kind IN (0, 3) LIMIT 1", (pid,)
            ).fetchone()
            kernels = row is not None
        kernel_times: list[sqlite3.Cursor] = []
        for thread in self._moves.distinct("thread"):
            rows = self._moves.sorted_by("start", where="WHERE thread = ?", values=(thread,))
            moves = ((start, end, node) for _thread, start, end, node in rows)
            if kernels:
                cursor = self._connection.execute(
                    "SELECT start, end FROM temp.fx_op WHERE pid = ? AND kind IN (0, 3) ORDER BY start", (pid,)
                )
                kernel_times.append(cursor)
                compute: Iterable[tuple[int, int]] = cursor
            else:
                others = self._modules.sorted_by("start", where="WHERE thread != ?", values=(thread,))
                compute = ((start, end) for _thread, start, end in others)
            self._settle_one(moves, compute)
        for cursor in kernel_times:
            cursor.close()
        self._modules.stop_reading()
        self._moves.drop()
        self._modules.drop()

    def _settle_one(self, moves: Iterable[tuple[int, int, int]], compute: Iterable[tuple[int, int]]) -> None:
        def measured() -> Iterator[tuple[int, int, int]]:
            for start, end, index in moves:
                self._nodes[index].resident += end - start
                yield start, end, index

        for index, hidden in covered(measured(), union(compute)):
            self._nodes[index].overlap += hidden
