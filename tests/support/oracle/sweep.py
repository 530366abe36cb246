"""One pass over one thread after another: ranges nest, launches fall into them, both end up in a tree (pure).

Nothing is kept per range or per launch, so memory depends on the number of distinct paths only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fxnvtx.report.labels import PIECE, UNKNOWN, Name, Span
from fxnvtx.report.tree import Node, Tree, added

__all__ = ["OUTSIDE", "PIECE", "Point", "Span", "Sweep"]

OUTSIDE = Name(UNKNOWN + "launched outside every range", "unknown")


# thread, start, end of a call that launched device work (or made a CUDA graph node), and what it launched. Sorted by
# thread and start.
Point = tuple[int, int, int, Any]

# one open range: [end, node, how far children cover it, first operation's start, last one's end, launches, parent,
# start, device time, whether it is one more piece of a call]. A list indexed by plain numbers and not an object: this
# is the inner loop.
Open = list[Any]


class Sweep:
    """Feed `run` with the spans and points of one process.

    `launch(node, both, what)` is called for every point: `node` is the innermost range that contains it, `both` the
    innermost one that also contains the thread's launch before it (None for a thread's first). It returns (start, end,
    time that counts) of the operations that were launched, or None where the point is no launch. `gpu`: the
    distribution over calls is one of device time.
    """

    def __init__(
        self,
        tree: Tree,
        launch: Callable[[Node, Node | None, Any], tuple[int, int, int] | None],
        watch: Callable[[Node, int, int, int], None] | None = None,
        gpu: bool = False,
    ) -> None:
        self.tree = tree
        self.launch = launch
        self.watch = watch  # called for residency ranges and outermost module ranges: (node, thread, start, end)
        self.crossing = 0
        self.gpu = gpu
        self.close = _close_with_device if gpu else _close

    def run(self, spans: Iterable[Span], points: Iterable[Point]) -> None:
        tree, root, watch, close, each = self.tree, self.tree.root, self.watch, self.close, not self.gpu
        state = _Thread(self)
        stack = state.stack
        waiting = iter(points)
        point = next(waiting, None)
        for at, start, end, name, payload, is_open in spans:
            while point is not None and (point[1] < start if point[0] == at else point[0] < at):
                state.point(point)
                point = next(waiting, None)
            if at != state.thread:
                state.enter(at)
            while stack and ((top := stack[-1])[0] < start or (top[0] == start and end > start)):
                del stack[-1]
                close(top)
            if state.crossed:
                state.drop_ended(start)
            size = len(stack)
            if size < state.low:
                state.low = size
            if not size:
                above: Open | None = None
                parent: Node = root
            else:
                above = stack[-1]
                if above[0] < end:
                    above = state.container(end)
                parent = root if above is None else above[1]
            node = parent.children.get(name)
            if node is None:
                node = tree.child(parent, name)
            length = end - start
            node.cpu += length
            node.cpu_self += length
            before = cpu_now.get(id(node))
            if payload is PIECE:
                cpu_now[id(node)] = length if before is None else before + length
                if node.first is None:
                    node.first = start
            else:
                node.calls += 1
                cpu_now[id(node)] = length
                if before is not None:
                    end_cpu_call(node, before, each)
                elif node.first is None:
                    node.first = start
            if is_open:
                node.open += 1
            if payload is not None and type(payload) is int:
                node.payload += payload
            if above is not None and end > above[2]:
                parent.cpu_self -= end - (start if start > above[2] else above[2])
                above[2] = end
            stack.append([end, node, start, None, None, 0, above, start, 0, payload is PIECE])
            if watch is not None and (size < state.modules or not state.modules or name[1] == "residency"):
                state.look(watch, node, at, start, end, size)
        while point is not None:
            state.point(point)
            point = next(waiting, None)
        state.enter(None)
        for node in root.walk():
            end_calls(node, self.gpu)


# of the calls that may still go on: their time so far, by the node's identity. Empty when no sweep runs.
cpu_now: dict[int, int] = {}
gpu_now: dict[int, int] = {}


def end_cpu_call(node: Node, length: int, each: bool) -> None:
    """A call that took `length` in all is over."""
    if node.cpu_max is None:
        node.cpu_min = node.cpu_max = length
    elif length > node.cpu_max:
        node.cpu_max = length
    elif length < node.cpu_min:  # type: ignore[operator]
        node.cpu_min = length
    if each:
        node.each = added(node.each, length)


def end_calls(node: Node, gpu: bool) -> None:
    """No call goes on."""
    length, time = cpu_now.pop(id(node), None), gpu_now.pop(id(node), None)
    if length is not None:
        end_cpu_call(node, length, not gpu)
    if time is not None:
        node.each = added(node.each, time)


class _Thread:
    """Where the sweep is: the open ranges of the thread it walks along."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.stack: list[Open] = []
        self.thread: int | None = None
        self.crossed = False
        self.low = -1  # the lowest the stack has been since the thread's last launch; -1: there was none yet
        self.modules = 0  # how deep the stack's outermost module range lies, 0 for none

    def enter(self, thread: int | None) -> None:
        """Leave the thread with all its ranges, and go on with another one."""
        stack = self.stack
        while stack:
            self.sweep.close(stack.pop())
        self.thread, self.low, self.crossed, self.modules = thread, -1, False, 0

    def drop_ended(self, start: int) -> None:
        """Close what ended below something still open, which only crossing ranges do."""
        stack = self.stack
        ended = [entry for entry in stack if entry[0] < start]
        for entry in reversed(ended):
            self.sweep.close(entry)
        if ended:
            stack[:] = [entry for entry in stack if entry[0] >= start]
        self.crossed = bool(stack)

    def container(self, end: int) -> Open | None:
        """The innermost open range that reaches to `end`, where the innermost one of all does not."""
        self.crossed = True
        self.sweep.crossing += 1
        for entry in reversed(self.stack):
            if entry[0] >= end:
                return entry
        return None

    def look(
        self, watch: Callable[[Node, int, int, int], None], node: Node, at: int, start: int, end: int, size: int
    ) -> None:
        """Tell of residency ranges and of outermost module ranges."""
        if size < self.modules:
            self.modules = 0
        category = node.name.category
        if category == "residency":
            watch(node, at, start, end)
        elif not self.modules and category == "module":
            self.modules = size + 1
            watch(node, at, start, end)

    def point(self, point: Point) -> None:
        """Put a launch into the innermost range that contains it."""
        at, start, end, what = point
        if at != self.thread:
            self.enter(at)
        stack = self.stack
        while stack and stack[-1][0] < start:
            self.sweep.close(stack.pop())
        if self.crossed:
            self.drop_ended(start)
        size = len(stack)
        low = self.low = min(size, self.low)
        index = size - 1
        while index >= 0 and stack[index][0] < end:
            index -= 1
        sweep = self.sweep
        root = sweep.tree.root
        shared: Node | None = None
        if low >= 0:
            depth = min(low, index + 1)
            shared = stack[depth - 1][1] if depth else root
        inner: Open | None = stack[index] if index >= 0 else None
        times = sweep.launch(sweep.tree.child(root, OUTSIDE) if inner is None else inner[1], shared, what)
        if times is None:
            return
        self.low = index + 1
        if inner is not None:
            _grow(inner, times[0], times[1], 1)
            inner[8] += times[2]
            if self.crossed:
                _grow_others(stack, inner, start, end, times)


def _grow(entry: Open, first: int, last: int, launches: int) -> None:
    entry[5] += launches
    if entry[3] is None or first < entry[3]:
        entry[3] = first
    if entry[4] is None or last > entry[4]:
        entry[4] = last


def _grow_others(stack: list[Open], inner: Open, start: int, end: int, times: tuple[int, int, int]) -> None:
    """Ranges that cross others: a launch lies inside several that do not contain one another."""
    line = set()
    entry: Open | None = inner
    while entry is not None:
        line.add(id(entry))
        entry = entry[6]
    for other in stack:
        if id(other) not in line and other[7] <= start and other[0] >= end:
            # only this one: whatever encloses it and the launch hears of it through the launch's own line
            other[1].launches += 1
            if other[3] is None or times[0] < other[3]:
                other[3] = times[0]
            if other[4] is None or times[1] > other[4]:
                other[4] = times[1]


def _close_with_device(entry: Open) -> None:
    _close(entry)
    node, time, above = entry[1], entry[8], entry[6]
    if above is not None:
        above[8] += time
    before = gpu_now.get(id(node))
    if entry[9]:
        gpu_now[id(node)] = time if before is None else before + time
    else:
        gpu_now[id(node)] = time
        if before is not None:
            node.each = added(node.each, before)


def _close(entry: Open) -> None:
    first = entry[3]
    if first is None:
        return
    node = entry[1]
    node.launches += entry[5]
    node.proj += entry[4] - first
    node.proj_calls += 1
    above = entry[6]
    if above is not None:
        above[5] += entry[5]
        if above[3] is None or first < above[3]:
            above[3] = first
        if above[4] is None or entry[4] > above[4]:
            above[4] = entry[4]
