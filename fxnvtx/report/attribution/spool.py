"""Columns kept in sorted runs, by group and key: in memory while they are few, else in a temporary file.

A run is sorted when it is written, and a window is merged from what each run holds of it, so memory is bound by the
size of a run and of a window, however many rows there are.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .batches import Ints

__all__ = ["Limits", "Spool", "windows"]

Column = NDArray[Any]


@dataclass(frozen=True)
class Limits:
    """How many rows are in memory at a time: of a batch from SQLite, of a run of a spool, of a window of one thread."""

    batch: int = 65_536
    run: int = 524_288
    window: int = 131_072


@dataclass
class _Run:
    """`samples`: the key of every `step`-th row. columns: where each one begins in the file, the array itself, or the
    one value that all rows have."""

    count: int
    samples: Ints
    step: int
    columns: list[Any]


class Spool:
    """Append rows in any order; read those of one group with lo <= key < hi, sorted.

    columns: name -> dtype; the first is the key, and those of `ties` order rows of one key (the rows' own order does
    where these are equal, too). Rows of different groups never meet.
    """

    def __init__(self, columns: dict[str, Any], ties: Sequence[str] = (), limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._names = list(columns)
        self._types = [np.dtype(kind) for kind in columns.values()]
        self._ties = [self._names.index(name) for name in ties]
        self._step = max(1, min(256, self._limits.window // 4))
        self._waiting: list[list[Column]] = []
        self._held = 0
        self._runs: dict[int, list[_Run]] = {}
        self._file: Any = None
        self._end = 0
        self.rows = 0

    # ------------------------------------------------------------------------------------------ writing

    def append(self, group: Ints | int, columns: Sequence[Any]) -> None:
        """Rows as one array per column (a number stands for a column of that number), and the group of each."""
        count = len(columns[0])
        if not count:
            return
        full = [_full(column, count, kind) for column, kind in zip(columns, self._types, strict=True)]
        self._waiting.append([_full(group, count, np.dtype(np.int64)), *full])
        self._held += count
        self.rows += count
        if self._held >= self._limits.run:
            self._flush(to_file=True)

    def seal(self) -> None:
        """No more rows come."""
        self._flush(to_file=self._file is not None)

    def _flush(self, to_file: bool) -> None:
        if not self._waiting:
            return
        parts = self._waiting
        whole = [np.concatenate(column) if len(parts) > 1 else column[0] for column in zip(*parts, strict=True)]
        self._waiting, self._held = [], 0
        groups, columns = whole[0], whole[1:]
        if (groups == groups[0]).all():
            self._write(int(groups[0]), columns, to_file)
            return
        order = np.argsort(groups, kind="stable")
        groups = groups[order]
        cuts = np.flatnonzero(np.diff(groups)) + 1
        for start, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(groups)], strict=True):
            self._write(int(groups[start]), [column[order[start:end]] for column in columns], to_file)

    def _write(self, group: int, columns: list[Column], to_file: bool) -> None:
        columns = self._sorted(columns)
        kept: list[Any] = []
        for column in columns:
            if (column == column[0]).all():
                kept.append(column.dtype.type(column[0]))
            elif to_file:
                kept.append(self._put(column))
            else:
                kept.append(column)
        samples = columns[0][:: self._step].copy()
        self._runs.setdefault(group, []).append(_Run(len(columns[0]), samples, self._step, kept))

    def _sorted(self, columns: list[Column]) -> list[Column]:
        key = columns[0]
        if len(key) < 2:
            return columns
        if (key[1:] < key[:-1]).any():
            order = np.argsort(key, kind="stable")
            columns = [column[order] for column in columns]
            key = columns[0]
        same = key[1:] == key[:-1]
        if self._ties and same.any() and self._out_of_order(columns, same):
            order = np.lexsort([*(columns[index] for index in reversed(self._ties)), key])
            columns = [column[order] for column in columns]
        return columns

    def _out_of_order(self, columns: list[Column], same: NDArray[np.bool_]) -> bool:
        for index in self._ties:
            column = columns[index]
            if (same & (column[1:] < column[:-1])).any():
                return True
            same = same & (column[1:] == column[:-1])
        return False

    def _put(self, column: Column) -> int:
        if self._file is None:
            # where SQLite would put its own
            folder = os.environ.get("SQLITE_TMPDIR")
            # open as long as the spool is
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        start = self._end
        view = np.ascontiguousarray(column).view(np.uint8).data
        while view:
            written = os.pwrite(self._file.fileno(), view, self._end)
            self._end += written
            view = view[written:]
        return start

    # ------------------------------------------------------------------------------------------ reading

    def groups(self) -> list[int]:
        return sorted(self._runs)

    def keys(self, group: int) -> tuple[Ints, int]:
        """Some of the group's keys, and how many rows each stands for."""
        runs = self._runs.get(group, ())
        return np.concatenate([run.samples for run in runs]) if runs else np.empty(0, np.int64), self._step

    def read(self, group: int, low: int | None = None, high: int | None = None) -> dict[str, Column]:
        """The rows with low <= key < high (None: no bound) in order."""
        found: list[list[Column]] = []
        for run in self._runs.get(group, ()):
            start = 0 if low is None else self._search(run, low)
            end = run.count if high is None else self._search(run, high)
            if end > start:
                found.append([self._get(run, index, start, end) for index in range(len(self._names))])
        if not found:
            return {name: np.empty(0, kind) for name, kind in zip(self._names, self._types, strict=True)}
        if len(found) == 1:
            return dict(zip(self._names, found[0], strict=True))
        whole = [np.concatenate(column) for column in zip(*found, strict=True)]
        return dict(zip(self._names, self._sorted(whole), strict=True))

    def next_key(self, group: int, low: int) -> int | None:
        """The smallest key that is at least `low`."""
        least: int | None = None
        for run in self._runs.get(group, ()):
            at = self._search(run, low)
            if at < run.count:
                key = int(self._get(run, 0, at, at + 1)[0])
                least = key if least is None else min(least, key)
        return least

    def first_key(self, group: int) -> int:
        """The smallest key of a group that has rows."""
        return min(int(run.samples[0]) for run in self._runs[group])

    def close(self) -> None:
        """Forget all rows."""
        self._runs.clear()
        self._waiting.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _search(self, run: _Run, bound: int) -> int:
        """How many rows of the run have a smaller key."""
        block = int(np.searchsorted(run.samples, bound, "left"))
        if not block:
            return 0
        start = (block - 1) * run.step
        end = min(block * run.step, run.count)
        return start + int(np.searchsorted(self._get(run, 0, start, end), bound, "left"))

    def _get(self, run: _Run, index: int, start: int, end: int) -> Column:
        kept = run.columns[index]
        kind = self._types[index]
        if isinstance(kept, np.ndarray):
            return kept[start:end]
        if isinstance(kept, np.generic):
            return np.full(end - start, kept, kind)
        out = np.empty(end - start, kind)
        view = out.view(np.uint8).data
        at = kept + start * kind.itemsize
        while view:
            read = os.preadv(self._file.fileno(), [view], at)
            if not read:
                raise OSError("a temporary file was cut off")
            at += read
            view = view[read:]
        return out


def _full(value: Any, count: int, kind: np.dtype[Any]) -> Column:
    if isinstance(value, np.ndarray):
        return value.astype(kind, copy=False)
    return np.full(count, value, kind)


def windows(spools: Sequence[Spool], group: int, rows: int) -> Iterator[tuple[int | None, int | None]]:
    """Bounds (low, high) of keys that cut a group of several spools into pieces of about so many rows together. Rows of
    one key stay together."""
    samples = [spool.keys(group) for spool in spools]
    keys = np.sort(np.concatenate([found for found, _step in samples]))
    if not len(keys):
        return
    # what lies between two samples of one spool is unknown, hence half a window of them at most
    every = max(1, rows // max(step for _found, step in samples))
    cuts: list[int | None] = [*np.unique(keys[every::every]).tolist()]
    yield from zip([None, *cuts], [*cuts, None], strict=True)
