"""Rows that must be sorted before they are read back, kept in a temporary table instead of in memory."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any

__all__ = ["Spill"]


class Spill:
    """Append rows, then read them back in order. Not visible outside its connection, gone with it."""

    def __init__(self, connection: sqlite3.Connection, name: str, columns: tuple[str, ...]) -> None:
        self._connection = connection
        self._name = name
        self._columns = columns
        self._insert = f"INSERT INTO temp.{name} VALUES ({', '.join('?' * len(columns))})"
        self._waiting: list[tuple[Any, ...]] = []
        self._count = 0
        self._made = False
        self._reading: list[sqlite3.Cursor] = []

    def add(self, row: tuple[Any, ...]) -> None:
        self._waiting.append(row)
        self._count += 1
        if len(self._waiting) >= 2_000:
            self._flush()

    def sorted_by(self, *columns: str, where: str = "", values: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        if not self._count:
            return iter(())
        self._flush()
        sql = f"SELECT * FROM temp.{self._name} {where} ORDER BY {', '.join(columns)}"
        cursor = self._connection.execute(sql, values)
        self._reading.append(cursor)
        return cursor

    def distinct(self, column: str) -> list[Any]:
        if not self._count:
            return []
        self._flush()
        return [
            row[0] for row in self._connection.execute(f"SELECT DISTINCT {column} FROM temp.{self._name} ORDER BY 1")
        ]

    def stop_reading(self) -> None:
        """A cursor that was not read to its end keeps every temporary table of the connection locked."""
        for cursor in self._reading:
            cursor.close()
        self._reading.clear()

    def drop(self) -> None:
        self._waiting.clear()
        self.stop_reading()
        if self._made:
            self._connection.execute(f"DROP TABLE temp.{self._name}")
            self._made = False
        self._count = 0

    def _flush(self) -> None:
        if not self._made:
            self._connection.execute(f"CREATE TEMP TABLE {self._name} ({', '.join(self._columns)})")
            self._made = True
        if self._waiting:
            self._connection.execute("BEGIN")
            self._connection.executemany(self._insert, self._waiting)
            self._connection.execute("COMMIT")
            self._waiting.clear()
