"""The command line: profile, run, report, diff, doctor; and what these share: the output folder, an installed nsys.

Errors in one line; exit codes 0, 1 (error), 2 (usage). A command is imported when it is used.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .. import import_quietly
from ..errors import FxnvtxError, OutputError, ToolError
from ..output import complain

__all__ = ["around", "capture", "cli", "find_nsys", "main", "nsys_version", "ranges_kept", "writable_folder"]

# name -> (module, attribute)
_COMMANDS = {
    "profile": ("fxnvtx.cli.profile", "profile_command"),
    "run": ("fxnvtx.cli.run", "run_command"),
    "report": ("fxnvtx.report.commands", "report_command"),
    "diff": ("fxnvtx.report.commands", "diff_command"),
    "doctor": ("fxnvtx.cli.doctor", "doctor_command"),
}


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_quietly(module), attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FxnvtxError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            complain(f"fxnvtx: {error}")
            sys.exit(1)
        except BrokenPipeError:  # `fxnvtx report ... | head`
            sys.stderr.close()
            sys.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="fxnvtx")
def cli(debug: bool) -> None:
    """A diffusion model's own structure as NVTX ranges, and captures as a per-layer table."""


def main(arguments: list[str] | None = None) -> None:
    """The console script: `arguments` as on a command line, those of this process where left out."""
    cli.main(args=arguments, prog_name="fxnvtx", obj={"own_process": True})


def writable_folder(path: Path) -> Path:
    """The output folder, made where it is missing; OutputError where it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".fxnvtx-write-test"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror or error}; choose another with -o") from error
    return path


# ---------------------------------------------------------------------------------------------- Nsight Systems


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
