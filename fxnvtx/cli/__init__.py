"""The programs: `fxnvtx profile`, `run`, `report`, `diff`, `doctor`, and what runs inside a launched program.

Nothing is imported here. In a launched program this package is imported right after torch, where click may be missing.
"""

from __future__ import annotations

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """The console script: `arguments` as on a command line, those of this process where left out."""
    from .commands import cli

    cli.main(args=arguments, prog_name="fxnvtx", obj={"own_process": True})
