"""Rows of a query as numpy columns, some ten thousand at a time: through ADBC, or sqlite3 where that is missing."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..capture.schema import capture_uri

__all__ = ["Batch", "Ints", "Source"]

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
