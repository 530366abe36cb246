"""Ranges that cross others, one after the other: what `nesting` says of a window, where it cannot (pure).

Two ranges of one thread cross where different programs' stacks meet (NVTX domains), and start/end ranges do as they
like. Such a window is walked along with a stack; the rest of the capture is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .batches import Ints
from .names import MODULE
from .nesting import NONE, TOP, Nest, Placed, by_level

__all__ = ["Walk"]


@dataclass
class Walk:
    """Rows sorted by start, and end downwards, of which the first `held` were open before and are on the stack already.

    parent, covered (how far children cover a range): of all rows, and given for the first ones. low: see
    `nesting.placed`. modules: how deep the stack's outermost module range lies, 0 for none. crossed: whether the rows
    that were open before cross. Afterwards: `stack`, the rows that are still open, `cover`, how much of its parent each
    new row covers first, and `crossing`, how many do not lie inside the row that they start in.
    """

    start: list[int]
    end: list[int]
    kinds: list[int]
    held: int
    parent: list[int]
    covered: list[int]
    low: int
    modules: int
    crossed: bool
    stack: list[int] = field(default_factory=list)
    cover: list[int] = field(default_factory=list)
    crossing: int = 0
    inner: list[int] = field(default_factory=list)
    both: list[int] = field(default_factory=list)
    outer: list[int] = field(default_factory=list)
    others: list[tuple[int, int]] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)

    def run(self, call_start: list[int], call_end: list[int]) -> tuple[Nest, Placed]:
        self.stack = list(range(self.held))
        self.cover = [0] * self.held
        call, calls = 0, len(call_start)
        for row in range(self.held, len(self.start)):
            while call < calls and call_start[call] < self.start[row]:
                self._call(call, call_start[call], call_end[call])
                call += 1
            self._row(row)
        for last in range(call, calls):
            self._call(last, call_start[last], call_end[last])
        level = [0] * len(self.parent)
        for row, above in enumerate(self.parent):
            if above >= 0:
                level[row] = level[above] + 1
        nest = by_level(np.array(self.parent, np.int64), np.array(level, np.int64))
        nest.outer = np.array(self.outer, np.int64)
        nest.closed = np.array(self.closed, np.int64)
        if self.others:
            pairs = np.array(self.others, np.int64)
            nest.others = pairs[:, 0], pairs[:, 1]
        return nest, Placed(_ints(self.inner), _ints(self.both))

    def _row(self, row: int) -> None:
        start, end, stack, ends = self.start[row], self.end[row], self.stack, self.end
        while stack and (ends[stack[-1]] < start or (ends[stack[-1]] == start and end > start)):
            self.closed.append(stack.pop())
        if self.crossed:
            self._drop_ended(start)
        size = len(stack)
        self.low = min(self.low, size)
        above = stack[-1] if stack else TOP
        if above >= 0 and ends[above] < end:
            self.crossed = True
            self.crossing += 1
            above = next((item for item in reversed(stack) if ends[item] >= end), TOP)
        self.parent.append(above)
        self.covered.append(start)
        first = 0
        if above >= 0 and end > self.covered[above]:
            first = end - max(start, self.covered[above])
            self.covered[above] = end
        self.cover.append(first)
        if size < self.modules:
            self.modules = 0
        if not self.modules and self.kinds[row] == MODULE:
            self.modules = size + 1
            self.outer.append(row)
        stack.append(row)

    def _call(self, call: int, start: int, end: int) -> None:
        stack, ends = self.stack, self.end
        while stack and ends[stack[-1]] < start:
            self.closed.append(stack.pop())
        if self.crossed:
            self._drop_ended(start)
        place = len(stack) - 1
        while place >= 0 and ends[stack[place]] < end:
            place -= 1
        low = min(self.low, place + 1)
        self.both.append(NONE if low < 0 else stack[low - 1] if low else TOP)
        self.low = place + 1
        inner = stack[place] if place >= 0 else TOP
        self.inner.append(inner)
        if inner >= 0 and self.crossed:
            line = {inner}
            while inner >= 0:
                line.add(inner)
                inner = self.parent[inner]
            self.others.extend(
                (row, call) for row in stack if row not in line and self.start[row] <= start and ends[row] >= end
            )

    def _drop_ended(self, start: int) -> None:
        """Close what ended below something still open, which only crossing ranges do."""
        self.closed.extend(row for row in reversed(self.stack) if self.end[row] < start)
        self.stack[:] = [row for row in self.stack if self.end[row] >= start]
        self.crossed = bool(self.stack)


def _ints(values: list[int]) -> Ints:
    return np.array(values, np.int64)
