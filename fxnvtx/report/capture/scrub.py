"""A copy of a capture without what tells who made it, where, and with which environment."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import CaptureError, OutputError
from ...output import check_target, writing_file
from ...recording import Recording
from . import as_sqlite, kind_of
from .schema import damaged, detect, one_line, open_capture

__all__ = ["scrub"]


# A list of what may stay: what the next version of Nsight Systems adds is left out until somebody looked at it.
_KEPT = (
    "NVTX_EVENTS",
    "NVTX_PAYLOAD_SCHEMAS",
    "NVTX_PAYLOAD_SCHEMA_ENTRIES",
    "CUPTI_ACTIVITY_KIND_",
    "CUDA_GRAPH_",
    "CUDA_GPU_MEMORY_USAGE_EVENTS",
    "ENUM_",
    "ANALYSIS_DETAILS",
)
_KEPT_META = ("EXPORT_PRODUCT_", "EXPORT_SCHEMA_")
_KEPT_NUMBERS = {"PROCESSES": ("globalPid", "pid")}  # tables of which only these columns stay
_KEPT_RECORDING = {"clock", "pid", "rank", "classes"}


def scrub(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write a copy of a capture or recording to `target` that holds ranges, launches and device work only.

    Gone: the environment, host and user names, paths, command lines, process and thread names, captured output, and
    every text that nothing kept refers to. The names of ranges and kernels stay; they are the capture. `nsys stats` and
    fxnvtx read the copy. Raises CaptureError, OutputError.
    """
    origin, goal = Path(source), Path(target)
    check_target(goal, [origin])
    kind = kind_of(origin)
    if kind == "recording":
        recording = Recording.load(origin)
        recording.meta = {key: value for key, value in recording.meta.items() if key in _KEPT_RECORDING}
        return recording.save(goal)
    if kind == "trace":
        raise CaptureError(f"{origin} is a trace, which --scrub does not know: scrub the capture that it was made from")
    if kind in ("nsys-rep", "tables"):
        with as_sqlite(origin, kind) as sqlite:
            _scrub_sqlite(sqlite, goal)
    else:
        _scrub_sqlite(origin, goal)
    return goal


def _scrub_sqlite(origin: Path, goal: Path) -> None:
    reader = open_capture(origin)
    try:
        with writing_file(goal, [origin]) as place, damaged(origin):
            detect(reader, origin)
            writer = sqlite3.connect(place, isolation_level=None)
            try:
                with _written(goal):
                    writer.execute("PRAGMA journal_mode = OFF")
                    writer.execute("PRAGMA synchronous = OFF")
                    writer.execute("BEGIN")
                _copy(reader, writer, goal)
                with _written(goal):
                    writer.execute("COMMIT")
            finally:
                writer.close()
    finally:
        reader.close()


@contextmanager
def _written(goal: Path) -> Iterator[None]:
    """What goes wrong here is the copy's fault and not the capture's."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OutputError(f"cannot write {goal}: {one_line(error)}") from error


def _copy(reader: sqlite3.Connection, writer: sqlite3.Connection, goal: Path) -> None:
    tables = reader.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall()
    used: set[int] = set()
    for name, sql in tables:
        if name.startswith(_KEPT):
            texts = _copy_table(reader, writer, goal, name, sql, None)
            used.update(texts)
        elif name in _KEPT_NUMBERS:
            _copy_table(reader, writer, goal, name, sql, _KEPT_NUMBERS[name])
        elif name == "META_DATA_EXPORT":
            writer.execute(sql)
            for key, value in reader.execute("SELECT name, value FROM META_DATA_EXPORT"):
                if isinstance(key, str) and key.startswith(_KEPT_META):
                    writer.execute("INSERT INTO META_DATA_EXPORT (name, value) VALUES (?, ?)", (key, value))
    for name, sql in tables:
        if name == "StringIds":
            writer.execute(sql)
            for key in sorted(used):
                row = reader.execute("SELECT value FROM StringIds WHERE id = ?", (key,)).fetchone()
                if row is not None:
                    writer.execute("INSERT INTO StringIds (id, value) VALUES (?, ?)", (key, row[0]))


def _copy_table(
    reader: sqlite3.Connection,
    writer: sqlite3.Connection,
    goal: Path,
    name: str,
    sql: str,
    only: tuple[str, ...] | None,
) -> set[int]:
    """Copy a table; returns the ids of the texts its rows refer to. Columns outside `only` become NULL or empty."""
    quoted = '"' + name.replace('"', '""') + '"'
    described = reader.execute(f"PRAGMA table_info({quoted})").fetchall()
    columns = [row[1] for row in described]
    if not columns:
        raise CaptureError(f"table {name} has no columns")
    writer.execute(sql)
    texts = [index for index, column in enumerate(columns) if _is_text_id(column)]
    insert = f"INSERT INTO {quoted} VALUES ({', '.join('?' * len(columns))})"
    used: set[int] = set()
    picked = ", ".join(
        f'"{column}"' if only is None or column in only else "''" if "TEXT" in (row[2] or "") else "NULL"
        for row, column in zip(described, columns, strict=True)
    )
    cursor = reader.execute(f"SELECT {picked} FROM {quoted}")
    while rows := cursor.fetchmany(10_000):
        for index in texts:
            used.update(row[index] for row in rows if type(row[index]) is int)
        with _written(goal):
            writer.executemany(insert, rows)
    return used


def _is_text_id(column: str) -> bool:
    return column in ("nameId", "demangledName", "shortName", "mangledName") or column.endswith(("TextId", "textId"))
