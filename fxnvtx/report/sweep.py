"""One pass over one thread after another: ranges nest, launches fall into them, both end up in a tree (pure).

Nothing is kept per range or per launch, so memory depends on the number of distinct paths only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .labels import UNKNOWN, Name
from .tree import Node, Tree

__all__ = ["OUTSIDE", "Point", "Span", "Sweep"]

OUTSIDE = Name(UNKNOWN + "launched outside every range", "unknown")

# thread, start, end, name, payload, is still open. Sorted by thread, start, and end downwards.
Span = tuple[int, int, int, Name, Any, bool]


# thread, start, end of a call that launched device work (or made a CUDA graph node), and what it launched. Sorted by
# thread and start.
Point = tuple[int, int, int, Any]

# one open range: [end, node, how far children cover it, first operation's start, last one's end, launches, parent,
# start]. A list indexed by plain numbers and not an object: this is the inner loop.
Open = list[Any]


class Sweep:
    """Feed `run` with the spans and points of one process.

    `launch(node, both, what)` is called for every point: `node` is the innermost range that contains it, `both` the
    innermost one that also contains the thread's launch before it (None for a thread's first). It returns (start, end)
    of the operations that were launched, or None where the point is no launch.
    """

    def __init__(
        self,
        tree: Tree,
        launch: Callable[[Node, Node | None, Any], tuple[int, int] | None],
        watch: Callable[[Node, int, int, int], None] | None = None,
    ) -> None:
        self.tree = tree
        self.launch = launch
        self.watch = watch  # called for residency ranges and outermost module ranges: (node, thread, start, end)
        self.crossing = 0

    def run(self, spans: Iterable[Span], points: Iterable[Point]) -> None:
        tree, root = self.tree, self.tree.root
        watch = self.watch
        outside: Open = [0, root, 0, None, None, 0, None, 0]
        stack: list[Open] = []
        thread: int | None = None
        modules = 0  # how deep the stack's outermost module range lies, 0 for none
        crossed = False
        low = 0  # the lowest the stack has been since the thread's last launch; -1: there was none yet
        point_iterator: Iterator[Point] = iter(points)
        point = next(point_iterator, None)
        span_iterator: Iterator[Span] = iter(spans)
        span = next(span_iterator, None)
        while span is not None or point is not None:
            if point is None:
                take_span = True
            elif span is None:
                take_span = False
            elif span[0] != point[0]:
                take_span = span[0] < point[0]
            else:
                take_span = span[1] <= point[1]

            if take_span:
                at, start, end, name, payload, is_open = span  # type: ignore[misc]
            else:
                at, start, end, what = point  # type: ignore[misc]
            if at != thread:
                while stack:
                    _close(stack.pop())
                thread, low, crossed, modules = at, -1, False, 0
            while stack and (stack[-1][0] < start or (stack[-1][0] == start and end > start)):
                _close(stack.pop())
            if crossed:
                crossed = _drop_ended(stack, start)
            size = len(stack)
            if size < low:
                low = size
            if size < modules:
                modules = 0

            if take_span:
                span = next(span_iterator, None)
                above = outside
                if size:
                    index = size - 1
                    while index >= 0 and stack[index][0] < end:
                        index -= 1
                    if index >= 0:
                        above = stack[index]
                    if index < size - 1:
                        crossed = True
                        self.crossing += 1
                parent: Node = above[1]
                node = parent.kids.get(name)
                if node is None:
                    node = tree.child(parent, name)
                length = end - start
                node.calls += 1
                node.cpu += length
                node.cpu_self += length
                if node.cpu_min is None:
                    node.cpu_min = node.cpu_max = length
                elif length < node.cpu_min:
                    node.cpu_min = length
                elif length > node.cpu_max:  # type: ignore[operator]
                    node.cpu_max = length
                if node.first is None or start < node.first:
                    node.first = start
                if is_open:
                    node.open += 1
                if payload is not None and type(payload) is int:
                    node.payload += payload
                if above is not outside:
                    covered = above[2]
                    if end > covered:
                        parent.cpu_self -= end - (start if start > covered else covered)
                        above[2] = end
                stack.append([end, node, start, None, None, 0, above if above is not outside else None, start])
                if watch is not None:
                    if name.category == "residency":
                        watch(node, at, start, end)
                    elif not modules and name.category == "module":
                        modules = size + 1
                        watch(node, at, start, end)
            else:
                point = next(point_iterator, None)
                index = size - 1
                while index >= 0 and stack[index][0] < end:
                    index -= 1
                inner: Open | None = stack[index] if index >= 0 else None
                if inner is None:
                    target = tree.child(root, OUTSIDE)
                    shared = None if low < 0 else root
                else:
                    target = inner[1]
                    if low < 0:
                        shared = None
                    else:
                        depth = low if low < index + 1 else index + 1
                        shared = stack[depth - 1][1] if depth else root
                times = self.launch(target, shared, what)
                if times is None:
                    continue
                low = index + 1
                if inner is not None:
                    _grow(inner, times[0], times[1], 1)
                    if crossed:
                        _grow_others(stack, inner, start, end, times)
        while stack:
            _close(stack.pop())


def _grow(entry: Open, first: int, last: int, launches: int) -> None:
    entry[5] += launches
    if entry[3] is None or first < entry[3]:
        entry[3] = first
    if entry[4] is None or last > entry[4]:
        entry[4] = last


def _grow_others(stack: list[Open], inner: Open, start: int, end: int, times: tuple[int, int]) -> None:
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


def _drop_ended(stack: list[Open], start: int) -> bool:
    """Close what ended below something still open. Returns whether anything is open at all."""
    ended = [entry for entry in stack if entry[0] < start]
    if ended:
        for entry in reversed(ended):
            _close(entry)
        stack[:] = [entry for entry in stack if entry[0] >= start]
    return bool(stack)


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
