"""How long single calls took, where a call may come in pieces, and their distribution per path (pure)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..tree import Calls
from .batches import Ints
from .intern import Interner, Sums, grown

__all__ = ["Lengths", "Ongoing", "buckets"]


def buckets(values: Ints) -> Ints:
    """What `calls.added` puts each value into."""
    size = np.abs(values)
    bits = np.frexp(size.astype(np.float64))[1].astype(np.int64)
    # a float64 may round up to the next power of two
    bits -= (bits > 0) & ((np.int64(1) << np.maximum(bits - 1, 0)) > size)
    shift = np.maximum(bits - 5, 0)
    return (shift << 5) + (values >> shift)


class Lengths:
    """The distribution of the lengths of a node's calls."""

    def __init__(self) -> None:
        self._pairs = Interner()
        self._counts = Sums()
        self._totals = Sums()

    def add(self, node: Ints, length: Ints) -> None:
        pairs = self._pairs((node << 32) | (buckets(length) & 0xFFFFFFFF))
        self._counts.count(pairs)
        self._totals.add(pairs, length)

    def found(self) -> dict[int, Calls]:
        """By the number of the node."""
        size = len(self._pairs)
        entries: dict[int, dict[int, list[int]]] = {}
        for pair, count, total in zip(
            self._pairs.keys(), self._counts.tolist(size), self._totals.tolist(size), strict=True
        ):
            bucket = pair & 0xFFFFFFFF
            entries.setdefault(pair >> 32, {})[bucket - (bucket >> 31 << 32)] = [count, total]
        return {node: _calls(entry) for node, entry in entries.items()}


def _calls(entry: dict[int, list[int]]) -> Calls:
    if len(entry) == 1:
        ((count, total),) = entry.values()
        if count == 1:
            return total
    return entry


class Ongoing:
    """Each node's latest call, which later pieces may still make longer."""

    def __init__(self) -> None:
        self._length = np.empty(0, np.int64)
        self._some = np.empty(0, np.bool_)

    def feed(self, node: Ints, length: Ints, piece: NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """Ranges in order, each a call or one more piece of its node's latest: the calls that are over by that."""
        if not len(node):
            return node, length
        order = np.argsort(node, kind="stable")
        node, length, piece = node[order], length[order], piece[order]
        self._length = grown(self._length, int(node[-1]) + 1)
        self._some = grown(self._some, int(node[-1]) + 1)
        new_node = np.append(True, node[1:] != node[:-1])
        begins = np.flatnonzero(new_node | ~piece)
        owner, total = node[begins], np.add.reduceat(length, begins)
        first, goes_on = new_node[begins], piece[begins]
        before = first & self._some[owner]
        over_node, over_length = owner[before & ~goes_on], self._length[owner[before & ~goes_on]]
        total += np.where(before & goes_on, self._length[owner], 0)
        last = np.append(first[1:], True)
        self._length[owner[last]], self._some[owner[last]] = total[last], True
        return np.append(over_node, owner[~last]), np.append(over_length, total[~last])

    def rest(self) -> tuple[Ints, Ints]:
        """The calls that were not over; they are now."""
        node = np.flatnonzero(self._some)
        self._some[:] = False
        return node, self._length[node]
