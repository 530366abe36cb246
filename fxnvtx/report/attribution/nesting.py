"""Ranges that nest, all of a window at once: whose range each one lies in, and which one each call lies in (pure).

A range is closed by the first later one that starts after its end, or at its end and takes time itself. Where all
ranges nest, that alone says how many are open when a range starts, and its parent is the last one before it that found
one less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .batches import Ints

__all__ = ["NONE", "TOP", "Nest", "Placed", "by_level", "nested", "placed", "within"]

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
