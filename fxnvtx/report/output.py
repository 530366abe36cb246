"""Writing a result so that a half-written file never looks like a whole one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ..errors import OutputError

__all__ = ["write_text", "writing"]


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """A text file that takes its name only when the block ends well. Raises OutputError."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        file = open(partial, "w", encoding="utf-8", newline="")  # noqa: SIM115 - closed below, before the rename
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        with file:
            yield file
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    with writing(path) as file:
        file.write(text)
    return Path(path)
