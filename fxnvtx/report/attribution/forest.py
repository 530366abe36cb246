"""Counters per path: a `Tree` whose nodes have numbers, and arrays by those numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..capture.schema import GRAPH, KERNEL
from ..labels import Name
from ..tree import FROM_DEVICE, Node, Tree
from .batches import Ints
from .intern import Interner, Sums, grown
from .lengths import Lengths, Ongoing
from .names import Numbered

__all__ = ["ROOT", "Forest"]

ROOT = 0
LATEST, EARLIEST = np.iinfo(np.int64).max, np.iinfo(np.int64).min

# the counters of tree.Node that are kept as sums; gpu_sum and gpu_self come with the operations
_COUNTERS = (
    "calls",
    "cpu",
    "cpu_self",
    "open",
    "payload",
    "launches",
    "proj",
    "proj_calls",
    "kernels",
    "copies",
    "copied_bytes",
    "gpu_shared",
    "gap_self",
    "resident",
    "overlap",
    *FROM_DEVICE,
)


class Forest:
    """One tree being filled. Numbers of nodes are places in `nodes`, parents before children; ROOT is the root's.

    sums: counters by the names that `tree.Node` has for them. shortest, longest: of a node's calls. first: of its
    ranges. device: the distributions over calls are of device time.
    """

    def __init__(self, tree: Tree, names: Numbered, device: bool = False) -> None:
        self.tree = tree
        self.device = device
        self.names = names
        self.nodes: list[Node] = [tree.root]
        self.parents: list[int] = [-1]
        self.depths: list[int] = [0]
        self.in_module: list[bool] = [False]  # a module's range, or inside one
        self.residency: list[int] = [-1]  # the innermost residency range, itself included
        self.has_residency = False
        self.sums = {name: Sums() for name in _COUNTERS}
        self.shortest = np.empty(0, np.int64)
        self.longest = np.empty(0, np.int64)
        self.first = np.empty(0, np.int64)
        self.called = np.empty(0, np.bool_)
        self._peaks = np.empty(0, np.int64)
        self._fresh = np.empty(0, np.int64)  # nodes whose first ranges came last
        self._numbers: dict[int, int] = {id(tree.root): ROOT}
        self._below = Interner(lambda key: self.below(key >> 32, names.names[key & 0xFFFFFFFF]))
        self._ongoing = (Ongoing(), Ongoing())  # on the CPU, on the device
        self._each = Lengths()
        self._op_pairs = Interner()
        self._op_sums = (Sums(), Sums(), Sums())
        self.operations = 0

    # ------------------------------------------------------------------------------------------ paths

    def number(self, node: Node) -> int:
        """The number of a node of this tree."""
        found = self._numbers.get(id(node))
        if found is None:
            assert node.parent is not None
            known = self._numbers.get(id(node.parent))
            above = self.number(node.parent) if known is None else known
            found = self._numbers[id(node)] = len(self.nodes)
            category = node.name.category
            self.nodes.append(node)
            self.parents.append(above)
            self.depths.append(self.depths[above] + 1)
            self.in_module.append(category == "module" or self.in_module[above])
            self.residency.append(found if category == "residency" else self.residency[above])
            self.has_residency = self.has_residency or category == "residency"
        return found

    def below(self, parent: int, name: Name) -> int:
        """The number of a node's child."""
        return self.number(self.tree.child(self.nodes[parent], name))

    def has_room(self, rows: int) -> bool:
        """Whether so many more paths would all be kept: `paths` may not be asked where they would not."""
        return self.tree.size + rows <= self.tree.limit

    def paths(self, parents: Ints, names: Ints) -> Ints:
        """The numbers of children by the numbers of parents and names."""
        return self._below((parents << 32) | names)

    # ------------------------------------------------------------------------------------------ counting

    def count_ranges(
        self, node: Ints, start: Ints, end: Ints, is_open: NDArray[np.bool_], piece: NDArray[np.bool_]
    ) -> None:
        """Ranges with all but their self time."""
        self._fresh = node[:0]
        if not len(node):
            return
        size = len(self.nodes)
        self.shortest = grown(self.shortest, size, LATEST)
        self.longest = grown(self.longest, size, EARLIEST)
        self.first = grown(self.first, size)
        self.called = grown(self.called, size)
        length = end - start
        new = ~self.called[node]
        self._fresh = node[new]
        if new.any():
            # the last one to be written is the earliest
            self.first[node[new][::-1]] = start[new][::-1]
            self.called[node[new]] = True
        self.sums["calls"].count(node[~piece])
        self.sums["cpu"].add(node, length)
        self.sums["cpu_self"].add(node, length)
        if is_open.any():
            self.sums["open"].count(node[is_open])
        self._over(*(self._ongoing[0].feed(node, length, piece) if self.names.has_pieces else (node, length)))

    def _over(self, node: Ints, length: Ints) -> None:
        """Calls that took so long in all."""
        np.minimum.at(self.shortest, node, length)
        np.maximum.at(self.longest, node, length)
        if not self.device:
            self._each.add(node, length)

    def count_device_time(self, node: Ints, time: Ints, piece: NDArray[np.bool_]) -> None:
        """Ranges that ended, in that order, with the device time of what they launched."""
        if self.device and len(node):
            self._each.add(*(self._ongoing[1].feed(node, time, piece) if self.names.has_pieces else (node, time)))

    def started(self, node: int) -> int | None:
        """When a node's first range started, as far as they were counted."""
        known = self.nodes[node].first
        return int(self.first[node]) if known is None and node < len(self.called) and self.called[node] else known

    def starts_after(self, moment: int) -> Callable[[Node], bool]:
        """Whether a node's first range starts after this moment of the window that was counted last."""
        fresh = {number for number in self._fresh.tolist() if self.first[number] > moment}
        return lambda node: self._numbers[id(node)] in fresh

    def count_operations(self, node: Ints, rows: dict[str, NDArray[np.int64]], kind: Ints) -> None:
        """Operations, each for the node that is given for it."""
        if not len(node):
            return
        self.operations += len(node)
        length, credit = rows["end"] - rows["start"], rows["credit"]
        kernels = (kind == KERNEL) | (kind == GRAPH)
        self.sums["kernels"].count(node[kernels])
        if not kernels.all():
            copies = ~kernels
            self.sums["copies"].count(node[copies])
            self.sums["copied_bytes"].add(node[copies], rows["size"][copies])
        pairs = self._op_pairs((node << 32) | rows["name"])
        for sums, values in zip(self._op_sums, (None, length, credit), strict=True):
            if values is None:
                sums.count(pairs)
            else:
                sums.add(pairs, values)

    def count_peaks(self, node: Ints, used: Ints) -> None:
        """So many bytes were allocated when an allocation was made in each node."""
        self._peaks = grown(self._peaks, len(self.nodes), EARLIEST)
        np.maximum.at(self._peaks, node, used)

    # ------------------------------------------------------------------------------------------ the end

    def fill(self, operation: Callable[[int], str]) -> None:
        """Write all counters into the tree. operation: the name of an operation by its number."""
        size = len(self.nodes)
        node_numbers, rest = self._ongoing[0].rest()
        self._over(node_numbers, rest)
        self._each.add(*self._ongoing[1].rest())
        for number, each in self._each.found().items():
            self.nodes[number].each = each
        counts, lengths, credits = (sums.tolist(len(self._op_pairs)) for sums in self._op_sums)
        spelled: dict[int, str] = {}
        for pair, count, length, credit in zip(self._op_pairs.keys(), counts, lengths, credits, strict=True):
            node, number = self.nodes[pair >> 32], pair & 0xFFFFFFFF
            name = spelled.get(number)
            if name is None:
                name = spelled[number] = operation(number)
            node.add_op(name, count, length, credit)
            node.gpu_sum += length
            node.gpu_self += credit
        for number in np.flatnonzero(self._peaks > EARLIEST).tolist():
            self.nodes[number].peak = int(self._peaks[number])
        for counter, sums in self.sums.items():
            if sums.empty:
                continue
            for node, value in zip(self.nodes, sums.tolist(size), strict=True):
                if value:
                    setattr(node, counter, getattr(node, counter) + value)
        for number in np.flatnonzero(self.called).tolist():
            node = self.nodes[number]
            if node.first is None:
                node.first = int(self.first[number])
            node.cpu_min, node.cpu_max = int(self.shortest[number]), int(self.longest[number])
