"""Starting Nsight Systems: once more where it leaves no file."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fxnvtx.errors import ToolError

__all__ = ["with_capture"]

T = TypeVar("T")


def with_capture(run: Callable[[], T], left: Path) -> T:
    """What `run` returns. Where nsys itself ends without the file `left` (seen under load), it is run a second time,
    with a warning that says so; what comes then is returned, or raised, as it is."""
    try:
        done = run()
        if left.exists():
            return done
        why = "nsys ended without a file"
    except ToolError as error:
        why = str(error)
    warnings.warn(f"{why}; tried once more ({left.name})", stacklevel=2)
    return run()
