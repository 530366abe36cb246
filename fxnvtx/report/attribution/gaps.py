"""The longest times that a device was idle."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .batches import Ints

__all__ = ["Gaps"]

_KEPT = 10
_STEP = 1_000


class Gaps:
    """Takes in operations and keeps the longest idle times before one, the earlier of two that are equally long."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, int, int]] = []  # idle, start, device, node, name
        self._least = 0

    def add(self, rows: dict[str, NDArray[Any]], node: Ints) -> None:
        """Operations as they were launched, and the range that waited for each."""
        places = np.flatnonzero(rows["idle"] > self._least)
        while len(places):
            # a few at a time, because those rule out most others
            some, places = places[:_STEP], places[_STEP:]
            columns = [rows[name][some].tolist() for name in ("idle", "start", "device")]
            for gap in zip(*columns, node[some].tolist(), rows["name"][some].tolist(), strict=True):
                self._one(gap)
            places = places[rows["idle"][places] > self._least]

    def _one(self, gap: tuple[int, int, int, int, int]) -> None:
        if gap[0] <= self._least:
            return
        if len(self._heap) == _KEPT:
            heapq.heappop(self._heap)
        heapq.heappush(self._heap, gap)
        if len(self._heap) == _KEPT:
            self._least = self._heap[0][0]

    def longest(self) -> list[tuple[int, int, int, int]]:
        """(length, end, node, name of the operation that ended it), the longest first."""
        found = sorted(self._heap, reverse=True, key=lambda gap: gap[:3])
        return [(idle, start, node, name) for idle, start, _device, node, name in found]
