"""In every process of a launched program, right after torch has been imported: instrument, and record."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from . import ranges as _ranges
from .compile.torch_private import hide_module
from .everything import Everything
from .integrations.sglang import patch_older_releases
from .spool import Spool
from .steps import Numbers
from .tracebacks import show_only_the_programs_frames
from .window import Window

__all__ = ["arm"]


def arm(options: dict[str, str]) -> None:
    """options: "folder" for the recordings; "first" in the program's own process; "depth", "path", "stages-only",
    "infer-steps", "warmup" and "steps" as given to `fxnvtx run`, left out where they were not given."""
    if _ranges.mode == "off":
        return
    from . import loops, recording, spool, steps, window

    for module in (loops, recording, spool, steps, window):  # they run inside compiled regions
        hide_module(vars(module))
    depth = int(options["depth"]) if "depth" in options else None
    met = Everything(depth, options.get("path", "auto"), "stages-only" not in options)
    shown = None
    if "warmup" in options or "steps" in options:
        chosen = Numbers.read(options["steps"]) if "steps" in options else None
        shown = Window(int(options.get("warmup", 0)), chosen)
    folder = Path(options["folder"])
    with contextlib.suppress(OSError):  # the launcher has gone, and what we do is of no interest to it
        (folder / "armed").touch()
    kept = Spool(folder, "first" in options, shown, loops.Sites() if "infer-steps" in options else None)
    show_only_the_programs_frames()
    met.start()
    patch_older_releases()
    _ranges.add_sink(kept)
    os.register_at_fork(after_in_child=kept.forked)
