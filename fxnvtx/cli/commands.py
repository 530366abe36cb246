"""The command line: profile, run, report, diff, doctor. Errors in one line; exit codes 0, 1 (error), 2 (usage)."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import click

from .. import import_quietly
from ..errors import FxnvtxError, OutputError
from ..output import complain

__all__ = ["cli", "writable_folder"]

# name -> (module, attribute): a command is imported when it is used
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
