"""Numbers for keys, and sums by number that never round (pure)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .batches import Ints

__all__ = ["Interner", "Sums", "grown"]

_EXACT = 1 << 53  # integers up to here are exact in a float64, which is what bincount adds in
_LOW = (1 << 32) - 1


class Interner:
    """Integer keys to small numbers. `make` is asked for the number of each new key, in the order they appear in."""

    def __init__(self, make: Callable[[int], int] | None = None) -> None:
        self._make = make
        self._keys = np.empty(0, np.int64)
        self._ids = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self) -> list[int]:
        """All keys, by their number. Only without `make`."""
        return list(self._keys[np.argsort(self._ids)].tolist())

    def __call__(self, keys: Ints) -> Ints:
        if not len(keys):
            return np.empty(0, np.int64)
        if (keys == keys[0]).all():
            return np.full(len(keys), self._few(keys[:1])[0])
        return self._few(keys)

    def _few(self, keys: Ints) -> Ints:
        found = self._look(keys)
        missing = found < 0
        if missing.any():
            self._add(keys[missing])
            found = self._look(keys)
        return found

    def _look(self, keys: Ints) -> Ints:
        """-1 where a key is new."""
        if not len(self._keys):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._ids[at], -1)

    def _add(self, keys: Ints) -> None:
        new, first = np.unique(keys, return_index=True)
        new = new[np.argsort(first, kind="stable")]
        if self._make is None:
            ids = np.arange(len(self._keys), len(self._keys) + len(new))
        else:
            ids = np.array([self._make(key) for key in new.tolist()], np.int64)
        whole = np.concatenate([self._keys, new])
        order = np.argsort(whole, kind="stable")
        self._keys, self._ids = whole[order], np.concatenate([self._ids, ids])[order]


class Sums:
    """One sum per number, exact for any int64 summands. Two arrays, because a sum may need more than 64 bits."""

    def __init__(self) -> None:
        self._low = np.zeros(0, np.int64)
        self._high = np.zeros(0, np.int64)

    @property
    def empty(self) -> bool:
        """Whether nothing was ever added."""
        return not len(self._low)

    def add(self, ids: Ints, values: Ints, sign: int = 1) -> None:
        if not len(ids):
            return
        size = int(ids.max()) + 1
        self._low, self._high = grown(self._low, size), grown(self._high, size)
        least, most = int(values.min()), int(values.max())
        if least == most == 0:
            return
        if max(-least, most) < _EXACT // len(values):
            total = np.bincount(ids, weights=values).astype(np.int64)
            self._low[:size] += sign * (total & _LOW)
            self._high[:size] += sign * (total >> 32)
        else:
            self._low[:size] += sign * np.bincount(ids, weights=values & _LOW).astype(np.int64)
            self._high[:size] += sign * np.bincount(ids, weights=values >> 32).astype(np.int64)

    def count(self, ids: Ints) -> None:
        """Add one for every number."""
        if len(ids):
            size = int(ids.max()) + 1
            self._low, self._high = grown(self._low, size), grown(self._high, size)
            self._low[:size] += np.bincount(ids)

    def tolist(self, size: int) -> list[int]:
        low, high = grown(self._low, size)[:size], grown(self._high, size)[:size]
        if not high.any():
            return list(low.tolist())
        return [(up << 32) + down for up, down in zip(high.tolist(), low.tolist(), strict=True)]


def grown(array: NDArray[Any], size: int, fill: int = 0) -> NDArray[Any]:
    """The array, or a longer copy of it (by half at least) where it has less than `size` places."""
    if len(array) >= size:
        return array
    longer = np.full(max(size, len(array) * 3 // 2, 64), fill, array.dtype)
    longer[: len(array)] = array
    return longer
