"""Rows of a query as numpy columns, some ten thousand at a time, and columns kept in sorted runs.

Rows come through ADBC, or sqlite3 where that is missing. Runs, by group and key, are in memory while they are few, else
in a temporary file; one is sorted when it is written, and a window is merged from what each run holds of it, so memory
is bound by the size of a run and of a window, however many rows there are.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..capture.schema import capture_uri

__all__ = ["Batch", "Ints", "Limits", "Source", "Spool", "windows"]


Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass
class Batch:
    """Some rows. ints[i]: (values, which of them are no NULL; None: all) of the i-th column that holds numbers; the
    value of a NULL is 0. texts: of the column that holds texts, None where every one of them is empty."""

    rows: int
    ints: list[tuple[Ints, Mask | None]]
    texts: list[bytes] | list[str] | None = None


class Source:
    """A capture that is open for reading, twice: `connection` for single values, ADBC for whole columns."""

    def __init__(self, connection: sqlite3.Connection, path: Path, rows: int = 65_536, adbc: bool = True) -> None:
        self._connection = connection
        self._path = path
        self._rows = rows
        self._adbc: Any = _connected(path) if adbc else None

    def close(self) -> None:
        """Close what this class opened; not the connection it was given."""
        if self._adbc is not None:
            for handle in reversed(self._adbc):
                handle.close()
            self._adbc = None

    def batches(self, columns: Sequence[str | None], rest: str, text: str | None = None) -> Iterator[Batch]:
        """The rows of `SELECT columns..., text rest`.

        columns: SQL that gives integers or NULL; None for one that is NULL in all rows, which is not read. text: SQL
        that gives texts, never NULL. Raises sqlite3.Error for a damaged file, ValueError for a column that holds
        something else.
        """
        asked = [column for column in columns if column is not None]
        for batch in self._batches(asked, rest, text):
            nothing = np.zeros(batch.rows, np.int64), np.zeros(batch.rows, np.bool_)
            read = iter(batch.ints)
            batch.ints = [nothing if column is None else next(read) for column in columns]
            yield batch

    def exists(self, rest: str) -> bool:
        """Whether `SELECT ... rest` has any row."""
        return self._connection.execute(f"SELECT 1 {rest} LIMIT 1").fetchone() is not None

    def _batches(self, columns: list[str], rest: str, text: str | None) -> Iterator[Batch]:
        names = columns if text is None else [*columns, text]
        # named, because Arrow has a column by its name
        sql = f"SELECT {', '.join(f'{name} AS c{index}' for index, name in enumerate(names))} {rest}"
        if self._adbc is None:
            return self._by_rows(sql, len(columns))
        return self._by_columns(sql, len(columns))

    def _by_rows(self, sql: str, count: int) -> Iterator[Batch]:
        cursor = self._connection.execute(sql)
        try:
            while rows := cursor.fetchmany(self._rows):
                columns = list(zip(*rows, strict=True))
                texts: list[str] | None = None
                if len(columns) > count:
                    if {*map(type, columns[count])} != {str}:
                        raise ValueError("no text where one belongs")
                    texts = list(columns[count]) if any(columns[count]) else None
                yield Batch(len(rows), [_numbers(column) for column in columns[:count]], texts)
        finally:
            cursor.close()

    def _by_columns(self, sql: str, count: int) -> Iterator[Batch]:
        import adbc_driver_manager
        import nanoarrow  # type: ignore[import-untyped]

        with adbc_driver_manager.AdbcStatement(self._adbc[1]) as statement:
            statement.set_options(**{"adbc.sqlite.query.batch_rows": str(self._rows)})
            statement.set_sql_query(sql)
            try:
                handle, _affected = statement.execute_query()
                for array in nanoarrow.c_array_stream(handle):
                    if array.length:
                        ints = [_column(array.child(index)) for index in range(count)]
                        yield Batch(
                            array.length, ints, _texts(array.child(count)) if array.n_children > count else None
                        )
            except (adbc_driver_manager.Error, RuntimeError) as error:  # nanoarrow's own are RuntimeErrors
                raise sqlite3.DatabaseError(" ".join(str(error).split())) from error


def _connected(path: Path) -> tuple[Any, Any] | None:
    """(database, connection); None without the driver."""
    try:
        import adbc_driver_manager
        import adbc_driver_sqlite
        import nanoarrow  # noqa: F401
    except ImportError:
        return None
    try:
        database = adbc_driver_manager.AdbcDatabase(driver=adbc_driver_sqlite._driver_path(), uri=capture_uri(path))
        return database, adbc_driver_manager.AdbcConnection(database)
    except adbc_driver_manager.Error as error:
        raise sqlite3.DatabaseError(" ".join(str(error).split())) from error


def _column(child: Any) -> tuple[Ints, Mask | None]:
    view = child.view()
    if child.schema.format != "l":
        raise ValueError("a fraction or a text where an integer belongs")
    values = np.frombuffer(view.buffer(1), np.int64, len(child), view.offset * 8)
    valid = view.buffer(0)
    if not len(valid) or view.null_count == 0:
        return values, None
    bits = np.unpackbits(np.frombuffer(valid, np.uint8), count=view.offset + len(child), bitorder="little")
    mask = bits[view.offset :].view(np.bool_)
    return values, None if mask.all() else mask


def _texts(child: Any) -> list[bytes] | None:
    if child.schema.format not in ("u", "U", "z"):
        raise ValueError("a number where a text belongs")
    view = child.view()
    kind = np.int64 if child.schema.format == "U" else np.int32
    bounds = np.frombuffer(view.buffer(1), kind)[view.offset : view.offset + len(child) + 1]
    if bounds[0] == bounds[-1]:
        return None
    data = bytes(view.buffer(2))
    places = bounds.tolist()
    return [data[start:end] for start, end in pairwise(places)]


def _numbers(column: tuple[Any, ...]) -> tuple[Ints, Mask | None]:
    kinds = {*map(type, column)}
    if kinds <= {int}:
        return np.array(column, np.int64), None
    if not kinds <= {int, type(None)}:
        raise ValueError("a fraction or a text where an integer belongs")
    mask = np.array([value is not None for value in column])
    return np.array([value or 0 for value in column], np.int64), mask


# --------------------------------------------------------------------------------------------------------- sorted runs


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
