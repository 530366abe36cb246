"""Captures as they lie on disk: which reader reads what, what a folder stands for, and a copy without what tells who
made it, where, and with which environment.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CaptureError, OutputError
from ...output import check_target, writing_file
from ...recording import Recording
from ...recording.spool import SUFFIX, read_spool
from ..part import WHOLE, Part, Window
from .kineto import converted, is_gzip
from .nsys import Reader, exported, is_arrow, is_tables, tabled
from .recording import load_recording, read_recording
from .schema import HOW_TO_RECORD, damaged, detect, one_line, open_capture

if TYPE_CHECKING:
    from ..attribution.batches import Limits

__all__ = [
    "as_sqlite",
    "expanded",
    "kind_of",
    "lacking",
    "rank_of",
    "read_file",
    "read_sqlite",
    "recording_of",
    "scrub",
    "uncollected",
]


_RANK = re.compile(r"(?<![a-z])rank[-_.]?(\d+)", re.IGNORECASE)


def read_file(
    path: Path, exact: bool = False, tick: Callable[[int], None] | None = None, window: Window = WHOLE
) -> list[Part]:
    """The processes of one file: a recording, a trace (Kineto, Chrome, speedscope), an SQLite export, or a .nsys-rep
    (where nsys is installed)."""
    rank = rank_of(path)
    kind = kind_of(path)
    if kind == "recording":
        part = load_recording(path, exact, window)
        if part.rank is None:
            part.rank = rank
        return [part]
    if kind == "spool":
        return [read_recording(read_spool(path), str(path), exact, window)]
    with as_sqlite(path, kind, tick) as sqlite:
        return read_sqlite(sqlite, exact, tick, rank, path, window)


def as_sqlite(path: Path, kind: str, tick: Callable[[int], None] | None = None) -> AbstractContextManager[Path]:
    """A capture of any kind but recording and spool as an SQLite file, for the duration of the block. A new kind of
    capture is recognised in kind_of() and converted here, and every command reads it."""
    if kind == "sqlite":
        return nullcontext(path)
    return exported(path, tick) if kind == "nsys-rep" else tabled(path) if kind == "tables" else converted(path)


def recording_of(path: Path, kind: str) -> Recording | None:
    """The recording that a file of this kind is, None where it is a capture."""
    return Recording.load(path) if kind == "recording" else read_spool(path) if kind == "spool" else None


def kind_of(path: Path) -> str:
    """recording, spool, trace, sqlite, nsys-rep or tables (a folder, or Arrow), by what the file begins with."""
    if path.suffix == SUFFIX:
        return "spool"
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode) and is_tables(path):
            return "tables"
        if stat.S_ISDIR(mode):
            raise CaptureError(f"{path} is a folder: name the captures in it")
        if not stat.S_ISREG(mode):
            raise CaptureError(f"{path} is a pipe or a device: captures are read from files, save it to one first")
        with open(path, "rb") as file:
            head = file.read(4096)
    except (OSError, ValueError) as error:
        raise CaptureError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if head.startswith(b"SQLite format 3\0"):
        return "sqlite"
    if path.suffix in {".nsys-rep", ".qdrep"}:
        return "nsys-rep"
    if is_gzip(head):
        return "trace"
    if is_arrow(head):
        return "tables"
    begin = head.lstrip()[:1]
    if begin == b"[" or (begin == b"{" and b'"fxnvtx-recording"' not in head and len(head.strip()) > 2):
        return "trace"
    if begin == b"{":
        return "recording"
    return "sqlite"  # whose reader says what is wrong with it


def rank_of(path: Path) -> int | None:
    """The rank that a file's name tells ("capture.rank3.sqlite"), or the folder it is in ("rank3/capture.sqlite")."""
    found = _RANK.findall(path.name) or _RANK.findall(path.absolute().parent.name)
    return int(found[-1]) if found else None


_RECORDING = b'"fxnvtx-recording"'


_LACKING = re.compile(rb'"meta": \{"captured": \d')  # what cli/run.py writes into a recording that has more


def expanded(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Each folder replaced by the captures in it, or else by the recordings: of one run, which are the same ranges,
    a capture knows more; unless it lost some of them, and knows of no device. A folder of tables, which nsys exported,
    is a capture itself. Raises CaptureError for a folder with neither."""
    found: list[Path] = []
    for path in map(Path, paths):
        found += _inside(path) if path.is_dir() else [path]
    return found


def _inside(folder: Path) -> list[Path]:
    if is_tables(folder):
        return [folder]
    captures = sorted(folder.glob("*.sqlite"))
    named = {path.stem for path in captures}
    captures += sorted(path for path in folder.glob("*.nsys-rep") if path.stem not in named)
    # what `fxnvtx run` could not gather, for it was killed or the process still runs, lies one folder below
    spools = sorted([*folder.glob(f"*{SUFFIX}"), *folder.glob(f".fxnvtx-run-*/*{SUFFIX}")])
    recordings = [*sorted(path for path in folder.glob("*.json") if _is_recording(path)), *spools]
    less = any(map(lacking, captures)) and not any(map(_knows_a_device, captures))
    found = recordings if less else captures or recordings
    if not found:
        raise CaptureError(f"{folder} is a folder without a capture or recording: name one that fxnvtx run -o wrote")
    return found


def lacking(capture: Path) -> list[Path]:
    """The recordings of the same run that have more ranges than the capture: of processes that nsys lost the end of."""
    if capture.name not in ("capture.sqlite", "capture.nsys-rep"):  # what `fxnvtx run --nsys` calls it
        return []
    return sorted(p for p in capture.parent.glob("recording*.json") if _LACKING.search(_beginning(p)))


def _knows_a_device(capture: Path) -> bool:
    """Whether there is device work in a capture, or no telling."""
    try:
        with contextlib.closing(open_capture(capture)) as connection:
            found = detect(connection, capture)
            tables = [t for t in (found.kernel, found.memcpy, found.memset, found.graph_trace) if t is not None]
            return any(connection.execute(f"SELECT 1 FROM {t.sql} LIMIT 1").fetchone() for t in tables)
    except (CaptureError, sqlite3.Error):
        return True


def _is_recording(path: Path) -> bool:
    return _RECORDING in _beginning(path)


def _beginning(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(200)
    except OSError:
        return b""


def read_sqlite(
    path: Path,
    exact: bool = False,
    tick: Callable[[int], None] | None = None,
    rank: int | None = None,
    shown: Path | None = None,
    window: Window = WHOLE,
    limits: Limits | None = None,
    adbc: bool = True,
) -> list[Part]:
    """One `Part` per process that emitted ranges or did device work.

    exact: keep the running numbers of torch's emit_nvtx in the names. tick: called now and then with the number of
    rows read since the last call. shown: the file that `path` was made from. limits: how many rows
    are in memory at a time. adbc: read columns through adbc-driver-sqlite, where it is installed. Raises CaptureError.
    """
    connection = open_capture(path)
    try:
        if tick is not None:
            # while SQLite sorts, no row comes out; this keeps whoever watches informed
            connection.set_progress_handler(lambda: tick(0), 5_000_000)
        with damaged(shown or path):
            schema = detect(connection, shown or path)
            reader = Reader(connection, schema, shown or path, exact, tick, window)
            parts = _parts(reader, path, limits, adbc)
            work, gpus = reader.entries, reader.gpus()
    finally:
        connection.close()
    for index, part in enumerate(parts):
        part.notes = [*reader.notes, *part.notes]
        part.rank = rank if rank is not None and len(parts) == 1 else None
        part.index = index
        part.work, part.gpus = work, gpus
    return parts


def _parts(reader: Reader, path: Path, limits: Limits | None, adbc: bool) -> list[Part]:
    """The processes that did anything; one without anything where the capture holds no more."""
    # not at the top: numpy is imported only when a capture is read
    from ..attribution.batches import Limits, Source
    from ..attribution.captures import Capture

    limits = limits or Limits()
    source = Source(reader.connection, path, limits.batch, adbc)
    capture = None
    parts = []
    try:
        with uncollected():
            capture = Capture(reader, source, limits)
            reader.last = capture.last
            reader.notes.extend(capture.notes)
            if capture.device.count and reader.schema.runtime is None:
                reader.notes.append("the export has no CUDA API calls: device work cannot be put under ranges")
            for pid in sorted(capture.pids):
                part = capture.part(pid)
                if reader.window.timeline:
                    part.timeline = reader.timeline(pid, part)
                parts.append(part)
    except OSError as error:
        raise CaptureError(
            f"{reader.path}: {error.strerror or error}; point SQLITE_TMPDIR to a disk with room for a copy of it"
        ) from error
    finally:
        if capture is not None:
            capture.close()
        source.close()
    parts = [part for part in parts if part.tree.root.children or part.side.root.children]
    if parts:
        return parts
    if not reader.has_ranges:
        raise CaptureError(f"{reader.path} holds neither NVTX ranges nor work of a device: {HOW_TO_RECORD}")
    reader.notes.append("the capture holds no push/pop range")
    return [Part(str(reader.path), 0)]


@contextmanager
def uncollected() -> Iterator[None]:
    """A growing tree is no garbage, but Python's collector would search it again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# ---------------------------------------------------------------------------------------------------------------------


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
    recording = recording_of(origin, kind)
    if recording is not None:
        recording.meta = {key: value for key, value in recording.meta.items() if key in _KEPT_RECORDING}
        return recording.save(goal)
    if kind == "trace":
        raise CaptureError(f"{origin} is a trace, which --scrub does not know: scrub the capture that it was made from")
    with as_sqlite(origin, kind) as sqlite:
        _scrub_sqlite(sqlite, goal)
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
