"""Running a command under an installed Nsight Systems."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..errors import ToolError

__all__ = ["around", "capture", "find_nsys", "nsys_version", "ranges_kept"]


def find_nsys() -> str | None:
    return shutil.which("nsys")


def nsys_version(nsys: str) -> str:
    """The version line of an nsys; raises ToolError where it does not run."""
    try:
        done = subprocess.run([nsys, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolError(f"{nsys} does not run: {error}") from error
    lines = (done.stdout or done.stderr).strip().splitlines()
    if done.returncode or not lines:
        raise ToolError(f"{nsys} --version failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return lines[-1]


def capture(command: Sequence[str], target: Path, *, cuda: bool = False) -> Path:
    """Run `command` under nsys; writes target.nsys-rep and target.sqlite and returns the latter.

    What the command and nsys print is kept for the error message alone. Raises ToolError with the last of it.
    """
    nsys = find_nsys()
    if nsys is None:
        raise ToolError("nsys is not on the PATH: install NVIDIA Nsight Systems, or use --no-nsys")
    traced = "nvtx,cuda" if cuda else "nvtx"
    options = [f"--trace={traced}", "--sample=none", "--cpuctxsw=none", "--export=sqlite", "--force-overwrite=true"]
    if cuda:
        options.append("--cuda-graph-trace=node")
    try:
        done = subprocess.run(
            [nsys, "profile", *options, "-o", str(target), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise ToolError(f"{nsys} does not run: {error}") from error
    exported = target.with_name(target.name + ".sqlite")
    words = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    own = [line for line in words if line.startswith("fxnvtx: ")]  # the command failed, and said why
    if own:
        raise ToolError(own[-1].removeprefix("fxnvtx: "))
    if done.returncode or not exported.is_file():
        last = words[-1] if words else f"exit code {done.returncode}"
        raise ToolError(f"nsys profile failed: {last}; try again with --no-nsys")
    return exported


def around(command: Sequence[str], target: Path, capture_range: str | None = None) -> list[str]:
    """The words that run `command` and all processes it starts under nsys, as ever but for target.nsys-rep.

    capture_range: begin the capture with the first range of this label and end it with that range.
    """
    nsys = find_nsys()
    if nsys is None:
        raise ToolError("nsys is not on the PATH: install NVIDIA Nsight Systems, or leave --nsys out")
    # fork: pools made by os.fork or a forkserver run no exec, after which nsys would look by itself. Without this the
    # first worker of a forkserver was seen to die under nsys 2023.4.
    options = ["--trace=nvtx,cuda", "--cuda-graph-trace=node", "--trace-fork-before-exec=true", "--sample=none"]
    options += ["--cpuctxsw=none", "--force-overwrite=true", "--wait=all", "--export=sqlite"]
    if capture_range is not None:
        options += ["--capture-range=nvtx", f"--nvtx-capture={capture_range}@fxnvtx", "--capture-range-end=stop"]
    return [nsys, "profile", *options, "-o", str(target), *command]


def ranges_kept(exported: Path) -> dict[int, int]:
    """How many of fxnvtx's ranges an exported capture holds, by process; empty where it cannot be read."""
    try:
        with contextlib.closing(sqlite3.connect(f"{exported.resolve().as_uri()}?mode=ro", uri=True)) as file:
            rows = file.execute(
                "SELECT (globalTid >> 24) & 0xFFFFFF, count(*) FROM NVTX_EVENTS WHERE eventType = 59 AND domainId IN "
                "(SELECT domainId FROM NVTX_EVENTS WHERE eventType = 75 AND text = 'fxnvtx') GROUP BY 1"
            )
            return dict(rows.fetchall())
    except sqlite3.Error:
        return {}
