"""A folder in place of a capture: what one run left there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import CaptureError
from ..spool import SUFFIX
from .tables import is_tables

__all__ = ["expanded"]

_RECORDING = b'"fxnvtx-recording"'


def expanded(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Each folder replaced by the captures in it, or else by the recordings: of one run, which are the same ranges,
    a capture knows more. A folder of tables, which nsys exported, is a capture itself. Raises CaptureError for a folder
    with neither."""
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
    found = captures or [*sorted(path for path in folder.glob("*.json") if _is_recording(path)), *spools]
    if not found:
        raise CaptureError(f"{folder} is a folder without a capture or recording: name one that fxnvtx run -o wrote")
    return found


def _is_recording(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return _RECORDING in file.read(200)
    except OSError:
        return False
