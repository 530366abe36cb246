"""Kernels of replayed CUDA graphs: back through the clones to the call that was captured."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..capture.schema import Schema
from .batches import Ints, Source
from .device import PROCESS

__all__ = ["GraphNodes", "Origins", "origins"]


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
