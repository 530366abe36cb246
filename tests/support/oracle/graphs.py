"""Kernels of replayed CUDA graphs: back through the clones to the call that was captured."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from fxnvtx.report.capture.schema import Schema
from fxnvtx.report.labels import UNKNOWN, Name
from fxnvtx.report.tree import Node, Tree

__all__ = ["BEFORE", "LEVEL", "NO_TABLE", "GraphNodes", "layers", "place"]

BEFORE = Name(UNKNOWN + "the CUDA graph was captured before the recording began", "unknown")
NO_TABLE = Name(
    UNKNOWN + "no CUDA graph nodes in this export (record with --cuda-graph-trace=node)", "unknown"
)  # fmt: skip
LEVEL = Name(UNKNOWN + "graph-level trace (record with --cuda-graph-trace=node)", "unknown")
NO_RANGE = Name(UNKNOWN + "captured outside every range (a warm-up without ranges?)", "unknown")
_STRUCTURE = {"request", "stage", "loop", "step", "compile", "unknown"}


class GraphNodes:
    """Of one process: which captured node every replayed node goes back to."""

    def __init__(self, connection: sqlite3.Connection, schema: Schema, pid: int) -> None:
        self.origin: dict[int, int | None] = {}  # replayed node -> captured node; None: not in this recording
        self.captured: dict[int, tuple[int, int]] = {}  # captured node -> thread, start
        self.known = schema.graph_nodes is not None
        used = connection.execute(
            "SELECT DISTINCT node FROM temp.fx_op WHERE pid = ? AND node IS NOT NULL", (pid,)
        ).fetchall()
        if not used or schema.graph_nodes is None:
            self.origin = {node: None for (node,) in used}
            return
        clones: dict[int, int] = {}
        for node, original, start, thread in connection.execute(
            f"SELECT graphNodeId, originalGraphNodeId, start, globalTid FROM {schema.graph_nodes.sql}"
            " WHERE globalTid BETWEEN ? AND ? AND graphNodeId IS NOT NULL ORDER BY start",
            (pid, pid | 0xFFFFFF),
        ):
            if original is not None and original != node:
                clones[node] = original
            elif node not in self.captured:
                self.captured[node] = (thread, start)
        for (node,) in used:
            at, visited = node, {node}
            while at in clones and clones[at] not in visited:
                at = clones[at]
                visited.add(at)
            self.origin[node] = at if at in self.captured and at not in clones else None
        wanted = {origin for origin in self.origin.values() if origin is not None}
        self.captured = {node: place for node, place in self.captured.items() if node in wanted}

    def points(self) -> Iterator[tuple[int, int, int, int]]:
        """(thread, start, end, captured node), by thread and start."""
        for node, (thread, start) in sorted(self.captured.items(), key=lambda item: (item[1], item[0])):
            yield thread, start, start, node


def layers(launched: Node, captured: Node) -> list[Name]:
    """The ranges between a graph's launch and its kernel: what encloses the captured call below the range that
    launches the graph now."""
    path = captured.path()
    texts = [name.text for name in path]
    for name in reversed(launched.path()):
        if name.category not in _STRUCTURE and name.text in texts:
            below = path[len(texts) - 1 - texts[::-1].index(name.text) + 1 :]
            return [part for part in below if part.category not in _STRUCTURE]
    return [part for part in path if part.category not in _STRUCTURE]


def place(tree: Tree, launched: Node, captured: Node | None, missing: Name) -> Node:
    """The node for a replayed kernel: below its launch (which step), at its layer (from the capture)."""
    if captured is None:
        return tree.child(launched, missing)
    names = layers(launched, captured)
    if not names and (captured.parent is None or captured.is_unknown()):
        return tree.child(launched, NO_RANGE)
    node = launched
    for name in names:
        below = node.children.get(name)
        if below is None:
            below = tree.child(node, name)
            below.flags = frozenset({"replayed"})
            below.first = launched.first
        node = below
    return node
