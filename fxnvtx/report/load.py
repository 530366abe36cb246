"""From paths to a report: which reader reads what, and several files side by side."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from ..errors import CaptureError
from ..recording import Recording
from ..spool import SUFFIX, read_spool
from .export import exported
from .folder import expanded
from .gather import gather
from .nsys import read_sqlite
from .part import Part
from .recording import load_recording, read_recording
from .report import Report

__all__ = ["from_recording", "load", "read_file"]

_RANK = re.compile(r"(?<![a-z])rank[-_.]?(\d+)", re.IGNORECASE)


def from_recording(recording: Recording, source: str = "this process") -> Report:
    """The report of what `fxnvtx.record()` collected."""
    return Report([read_recording(recording, source)])


def read_file(path: Path, exact: bool = False, tick: Callable[[int], None] | None = None) -> list[Part]:
    """The processes of one file: a recording, an SQLite export, or a .nsys-rep (where nsys is installed)."""
    rank = rank_of(path)
    kind = kind_of(path)
    if kind == "recording":
        part = load_recording(path, exact)
        if part.rank is None:
            part.rank = rank
        return [part]
    if kind == "spool":
        return [read_recording(read_spool(path), str(path), exact)]
    if kind == "nsys-rep":
        with exported(path, tick) as sqlite:
            parts = read_sqlite(sqlite, exact, tick, rank)
        for part in parts:
            part.source = str(path)
        return parts
    return read_sqlite(path, exact, tick, rank)


def kind_of(path: Path) -> str:
    """recording, spool, sqlite or nsys-rep, by what the file begins with."""
    if path.suffix == SUFFIX:
        return "spool"
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CaptureError(f"cannot read {path}: {error.strerror or error}") from error
    if head.startswith(b"SQLite format 3\0"):
        return "sqlite"
    if path.suffix in {".nsys-rep", ".qdrep"}:
        return "nsys-rep"
    if head.lstrip()[:1] == b"{":
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
) -> Report:
    """Read captures and recordings, several at once in parallel processes, into one report.

    exact: keep the running numbers that torch's emit_nvtx puts into names. jobs: how many processes read (default: as
    many as pay, up to the number of cores). tick: called with the number of rows read since the last call.
    Raises CaptureError, in one line, for a file that cannot be read.
    """
    if not paths:
        raise CaptureError("no capture given: name at least one .sqlite, .nsys-rep or recording")
    return Report(gather(expanded(paths), exact, jobs, tick))
