"""What an Nsight Systems SQLite export holds, found by column and not by table name (2022.4 to 2026.2 differ)."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import CaptureError, FxnvtxError

__all__ = [
    "COPY",
    "GRAPH",
    "HOW_TO_RECORD",
    "KERNEL",
    "MARK",
    "PROCESS",
    "PUSH_POP",
    "SET",
    "START_END",
    "Schema",
    "Table",
    "capture_uri",
    "damaged",
    "detect",
    "one_line",
    "open_capture",
]


KERNEL, COPY, SET, GRAPH = 0, 1, 2, 3
PUSH_POP, START_END = (59, 70), (60, 71)  # NVTX event types: with a text, and with a registered one of older exports
MARK = 34
PROCESS = "~16777215"  # globalTid & this = globalPid: the low 24 bits are the thread


_MAGIC = b"SQLite format 3\0"
_BUSY_S = 2.0  # how long a capture that another program is writing is waited for
_SMALL = 64 << 20  # bytes; files up to this size are checked page by page before they are trusted


@dataclass(frozen=True)
class Table:
    name: str
    columns: frozenset[str]

    @property
    def sql(self) -> str:
        return '"' + self.name.replace('"', '""') + '"'

    def pick(self, *names: str, default: str = "NULL") -> str:
        """SQL for the first of these columns that has a value; `default` where the table has none of them."""
        present = [name for name in names if name in self.columns]
        if not present:
            return default
        return present[0] if len(present) == 1 else f"coalesce({', '.join(present)})"


@dataclass
class Schema:
    """The tables that matter; None where the export has none."""

    nvtx: Table | None = None
    strings: Table | None = None
    runtime: Table | None = None
    kernel: Table | None = None
    memcpy: Table | None = None
    memset: Table | None = None
    graph_nodes: Table | None = None
    graph_trace: Table | None = None
    memory: Table | None = None
    tables: dict[str, Table] = field(default_factory=dict)
    only_process: int = 0  # of tables that do not say whose they are
    notes: list[str] = field(default_factory=list)  # tables that were expected to be readable and are not

    def process(self, table: Table) -> str:
        """SQL for the process that a device operation belongs to."""
        return table.pick("globalPid", default=str(self.only_process))

    @property
    def has_device_work(self) -> bool:
        return any((self.kernel, self.memcpy, self.memset, self.graph_trace))


# kind -> (usual name, columns that make a table one of this kind, columns that it must not have)
_KINDS: dict[str, tuple[str, set[str], set[str]]] = {
    "nvtx": ("NVTX_EVENTS", {"start", "end", "eventType", "globalTid", "text"}, set()),
    "strings": ("StringIds", {"id", "value"}, set()),
    "runtime": (
        "CUPTI_ACTIVITY_KIND_RUNTIME",
        {"start", "end", "globalTid", "correlationId", "nameId", "returnValue"},
        {"nestingLevel"},
    ),
    "kernel": (
        "CUPTI_ACTIVITY_KIND_KERNEL",
        {"start", "end", "deviceId", "correlationId", "globalPid", "gridX"},
        set(),
    ),
    "memcpy": (
        "CUPTI_ACTIVITY_KIND_MEMCPY",
        {"start", "end", "deviceId", "correlationId", "globalPid", "copyKind"},
        set(),
    ),
    "memset": (
        "CUPTI_ACTIVITY_KIND_MEMSET",
        {"start", "end", "deviceId", "correlationId", "globalPid", "value"},
        {"copyKind"},
    ),
    "graph_nodes": ("CUDA_GRAPH_NODE_EVENTS", {"start", "globalTid", "graphNodeId", "originalGraphNodeId"}, set()),
    "graph_trace": (
        "CUPTI_ACTIVITY_KIND_GRAPH_TRACE",
        {"start", "end", "deviceId", "correlationId", "globalPid", "graphId"},
        {"gridX", "copyKind", "value"},
    ),
    "memory": (
        "CUDA_GPU_MEMORY_USAGE_EVENTS",
        {"start", "globalPid", "bytes", "memKind", "memoryOperationType", "correlationId"},
        set(),
    ),
}


HOW_TO_RECORD = "record with `nsys profile --trace=nvtx,cuda ...`, check `fxnvtx doctor`"
_NO_RANGES = Table(
    "fx_no_ranges",
    frozenset({"start", "end", "eventType", "globalTid", "endGlobalTid", "text", "textId", "domainId", "category"}),
)


def one_line(error: object) -> str:
    """SQLite's errors about a schema span lines."""
    return " ".join(str(error).split())


# columns without which a table under its usual name says nothing; tools that cut exports down drop the others
_LEAST: dict[str, set[str]] = {
    "runtime": {"start", "end", "globalTid", "correlationId"},
    "kernel": {"start", "end", "deviceId", "correlationId"},
    "memcpy": {"start", "end", "deviceId", "correlationId", "copyKind"},
    "memset": {"start", "end", "deviceId", "correlationId"},
}


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Turn whatever a broken file causes while it is read into one CaptureError."""
    try:
        yield
    except sqlite3.Error as error:
        if "locked" in str(error) or "busy" in str(error):
            raise CaptureError(
                f"{path} is locked: another program is writing it; wait for it, or read a copy"
            ) from error
        if "disk is full" in str(error) or "disk I/O" in str(error):
            raise CaptureError(
                f"{path}: {one_line(error)}; point SQLITE_TMPDIR to a disk with room for a copy of it"
            ) from error
        journal = Path(f"{path}-journal")
        if journal.exists() and journal.stat().st_size:
            raise CaptureError(
                f"{path} was being written when its program ended ({journal.name} is left): export it again, or let"
                f" `sqlite3 {path.name} .tables` finish it"
            ) from error
        raise CaptureError(f"{path} is damaged ({one_line(error)}): export it again with `nsys export`") from error
    except (TypeError, OverflowError, UnicodeError, ValueError) as error:
        if isinstance(error, FxnvtxError):
            raise
        raise CaptureError(
            f"{path} is damaged (a column holds what cannot be there: {one_line(error)}):"
            " export it again with `nsys export`"
        ) from error


def capture_uri(path: Path) -> str:
    """What SQLite is given to open the file for reading and to leave nothing beside it."""
    # a reader of a WAL database would write -shm and -wal files beside it
    immutable = _is_wal(path) and not Path(f"{path}-wal").exists()
    return f"{path.absolute().as_uri()}?{'immutable=1' if immutable else 'mode=ro'}"


def open_capture(path: Path) -> sqlite3.Connection:
    """Open for reading only; temporary tables go to files of their own, never into the capture."""
    _check_header(path)
    with damaged(path):
        connection = sqlite3.connect(capture_uri(path), uri=True, timeout=_BUSY_S, isolation_level=None)
        try:
            connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
            connection.execute("PRAGMA temp_store = FILE")
            connection.execute("PRAGMA cache_size = -16384")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if path.stat().st_size <= _SMALL:
                verdict = connection.execute("PRAGMA quick_check(1)").fetchone()
                # a NULL where the schema says NOT NULL is what hand-slimmed captures have; it breaks nothing here
                if verdict and verdict[0] != "ok" and not verdict[0].startswith(("NULL value", "non-unique", "row ")):
                    raise sqlite3.DatabaseError(verdict[0].splitlines()[0])
        except BaseException:
            connection.close()
            raise
    return connection


def detect(connection: sqlite3.Connection, path: Path) -> Schema:
    """Which table is which. A capture without NVTX ranges gets an empty table of them, and a note. Raises CaptureError
    where nothing of Nsight Systems is there."""
    tables: dict[str, Table] = {}
    for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        if name.startswith(("ENUM_", "sqlite_")):
            continue
        quoted = name.replace('"', '""')
        columns = frozenset(row[1] for row in connection.execute(f'PRAGMA table_info("{quoted}")'))
        tables[name] = Table(name, columns)
    schema = Schema(tables=tables)
    for kind, (usual, needed, forbidden) in _KINDS.items():
        fitting = [t for t in tables.values() if needed <= t.columns and not forbidden & t.columns]
        fitting.sort(key=lambda t: (t.name != usual, t.name))
        if kind == "strings":
            fitting = [t for t in fitting if t.name == usual]
        least = _LEAST.get(kind)
        if not fitting and least is not None and usual in tables and least <= tables[usual].columns:
            fitting = [tables[usual]]
        setattr(schema, kind, fitting[0] if fitting else None)
        if not fitting and usual in tables and kind != "graph_nodes":
            missing = ", ".join(sorted(needed - tables[usual].columns))
            schema.notes.append(f"table {usual} was not read: it has no column {missing}")
    if schema.runtime is not None:
        some = connection.execute(f"SELECT globalTid & ~16777215 FROM {schema.runtime.sql} LIMIT 1").fetchone()
        schema.only_process = some[0] if some and type(some[0]) is int else 0
    if schema.nvtx is None:
        if not ("META_DATA_EXPORT" in tables or schema.has_device_work or "StringIds" in tables):
            raise CaptureError(f"{path} is an SQLite file, but no export of Nsight Systems")
        connection.execute(f"CREATE TEMP TABLE IF NOT EXISTS {_NO_RANGES.name} ({', '.join(_NO_RANGES.columns)})")
        schema.nvtx = _NO_RANGES
        schema.notes.append(f"the capture holds no NVTX ranges: {HOW_TO_RECORD}")
    return schema


def _check_header(path: Path) -> None:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(100)
    except OSError as error:
        raise CaptureError(f"cannot read {path}: {error.strerror or error}") from error
    if not size:
        raise CaptureError(f"{path} is empty: the export did not finish; run `nsys export --type sqlite` again")
    if head[:16] != _MAGIC:
        raise CaptureError(f"{path} is neither an SQLite export of Nsight Systems, nor a .nsys-rep, nor a recording")
    page = int.from_bytes(head[16:18], "big")
    page = 65536 if page == 1 else page
    pages = int.from_bytes(head[28:32], "big") if head[24:28] == head[92:96] else 0
    if len(head) < 100 or (page and pages * page > size):
        raise CaptureError(
            f"{path} is cut off: it has {size:,} bytes and says it has {pages * page:,}; copy or export it again"
        )


def _is_wal(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(20)[18:20] == b"\x02\x02"
