"""The one tree that every reader fills and every view reads: ranges aggregated by path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import add, attrgetter
from typing import Any

from .calls import Calls, merged
from .labels import UNKNOWN, Name

__all__ = ["FROM_DEVICE", "FROM_WORK", "MAX_NODES", "NOTHING", "Node", "Tree", "merge_into"]

MAX_NODES = 500_000  # distinct paths kept per process; a capture with more says so in a row of its own
_OVERFLOW = Name(UNKNOWN + f"more than {MAX_NODES:,} distinct ranges", "unknown")

# What the device had to do with a range besides running its operations, and how its work compares with the device's
# peaks. Each adds up, over two nodes that become one and over all below a node.
FROM_DEVICE = (
    "queued",
    "launching",
    "waited",
    "communication",
    "communication_hidden",
    "copying",
    "copying_hidden",
    "allocated",
    "released",
)
FROM_WORK = ("flops", "moved", "roof", "roof_compute", "rated", "unrated", "roofless")

# counters that add up when two nodes become one
SUMS = (
    "calls",
    "cpu",
    "cpu_self",
    "open",
    "launches",
    "kernels",
    "copies",
    "copied_bytes",
    "gpu_sum",
    "gpu_self",
    "gpu_shared",
    "gap_self",
    "proj",
    "proj_calls",
    "overlap",
    "resident",
    "payload",
    *FROM_DEVICE,
    *FROM_WORK,
)

# self counters whose sums over a node and all below it are wanted, in the order of Node.below
BELOW = (
    "gpu_sum",
    "kernels",
    "copies",
    "copied_bytes",
    "resident",
    "overlap",
    *FROM_DEVICE,
    *FROM_WORK,
)
NOTHING = (0,) * len(BELOW)  # Node.below of a node that holds none of them
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
    flops, moved: operations and bytes of the range's own work. rated, unrated: its own time, where its work is known
    and where it is not. roof: how long the work would take at the device's peaks, roof_compute: of that, of ranges that
    computing limits and not memory. roofless: of rated, where no peak is known. See roof.py, which fills these.
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
        "kids",
        "name",
        "ops",
        "parent",
        "peak",
    )

    def __init__(self, name: Name, parent: Node | None) -> None:
        self.name = name
        self.parent = parent
        self.kids: dict[Name, Node] = {}
        # the counters of SUMS
        self.calls = self.cpu = self.cpu_self = self.open = self.launches = 0
        self.kernels = self.copies = self.copied_bytes = 0
        self.gpu_sum = self.gpu_self = self.gpu_shared = self.gap_self = self.proj = self.proj_calls = 0
        self.overlap = self.resident = self.payload = 0
        self.queued = self.launching = self.waited = self.allocated = self.released = 0
        self.communication = self.communication_hidden = self.copying = self.copying_hidden = 0
        self.peak: int | None = None
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

    def ordered(self) -> list[Node]:
        """The children by first start; rows that hold what could not be attributed last."""
        return sorted(self.kids.values(), key=_order)

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
        node = parent.kids.get(name)
        if node is None:
            if self.size >= self.limit:
                name = _OVERFLOW
                if parent.name == _OVERFLOW:
                    return parent
                node = parent.kids.get(name)
                if node is not None:
                    return node
            node = Node(name, parent)
            parent.kids[name] = node
            self.size += 1
        return node

    def total(self) -> None:
        """Fill `gpu` and `gap` of every node from the self times below it, and the root's sums."""
        total(self.root)


def total(root: Node) -> None:
    """Fill `gpu`, `gap` and `below` of every node below and including `root`."""
    order = list(root.walk())
    for node in reversed(order):
        gpu, gap = node.gpu_self, node.gap_self
        below = _below_of(node)
        for kid in node.kids.values():
            gpu += kid.gpu
            gap += kid.gap
            if kid.below != NOTHING:
                below = tuple(map(add, below, kid.below))
            if kid.peak is not None and (node.peak is None or kid.peak > node.peak):
                node.peak = kid.peak
        node.gpu, node.gap, node.below = gpu, gap, below
    for node in order:
        node.gpu += node.gpu_shared
    root.cpu = sum(kid.cpu for kid in root.kids.values())


def merge_into(target: Node, source: Node, rename: Callable[[Node], Name] | None = None) -> None:
    """Add `source` with all below it to `target`, node by node; `rename` may make several one."""
    todo = [(target, source)]
    while todo:
        into, node = todo.pop()
        absorb(into, node)
        for kid in node.ordered():
            name = rename(kid) if rename else kid.name
            mate = into.kids.get(name)
            if mate is None:
                mate = into.kids[name] = Node(name, into)
            todo.append((mate, kid))


def absorb(into: Node, node: Node) -> None:
    """Add the counters of one node to another."""
    for field, value in zip(SUMS, _sums_of(node), strict=True):
        if value:
            setattr(into, field, getattr(into, field) + value)
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


_STATE = (*SUMS, "below", "cpu_max", "cpu_min", "each", "first", "flags", "gap", "gpu", "ops", "peak")


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
            parent.kids[node.name] = node
        nodes.append(node)
    return nodes[0]
