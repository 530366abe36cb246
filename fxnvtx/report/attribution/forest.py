"""Counters per path: a `Tree` whose nodes have numbers, and arrays by those numbers; how long single calls took, where
a call may come in pieces, and their distribution per path; and where in the tree a replayed kernel counts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..capture.schema import GRAPH, KERNEL
from ..labels import UNKNOWN, Name
from ..tree import FROM_DEVICE, Calls, Node, Tree
from .batches import Ints
from .names import Interner, Numbered, Sums, grown

__all__ = ["BEFORE", "LEVEL", "NO_TABLE", "ROOT", "Forest", "Lengths", "Ongoing", "buckets", "layers", "place"]


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


# ------------------------------------------------------------------------------------------------ replayed CUDA graphs


BEFORE = Name(UNKNOWN + "the CUDA graph was captured before the recording began", "unknown")
NO_TABLE = Name(
    UNKNOWN + "no CUDA graph nodes in this export (record with --cuda-graph-trace=node)", "unknown"
)  # fmt: skip
LEVEL = Name(UNKNOWN + "graph-level trace (record with --cuda-graph-trace=node)", "unknown")
NO_RANGE = Name(UNKNOWN + "captured outside every range (a warm-up without ranges?)", "unknown")
_STRUCTURE = {"request", "stage", "loop", "step", "compile", "unknown"}


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


def place(
    tree: Tree, launched: Node, captured: Node | None, missing: Name, later: Callable[[Node], bool] = lambda node: False
) -> Node:
    """The node for a replayed kernel: below its launch (which step), at its layer (from the capture). later: whether a
    node is there only because of ranges that come after the launch."""
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
        elif later(below):
            below.flags = frozenset({"replayed"})
            below.first = launched.first
        node = below
    return node


# --------------------------------------------------------------------------------------------------- counters per path


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
