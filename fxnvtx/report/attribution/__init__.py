"""Which range launched what: the rows of a capture as numpy columns, joined and nested a window at a time.

Nothing of this is imported before a capture is read, because numpy is not needed for anything else. Data flows through
`batches` (rows out of SQLite; sorted runs, in memory or in a temporary file), `ranges`, `tasks` (start/end ranges that
nest), `names`, `device` (credit of each operation, and its call), the nesting below (the range around each call),
`threads` (one thread after another) and `forest` (counters per path), which fills the `Tree` that every view reads.
`captures` puts them together for the exports of Nsight Systems, `threads.fill` for recordings, which are in memory
already and know of no device.

A range is closed by the first later one that starts after its end, or at its end and takes time itself. Where all
ranges nest, that alone says how many are open when a range starts, and its parent is the last one before it that found
one less. Where ranges cross, as those of different programs' stacks may (NVTX domains), that does not hold: such a
window is walked along with a stack, one range after the other; the rest of the capture is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .batches import Ints
from .names import MODULE

__all__ = ["NONE", "TOP", "Nest", "Placed", "Walk", "by_level", "nested", "placed", "within"]


TOP, NONE = -1, -2  # outside of every range; nothing to speak of


@dataclass
class Nest:
    """parent: of each row, TOP for outermost ones. level: how many rows are above it. order: all rows by level; `cuts`
    is where each level begins in it. others: (row, call) of rows that hold a call though they are not above the row
    that does. outer: the outermost modules' rows, where they do not follow from the paths. closed: the rows that ended,
    in that order, where it is not their own."""

    parent: Ints
    level: Ints
    order: Ints
    cuts: list[int]
    others: tuple[Ints, Ints] | None = None
    outer: Ints | None = None
    closed: Ints | None = None

    def levels(self) -> list[Ints]:
        """The rows of each level, outermost first."""
        return [self.order[start:end] for start, end in zip(self.cuts, self.cuts[1:], strict=False)]


@dataclass
class Placed:
    """Of each call: `inner`, the innermost row that contains it (or TOP), and `both`, the innermost one that contains
    the thread's call before it, too (NONE for the thread's first)."""

    inner: Ints
    both: Ints


def by_level(parent: Ints, level: Ints) -> Nest:
    """A Nest from parents and levels."""
    deepest = int(level.max()) if len(level) else -1
    # numpy sorts small integers in linear time
    order = np.argsort(level.astype(np.int16) if deepest < 32_000 else level, kind="stable")
    cuts = np.searchsorted(level[order], np.arange(deepest + 2)).tolist()
    return Nest(parent, level, order, cuts)


def nested(start: Ints, end: Ints) -> Nest | None:
    """The nesting of ranges sorted by start, and end downwards; None where one crosses another or they are not."""
    count = len(start)
    if (end < start).any() or ((start[1:] == start[:-1]) & (end[1:] > end[:-1])).any():
        return None
    closed = np.searchsorted(start, end, "right")
    index = np.arange(count)
    # where something starts at my end: longer ones come first and close me, those that take no time lie within me
    touching = np.flatnonzero((start[closed - 1] == end) & (closed - 1 > index) & (start < end))
    if len(touching):
        first = np.searchsorted(start, end[touching], "left")
        closes = end[first] > start[first]
        closed[touching[closes]] = first[closes]
    level = index - np.cumsum(np.bincount(closed, minlength=count + 1))[:count]
    if (level < 0).any():
        return None
    nest = by_level(np.full(count, TOP), level)
    above: Ints | None = None
    for rows in nest.levels():
        if above is not None:
            nest.parent[rows] = above[np.searchsorted(above, rows) - 1]
        above = rows
    inner = np.flatnonzero(nest.parent >= 0)
    if (end[nest.parent[inner]] < end[inner]).any():
        return None
    return nest


def placed(
    nest: Nest, start: Ints, end: Ints, begin: int, call_start: Ints, call_end: Ints, low: int
) -> tuple[Placed, int]:
    """Where calls sorted by start lie, and the new `low`.

    begin: the rows before it were there when the thread's call before these was made, or when `low` was determined.
    low: the fewest ranges that were open at a time since that call; -1: there was none.
    """
    level = nest.level
    inner, upto = within(nest, start, end, call_start, call_end)
    own = np.where(inner >= 0, level[inner] + 1, 0) if len(level) else np.zeros(len(inner), np.int64)
    if not len(inner):
        return Placed(inner, inner), _lower(low, level[begin:])
    before = np.empty_like(own)
    before[0] = low
    before[1:] = own[:-1]
    fewest = _least(level, np.concatenate([[begin], upto]))
    depth = np.minimum(np.minimum(before, own), fewest)
    both = np.full(len(own), TOP)
    some = np.flatnonzero(depth > 0)
    if len(some):
        # of the rows of one level, the last one up to here is the one above
        count = len(level)
        places = level[nest.order] * count + nest.order
        both[some] = nest.order[np.searchsorted(places, (depth[some] - 1) * count + inner[some], "right") - 1]
    if low < 0:
        both[0] = NONE
    return Placed(inner, both), _lower(int(own[-1]), level[upto[-1] :])


def within(nest: Nest, start: Ints, end: Ints, call_start: Ints, call_end: Ints) -> tuple[Ints, Ints]:
    """The row that each call lies in (or TOP), and how many rows start before it or with it."""
    upto = np.searchsorted(start, call_start, "right")
    inner = upto - 1
    todo = np.flatnonzero(inner >= 0)
    while len(todo):
        todo = todo[end[inner[todo]] < call_end[todo]]
        inner[todo] = nest.parent[inner[todo]]
        todo = todo[inner[todo] >= 0]
    return inner, upto


def _lower(low: int, levels: Ints) -> int:
    return min(low, int(levels.min())) if len(levels) else low


def _least(levels: Ints, bounds: Ints) -> NDArray[np.int64]:
    """The least level between each bound and the next; a large number where there is none."""
    many = np.iinfo(np.int64).max
    least = np.minimum.reduceat(np.append(levels, many), np.minimum(bounds, len(levels)))[:-1]
    return np.where(bounds[1:] > bounds[:-1], least, many)


# -------------------------------------------------------------------------------------------- ranges that cross others


@dataclass
class Walk:
    """Rows sorted by start, and end downwards, of which the first `held` were open before and are on the stack already.

    parent, covered (how far children cover a range): of all rows, and given for the first ones. low: see
    `placed`. modules: how deep the stack's outermost module range lies, 0 for none. crossed: whether the rows
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
