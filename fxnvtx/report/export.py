"""A .nsys-rep through the installed nsys: exported to a temporary SQLite file, removed afterwards."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CaptureError, ToolError

__all__ = ["exported"]


@contextmanager
def exported(path: Path) -> Iterator[Path]:
    """The SQLite export of a .nsys-rep, for the duration of the block."""
    if not path.stat().st_size:
        raise CaptureError(f"{path} is empty: the recording did not finish")
    nsys = shutil.which("nsys")
    if nsys is None:
        raise ToolError(
            f"{path} needs nsys to be read and nsys is not on the PATH: install Nsight Systems, or run"
            f" `nsys export --type sqlite {path.name}` where it is and give the .sqlite"
        )
    with tempfile.TemporaryDirectory(prefix="fxnvtx-") as folder:
        target = Path(folder) / (path.stem + ".sqlite")
        done = subprocess.run(
            [nsys, "export", "--type", "sqlite", "--force-overwrite", "true", "--output", str(target), str(path)],
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode or not target.exists():
            said = (done.stderr or done.stdout).strip().splitlines()
            raise ToolError(
                f"nsys could not export {path}: {said[-1] if said else f'exit code {done.returncode}'};"
                " a newer nsys wrote it perhaps: use that one"
            )
        yield target
