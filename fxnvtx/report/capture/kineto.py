"""Traces of other formats as a capture: Kineto (torch.profiler), Chrome's trace events, speedscope.

A trace becomes a temporary SQLite file with the tables of an Nsight Systems export: everything after it (nesting,
launches joined to device work, overlap, gaps) is the one reader's. Kernels are joined to their launch by correlation.
"""

from __future__ import annotations

import gzip
import itertools
import json
import sqlite3
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from ...categories import PIECE as PIECE_CATEGORY
from ...errors import CaptureError
from ..labels import PIECE, fused_owners

__all__ = ["CLOCKS_NS", "converted", "is_gzip", "settled"]


_TABLES = """
CREATE TABLE NVTX_EVENTS (start INTEGER, end INTEGER, eventType INTEGER, globalTid INTEGER, text TEXT, textId INTEGER,
  domainId INTEGER, category INTEGER, int64Value INTEGER);
CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, end INTEGER, globalTid INTEGER, correlationId INTEGER,
  nameId INTEGER, returnValue INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, end INTEGER, deviceId INTEGER, streamId INTEGER,
  correlationId INTEGER, globalPid INTEGER, demangledName INTEGER, gridX INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER, end INTEGER, deviceId INTEGER, streamId INTEGER,
  correlationId INTEGER, globalPid INTEGER, copyKind INTEGER, bytes INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMSET (start INTEGER, end INTEGER, deviceId INTEGER, streamId INTEGER,
  correlationId INTEGER, globalPid INTEGER, value INTEGER, bytes INTEGER);
CREATE TABLE ENUM_CUDA_MEMCPY_OPER (id INTEGER PRIMARY KEY, label TEXT);
CREATE TABLE META_DATA_EXPORT (name TEXT, value TEXT);
"""
# what a Kineto event is, by its category
_CALLS = {"cuda_runtime", "cuda_driver", "hip_runtime", "xpu_runtime", "privateuse1_runtime"}
_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_RANGES = {"cpu_op", "user_annotation", "python_function"}
_MODULE = "nn.Module: "  # of python_function events only these are ranges: the others are every Python function
_KINETO = {*_CALLS, *_DEVICE, "cpu_op"}
_OUR_DEVICES = 1_500_000_000  # the writer of our own Chrome traces gives devices process numbers above this
CLOCKS_NS = (
    2_000  # by so much a thread's clock may jump when it goes to another core: torch.profiler reads the core's own
)
_UNITS = {"nanoseconds": 1, "microseconds": 1_000, "milliseconds": 1_000_000, "seconds": 1_000_000_000}


def is_gzip(head: bytes) -> bool:
    return head.startswith(b"\x1f\x8b")


@contextmanager
def converted(path: Path) -> Iterator[Path]:
    """The trace as an SQLite file, for the duration of the block. Raises CaptureError."""
    with tempfile.TemporaryDirectory(prefix="fxnvtx-") as folder:
        target = Path(folder) / "trace.sqlite"
        document = _parsed(path)
        database = sqlite3.connect(target, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = OFF")
            database.execute("PRAGMA synchronous = OFF")
            database.executescript(_TABLES)
            database.execute("BEGIN")
            _fill(_Writer(database), document, path)
            database.execute("COMMIT")
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError, InvalidOperation) as error:
            raise CaptureError(f"{path} is a damaged trace ({error!r}): export it again") from error
        except sqlite3.Error as error:
            raise CaptureError(f"cannot read {path}: {error}; point SQLITE_TMPDIR to a disk with room") from error
        finally:
            database.close()
        del document
        yield target


def _parsed(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            zipped = is_gzip(file.read(2))
        with gzip.open(path, "rb") if zipped else open(path, "rb") as data:
            return json.load(data, parse_float=Decimal)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CaptureError(f"{path} is cut off or no gzip file: {error}") from error
    except OSError as error:
        raise CaptureError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CaptureError(f"{path} is neither an fxnvtx recording nor a trace: it is no JSON ({error})") from error


def _fill(writer: _Writer, document: Any, path: Path) -> None:
    if isinstance(document, list):
        _events(writer, document)
    elif isinstance(document, dict) and isinstance(document.get("traceEvents"), list):
        _events(writer, document["traceEvents"], "fxnvtx" in document)
    elif isinstance(document, dict) and "speedscope" in str(document.get("$schema", "")):
        _speedscope(writer, document, path)
    else:
        raise CaptureError(
            f"{path} is JSON, but no fxnvtx recording, Kineto or Chrome trace (traceEvents), or speedscope profile"
        )


class _Writer:
    """Rows of an export. Times are ns; processes and threads may be any value that identifies one."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.database = database
        self.texts: dict[str, int] = {}
        self.categories: dict[tuple[int, str], int] = {}
        self.threads: dict[tuple[Any, Any], int] = {}
        self.numbers: dict[Any, int] = {}

    def text(self, value: str) -> int:
        key = self.texts.get(value)
        if key is None:
            key = self.texts[value] = len(self.texts) + 1
            self.database.execute("INSERT INTO StringIds VALUES (?, ?)", (key, value))
        return key

    def process(self, pid: Any) -> int:
        """A global process number that keeps the process's own where it is one."""
        number = self.numbers.get(pid)
        if number is None:
            number = pid if type(pid) is int and 0 < pid < 1 << 23 else (1 << 23) + len(self.numbers)
            self.numbers[pid] = number
        return number << 24

    def thread(self, pid: Any, tid: Any) -> int:
        found = self.threads.get((pid, tid))
        if found is None:
            own = tid if type(tid) is int and 0 < tid < 1 << 23 else (1 << 23) + len(self.threads)
            found = self.threads[pid, tid] = self.process(pid) | own
        return found

    def range(
        self, thread: int, start: int, end: int | None, text: str, category: str | None, payload: int | None
    ) -> None:
        number = None
        if category is not None:
            key = (thread & ~0xFFFFFF, category)
            number = self.categories.get(key)
            if number is None:
                number = self.categories[key] = len(self.categories) + 1
                self.database.execute(
                    "INSERT INTO NVTX_EVENTS (start, eventType, globalTid, text, domainId, category)"
                    " VALUES (0, 33, ?, ?, 0, ?)",
                    (thread, category, number),
                )
        self.database.execute(
            "INSERT INTO NVTX_EVENTS (start, end, eventType, globalTid, textId, domainId, category, int64Value)"
            " VALUES (?, ?, 59, ?, ?, 0, ?, ?)",
            (start, end, thread, self.text(text), number, payload),
        )

    def call(self, thread: int, start: int, end: int, name: str, correlation: int) -> None:
        self.database.execute(
            "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?, ?, 0)",
            (start, end, thread, correlation, self.text(name)),
        )

    def operation(
        self, kind: str, process: int, device: int, stream: int, start: int, end: int, name: str, correlation: int,
        size: int,
    ) -> None:  # fmt: skip
        where = (start, end, device, stream, correlation, process)
        if kind == "gpu_memcpy":
            name = name.removeprefix("Memcpy ")
            key = self.text(name)
            self.database.execute("INSERT OR IGNORE INTO ENUM_CUDA_MEMCPY_OPER VALUES (?, ?)", (key, name))
            self.database.execute(
                "INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*where, key, size)
            )
        elif kind == "gpu_memset":
            self.database.execute(
                "INSERT INTO CUPTI_ACTIVITY_KIND_MEMSET VALUES (?, ?, ?, ?, ?, ?, 0, ?)", (*where, size)
            )
        else:
            self.database.execute(
                "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?, ?, ?, ?, 1)", (*where, self.text(name))
            )


# ------------------------------------------------------------------------------------------------ trace events


def _events(writer: _Writer, events: list[Any], annotated: bool = False) -> None:
    """Complete events (X), begins and ends (B, E); of Kineto's, launches and what they launched.

    annotated: fxnvtx's ranges are in this trace of torch.profiler (compile/listeners.py says so). Torch's own,
    operators and compiled regions, are then left out, and it reads like any other capture of those ranges.
    """
    ours = any(type(pid) is int and pid >= _OUR_DEVICES for pid in {_pid(event) for event in events})
    kineto = not ours and any(isinstance(event, dict) and event.get("cat") in _KINETO for event in events)
    begun: dict[tuple[Any, Any], list[tuple[int, str, str | None]]] = {}
    callers: dict[int, Any] = {}  # correlation -> process
    work: list[dict[str, Any]] = []
    ranges: list[tuple[int, int, int, str, str | None, int | None]] = []
    only: Any = None
    for event in events:
        phase = event.get("ph")
        if phase not in ("X", "B", "E"):
            continue
        category = event.get("cat")
        pid, tid = event.get("pid"), event.get("tid")
        start = _ns(event["ts"])
        if phase == "E":
            opened = begun.get((pid, tid))
            if opened:
                begin, text, known = opened.pop()
                writer.range(writer.thread(pid, tid), begin, max(start, begin), text, known, None)
            continue
        if category in _DEVICE and (kineto or (ours and type(pid) is int and pid >= _OUR_DEVICES)):
            work.append(event)
            continue
        text = str(event["name"])
        if phase == "B":
            begun.setdefault((pid, tid), []).append((start, text, None if kineto else category))
            continue
        end = start + max(0, _ns(event.get("dur", 0)))
        arguments = event.get("args") or {}
        correlation = arguments.get("correlation")
        if category in _CALLS and type(correlation) is int:
            callers.setdefault(correlation, pid)
            writer.call(writer.thread(pid, tid), start, end, text, correlation)
            continue
        if kineto and (category not in _RANGES or (category == "python_function" and not text.startswith(_MODULE))):
            continue
        if kineto and annotated and category != "user_annotation":
            continue
        only = pid if only is None else only
        payload = arguments.get("payload")
        known = PIECE_CATEGORY if payload == PIECE else _category(category, kineto)
        if annotated and known is None and fused_owners(text):
            known = "op"
        number = payload if type(payload) is int and abs(payload) < 1 << 63 else None
        ranges.append((writer.thread(pid, tid), start, end, text.removeprefix(_MODULE), known, number))
    if annotated:
        ranges.sort(key=lambda row: (row[0], row[1], -row[2]))
        for thread, rows in itertools.groupby(ranges, key=lambda row: row[0]):
            own = list(rows)
            for (start, end), row in zip(settled([row[1:3] for row in own]), own, strict=True):
                writer.range(thread, start, end, *row[3:])
    else:
        for row in ranges:
            writer.range(*row)
    for (pid, tid), opened in begun.items():
        for begin, text, known in opened:
            writer.range(writer.thread(pid, tid), begin, None, text, known, None)
    for event in work:
        _device(writer, event, callers, only)


def settled(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Starts and ends, in ns, of ranges that were properly nested on one thread, without what its clock adds.

    spans: by start, the outer one of two first. One that reaches over the end of another by CLOCKS_NS or less ends with
    it; one that begins so little before another's end begins with that end. What overlaps by more was not nested, and
    stays as it is.
    """
    found = []
    ends: list[int] = []
    for start, end in spans:
        while ends and (ends[-1] <= start or end > ends[-1]):
            late, early = end - ends[-1], ends[-1] - start
            if early > 0 and late <= early:
                end = ends[-1] if late <= CLOCKS_NS else end
                break
            if early > CLOCKS_NS:
                break
            start = max(start, ends.pop())
        ends.append(end)
        found.append((start, end))
    return found


def _pid(event: Any) -> Any:
    pid = event.get("pid") if isinstance(event, dict) else None
    return pid if isinstance(pid, (int, str)) else None


def _device(writer: _Writer, event: dict[str, Any], callers: dict[int, Any], only: Any) -> None:
    arguments = event.get("args") or {}
    correlation = arguments.get("correlation")
    correlation = correlation if type(correlation) is int else -1
    device = arguments.get("device", event.get("pid"))
    stream = arguments.get("stream", event.get("tid"))
    if type(device) is int and device >= _OUR_DEVICES:
        device -= _OUR_DEVICES
    start = _ns(event["ts"])
    size = arguments.get("bytes")
    writer.operation(
        str(event["cat"]),
        writer.process(callers.get(correlation, only)),
        device if type(device) is int else 0,
        stream if type(stream) is int else 0,
        start,
        start + max(0, _ns(event.get("dur", 0))),
        str(event["name"]),
        correlation,
        size if type(size) is int else 0,
    )  # fmt: skip


def _category(category: Any, kineto: bool) -> str | None:
    """Kineto's categories say where an event came from, not what it is: its text does."""
    return None if kineto or not isinstance(category, str) or not category else category


def _ns(microseconds: Any) -> int:
    if isinstance(microseconds, Decimal):
        return int((microseconds * 1000).to_integral_value())
    return int(microseconds) * 1000


# ------------------------------------------------------------------------------------------------ speedscope


def _speedscope(writer: _Writer, document: dict[str, Any], path: Path) -> None:
    frames = [str(frame["name"]) for frame in document["shared"]["frames"]]
    for number, profile in enumerate(document["profiles"]):
        if profile["type"] != "evented":
            raise CaptureError(f"{path} is a sampled speedscope profile: only evented ones hold ranges")
        scale = Decimal(_UNITS[profile["unit"]])
        name = str(profile.get("name", ""))
        process, _, device = name.partition(", GPU ")
        pid, thread = _numbers(process, name, number)
        stack: list[tuple[int, int]] = []
        rows: list[tuple[int, int, str]] = []
        for event in profile["events"]:
            at = int((event["at"] * scale).to_integral_value())
            if event["type"] == "O":
                stack.append((at, event["frame"]))
            else:
                start, frame = stack.pop()
                if frame != event["frame"]:
                    raise ValueError("a frame is closed that is not the innermost one")
                rows.append((start, at, frames[frame]))
        if device:
            numbers = [int(word) for word in device.split() if word.isdecimal()]
            where = [*numbers, 0, 0][:2]
            for start, end, text in rows:
                writer.operation("kernel", writer.process(pid), where[0], where[1], start, end, text, -1, 0)
        else:
            for start, end, text in reversed(rows):  # outer ones first, as they began
                writer.range(writer.thread(pid, thread), start, end, text, None, None)


def _numbers(process: str, name: str, number: int) -> tuple[Any, Any]:
    """Process and thread that the writer of our own profiles put into the name: "process 7, thread 1"."""
    before, _, thread = process.partition(", thread ")
    words = before.split()
    pid = int(words[-1]) if len(words) > 1 and words[-1].isdecimal() else before or "profile"
    return pid, int(thread) if thread.isdecimal() else f"{name} {number}"
