"""A .nsys-rep through the installed nsys: exported to a temporary SQLite file, removed afterwards."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CaptureError, ToolError

__all__ = ["exported"]


@contextmanager
def exported(path: Path, tick: Callable[[int], None] | None = None) -> Iterator[Path]:
    """The SQLite export of a .nsys-rep, for the duration of the block. tick: called with 0 while nsys works."""
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
        log = Path(folder) / "log"
        command = [nsys, "export", "--type", "sqlite", "--force-overwrite", "true", "--output", str(target), str(path)]
        with open(log, "wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
            while True:
                try:
                    code = process.wait(0.5)
                    break
                except subprocess.TimeoutExpired:
                    if tick is not None:
                        tick(0)
        if code or not target.exists():
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise ToolError(f"nsys could not export {path}: {_reason(said, code).replace(str(target), 'its export')}")
        yield target


def _reason(said: list[str], code: int) -> str:
    """The line of nsys that tells most: of a file that a newer one wrote, the line that says which."""
    lines = [" ".join(line.split()) for line in said if line.strip()]
    for word in ("newer", "created", "version"):
        telling = [line for line in lines if word in line.lower()]
        if telling:
            return f"{telling[0]} (use the nsys that wrote it)"
    return f"{lines[-1] if lines else f'exit code {code}'}; a newer nsys wrote it perhaps: use that one"
