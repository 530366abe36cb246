"""The one tree that every reader fills and every view reads: ranges aggregated by path, and how long their calls took.

A distribution of calls is None (no calls), a number (one call), or {bucket: [calls, sum]}. Buckets keep five
significant bits, so a median or a percentile is off by at most 3 %, and is exact where the calls of its bucket took
equally long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import add, attrgetter
from typing import Any

from .labels import UNKNOWN, Name

__all__ = [
    "FROM_DEVICE",
    "FROM_WORK",
    "MAX_NODES",
    "NOTHING",
    "Calls",
    "Node",
    "Spread",
    "Tree",
    "added",
    "copied",
    "merge_into",
    "merged",
    "spread_of",
]


Calls = int | dict[int, list[int]] | None


@dataclass
class Spread:
    """Of single calls, in ns. middle: the median; most: the 99th percentile."""

    count: int
    low: int
    middle: int
    most: int
    high: int


def added(calls: Calls, value: int) -> Calls:
    """The distribution with one more call; may change the one given."""
    if calls is None:
        return value
    if type(calls) is int:
        calls = {_bucket(calls): [1, calls]}
    assert type(calls) is dict
    entry = calls.get(_bucket(value))
    if entry is None:
        calls[_bucket(value)] = [1, value]
    else:
        entry[0] += 1
        entry[1] += value
    return calls


def merged(into: Calls, other: Calls) -> Calls:
    """Both together; may change the first, never the second."""
    if other is None:
        return into
    if type(other) is int:
        return added(into, other)
    assert type(other) is dict
    if into is None:
        return copied(other)
    if type(into) is int:
        return added(copied(other), into)
    assert type(into) is dict
    for bucket, (count, total) in other.items():
        entry = into.get(bucket)
        if entry is None:
            into[bucket] = [count, total]
        else:
            entry[0] += count
            entry[1] += total
    return into


def copied(calls: Calls) -> Calls:
    return {bucket: list(entry) for bucket, entry in calls.items()} if type(calls) is dict else calls


def spread_of(calls: Calls, low: int | None = None, high: int | None = None) -> Spread | None:
    """The figures of a distribution; `low` and `high` where they are known exactly."""
    if calls is None:
        return None
    if type(calls) is int:
        return Spread(1, calls, calls, calls, calls)
    assert type(calls) is dict
    entries = [calls[bucket] for bucket in sorted(calls)]
    count = sum(number for number, _ in entries)
    least, greatest = _mean(entries[0]), _mean(entries[-1])
    return Spread(
        count,
        least if low is None else low,
        (_at(entries, (count - 1) // 2) + _at(entries, count // 2)) // 2,
        _at(entries, -(-count * 99 // 100) - 1),
        greatest if high is None else high,
    )


def _bucket(value: int) -> int:
    """Rises with the value."""
    shift = value.bit_length() - 5
    return value if shift <= 0 else (shift << 5) + (value >> shift)


def _mean(entry: Iterable[int]) -> int:
    count, total = entry
    return total // count


def _at(entries: list[list[int]], place: int) -> int:
    for entry in entries:
        if place < entry[0]:
            return _mean(entry)
        place -= entry[0]
    return _mean(entries[-1])


# ------------------------------------------------------------------------------------------------------------ the tree


MAX_NODES = 500_000  # distinct paths kept per process; a capture with more says so in a row of its own
_OVERFLOW = Name(UNKNOWN + f"more than {MAX_NODES:,} distinct ranges", "unknown")

# What the device had to do with a range besides running its operations, and how its work compares with the device's
# peaks. Each adds up, over two nodes that become one and over all below a node.
FROM_DEVICE = (
    "queued", "launching", "waited", "communication", "communication_hidden", "copying", "copying_hidden", "allocated",
    "released",
)  # fmt: skip
FROM_WORK = ("flops", "moved", "roof", "roof_compute", "rated", "unrated", "roofless")

# counters that add up when two nodes become one
SUMS = (
    "calls", "cpu", "cpu_self", "open", "launches", "kernels", "copies", "copied_bytes", "gpu_sum", "gpu_self",
    "gpu_shared", "gap_self", "proj", "proj_calls", "overlap", "resident", "payload", *FROM_DEVICE, *FROM_WORK,
)  # fmt: skip

# self counters whose sums over a node and all below it are wanted, in the order of Node.below
BELOW = ("gpu_sum", "kernels", "copies", "copied_bytes", "resident", "overlap", *FROM_DEVICE, *FROM_WORK)
NOTHING = (0,) * len(BELOW)  # Node.below of a node that holds none of them
_MANY = 4096
_sums_of, _below_of = attrgetter(*SUMS), attrgetter(*BELOW)


class Node:
    """All ranges with one path. Times are nanoseconds.

    calls: of what the range stands for, however many ranges a call took (compiled code opens a module's range several
    times in one call). cpu, cpu_self: their time, their time outside their children. open: how many had no end.
    cpu_min, cpu_max, each: of single calls; `each` is the distribution of device time where the capture has any.
    launches: calls that launched device work, here and below. kernels, copies, copied_bytes: what was launched right
    here (copies: memcpy and memset); ops: the same by name.
    gpu_self: device time of the operations launched right here, each instant counted once per device (for the one
    that started first). gpu_shared: what this node's own union of operations has on top, because parts of it ran under
    other nodes' operations. gpu_sum: plain sum of durations. gap_self: device idle time right before an operation,
    charged to the innermost range holding this launch and the thread's launch before it. proj, proj_calls: first
    operation's start to last one's end, summed over the ranges that launched any. resident, overlap: time of
    residency work, and how much of it passed while kernels (or other threads' modules) ran. payload: sum of integers.
    queued: from the end of a launching call to the start of the first operation it launched, over all such calls.
    launching: time of these calls themselves. waited: time in calls that wait for the device (cuda*Synchronize).
    communication, copying: time of NCCL's and its like's kernels, of copies; *_hidden: how much of it passed while
    other kernels ran on the device. allocated, released: bytes of device memory. peak: the most that was allocated in
    the process at an allocation in here or below (as far as the capture saw allocations), None where there was none.
    replays: how often CUDA graphs ran the range's operations, without a call of its own.
    flops, moved: operations and bytes of the range's own work. rated, unrated: its own time, where its work is known
    and where it is not. roof: how long the work would take at the device's peaks, roof_compute: of that, of ranges that
    computing limits and not memory. roofless: of rated, where no peak is known. work.py fills these.
    """

    __slots__ = (
        *SUMS,
        "below",
        "cpu_max",
        "cpu_min",
        "each",
        "first",
        "flags",
        "gap",
        "gpu",
        "children",
        "name",
        "ops",
        "parent",
        "peak",
        "replays",
    )

    def __init__(self, name: Name, parent: Node | None) -> None:
        self.name = name
        self.parent = parent
        self.children: dict[Name, Node] = {}
        # the counters of SUMS
        self.calls = self.cpu = self.cpu_self = self.open = self.launches = 0
        self.kernels = self.copies = self.copied_bytes = 0
        self.gpu_sum = self.gpu_self = self.gpu_shared = self.gap_self = self.proj = self.proj_calls = 0
        self.overlap = self.resident = self.payload = 0
        self.queued = self.launching = self.waited = self.allocated = self.released = 0
        self.communication = self.communication_hidden = self.copying = self.copying_hidden = 0
        self.peak: int | None = None
        self.replays = 0
        self.flops = self.moved = self.roof = self.roof_compute = self.rated = self.unrated = self.roofless = 0
        self.cpu_min: int | None = None
        self.cpu_max: int | None = None
        self.each: Calls = None
        self.first: int | None = None
        self.ops: dict[str, list[int]] | None = None  # operation name -> [count, sum, gpu_self]
        self.flags: frozenset[str] = frozenset()
        # set by total(): the sums over this node and all below it
        self.gpu = 0
        self.gap = 0
        self.below: tuple[int, ...] = NOTHING

    def path(self) -> tuple[Name, ...]:
        """From the outermost range to this one."""
        found: list[Name] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            found.append(node.name)
            node = node.parent
        return tuple(reversed(found))

    def walk(self) -> Iterator[Node]:
        """This node and all below it, parents first, siblings by their first start."""
        todo = [self]
        while todo:
            node = todo.pop()
            yield node
            todo.extend(reversed(node.ordered()))

    def every(self) -> list[Node]:
        """The same in an order that costs nothing: parents first, and no more."""
        found = [self]
        for node in found:
            found.extend(node.children.values())
        return found

    def ordered(self) -> list[Node]:
        """The children by first start; rows that hold what could not be attributed last."""
        return sorted(self.children.values(), key=_order)

    def add_op(self, name: str, count: int, duration: int, credit: int) -> None:
        if self.ops is None:
            self.ops = {}
        entry = self.ops.get(name)
        if entry is None:
            self.ops[name] = [count, duration, credit]
        else:
            entry[0] += count
            entry[1] += duration
            entry[2] += credit

    def of(self, counter: str) -> int:
        """The sum over this node and all below it of one of BELOW's counters."""
        return self.below[BELOW.index(counter)]

    def is_unknown(self) -> bool:
        return self.name.category == "unknown" or self.name.text.startswith("owner unknown (")

    def __reduce__(self) -> tuple[Any, ...]:
        # a deep tree pickled by recursion would meet Python's limit
        return _unpack, (_pack(self),)


def _order(node: Node) -> tuple[bool, bool, int, str]:
    return node.is_unknown(), node.first is None, node.first or 0, node.name.text


class Tree:
    """A root without a name, and how many nodes hang below it."""

    def __init__(self, limit: int = MAX_NODES) -> None:
        self.root = Node(Name("", ""), None)
        self.size = 0
        self.limit = limit

    def child(self, parent: Node, name: Name) -> Node:
        """The child of this name, made where there is none yet."""
        node = parent.children.get(name)
        if node is None:
            if self.size >= self.limit:
                name = _OVERFLOW
                if parent.name == _OVERFLOW:
                    return parent
                node = parent.children.get(name)
                if node is not None:
                    return node
            node = Node(name, parent)
            parent.children[name] = node
            self.size += 1
        return node

    def total(self) -> None:
        """Fill `gpu` and `gap` of every node from the self times below it, and the root's sums."""
        total(self.root)


def total(root: Node) -> None:
    """Fill `gpu`, `gap` and `below` of every node below and including `root`."""
    order = root.every()
    for node in reversed(order):
        gpu, gap = node.gpu_self, node.gap_self
        below = _below_of(node)
        for child in node.children.values():
            gpu += child.gpu
            gap += child.gap
            if child.below != NOTHING:
                below = tuple(map(add, below, child.below))
            if child.peak is not None and (node.peak is None or child.peak > node.peak):
                node.peak = child.peak
        node.gpu, node.gap, node.below = gpu, gap, below
    for node in order:
        node.gpu += node.gpu_shared
    root.cpu = sum(child.cpu for child in root.children.values())


def merge_into(target: Node, source: Node, rename: Callable[[Node], Name] | None = None) -> None:
    """Add `source` with all below it to `target`, node by node; `rename` may make several one."""
    todo: list[tuple[Node, list[Node]]] = [(target, [source])]
    for into, nodes in todo:
        absorb(into, nodes)
        groups: dict[Name, list[Node]] = {}
        for node in nodes:
            for child in node.children.values():
                groups.setdefault(rename(child) if rename else child.name, []).append(child)
        for name, group in groups.items():
            same = into.children.get(name)
            if same is None:
                same = into.children[name] = Node(name, into)
            todo.append((same, group))


def absorb(into: Node, nodes: list[Node]) -> None:
    """Add the counters of nodes to another."""
    # many at once: their sums are then made without a step of Python for each
    for begin in range(0, len(nodes), _MANY):
        values = map(_sums_of, nodes[begin : begin + _MANY])
        for field, value in zip(SUMS, map(sum, zip(*values, strict=True)), strict=True):
            if value:
                setattr(into, field, getattr(into, field) + value)
    for node in nodes:
        if node.cpu_min is not None and (into.cpu_min is None or node.cpu_min < into.cpu_min):
            into.cpu_min = node.cpu_min
        if node.cpu_max is not None and (into.cpu_max is None or node.cpu_max > into.cpu_max):
            into.cpu_max = node.cpu_max
        if node.first is not None and (into.first is None or node.first < into.first):
            into.first = node.first
        if node.peak is not None and (into.peak is None or node.peak > into.peak):
            into.peak = node.peak
        into.each = merged(into.each, node.each)
        if node.flags:
            into.flags = into.flags | node.flags
        for name, (count, duration, credit) in (node.ops or {}).items():
            into.add_op(name, count, duration, credit)


_STATE = (*SUMS, "below", "cpu_max", "cpu_min", "each", "first", "flags", "gap", "gpu", "ops", "peak", "replays")


def _pack(root: Node) -> list[tuple[Any, ...]]:
    place = {id(root): 0}
    packed: list[tuple[Any, ...]] = []
    for index, node in enumerate(root.walk()):
        place[id(node)] = index
        above = place[id(node.parent)] if index and node.parent is not None else -1
        packed.append((above, tuple(node.name), tuple(getattr(node, field) for field in _STATE)))
    return packed


def _unpack(packed: list[tuple[Any, ...]]) -> Node:
    nodes: list[Node] = []
    for above, name, state in packed:
        parent = nodes[above] if above >= 0 else None
        node = Node(Name(*name), parent)
        for field, value in zip(_STATE, state, strict=True):
            setattr(node, field, value)
        if parent is not None:
            parent.children[node.name] = node
        nodes.append(node)
    return nodes[0]
