"""From paths to a report: which reader reads what, and several files side by side."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from ..errors import CaptureError
from ..recording import Recording
from ..spool import SUFFIX, read_spool
from .export import exported
from .folder import expanded
from .gather import gather
from .nsys import read_sqlite
from .part import WHOLE, Part, Window
from .recording import load_recording, read_recording
from .report import Report
from .tables import is_tables, tabled
from .trace import converted, is_gzip
from .work import Peaks

__all__ = ["from_recording", "load", "read_file"]

_RANK = re.compile(r"(?<![a-z])rank[-_.]?(\d+)", re.IGNORECASE)


def from_recording(recording: Recording, source: str = "this process", peak: Peaks | None = None) -> Report:
    """The report of what `fxnvtx.record()` collected. peak: what the device can do, see peaks.parse_peaks."""
    return Report([read_recording(recording, source, window=replace(WHOLE, timeline=True))], peak)


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
    if kind == "sqlite":
        return read_sqlite(path, exact, tick, rank, window=window)
    with as_sqlite(path, kind, tick) as sqlite:
        return read_sqlite(sqlite, exact, tick, rank, path, window)


def as_sqlite(path: Path, kind: str, tick: Callable[[int], None] | None = None) -> AbstractContextManager[Path]:
    """What is no SQLite file yet (kind: nsys-rep, tables or trace) as one, for the duration of the block."""
    return exported(path, tick) if kind == "nsys-rep" else tabled(path) if kind == "tables" else converted(path)


def kind_of(path: Path) -> str:
    """recording, spool, trace, sqlite, nsys-rep or (a folder) tables, by what the file begins with."""
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


def load(
    *paths: str | os.PathLike[str],
    exact: bool = False,
    jobs: int | None = None,
    tick: Callable[[int], None] | None = None,
    window: Window = WHOLE,
    peak: Peaks | None = None,
) -> Report:
    """Read captures, traces and recordings, several at once in parallel processes, into one report.

    exact: keep the running numbers that torch's emit_nvtx puts into names. jobs: how many processes read (default: as
    many as pay, up to the number of cores). tick: called with the number of rows read since the last call. window:
    which requests and steps count. peak: what the device can do, before what is known of it. Raises CaptureError, in
    one line, for a file that cannot be read.
    """
    if not paths:
        raise CaptureError("no capture given: name at least one .sqlite, .nsys-rep or recording")
    files: dict[object, Path] = {}
    again: list[Path] = []
    for path in expanded(paths):
        try:
            found = path.stat()
            identity: object = (found.st_dev, found.st_ino)
        except (OSError, ValueError):
            identity = path  # its reader says what is wrong with it
        if identity in files:
            again.append(path)
        else:
            files[identity] = path
    report = Report(gather(list(files.values()), exact, jobs, tick, window=window), peak)
    report.notes.extend(f"{path} was named twice and read once" for path in again)
    return report
