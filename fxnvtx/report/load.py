"""From paths to a report: which reader reads what, and several files side by side."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..errors import CaptureError
from ..recording import Recording
from .capture import expanded
from .capture.recording import read_recording
from .gather import gather
from .part import WHOLE, Window
from .report import Report
from .work import Peaks

__all__ = ["from_recording", "load"]


def from_recording(recording: Recording, source: str = "this process", peak: Peaks | None = None) -> Report:
    """The report of what `fxnvtx.record()` collected. peak: what the device can do, see peaks.parse_peaks."""
    return Report([read_recording(recording, source, window=replace(WHOLE, timeline=True))], peak)


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
