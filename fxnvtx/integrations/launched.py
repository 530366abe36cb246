"""In every process of a launched program, right after torch has been imported: instrument, and record.

The program's own traceback stays its own: what an uncaught error prints names no function of ours.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from .. import ranges as _ranges
from ..categories import Numbers
from ..compile.torch_private import hide_module
from ..ranges import emit
from ..recording.spool import Spool, Window
from .everything import Everything
from .sglang import patch_older_releases

__all__ = ["arm"]

_as_long_as_the_process = contextlib.ExitStack()
_OURS = str(Path(__file__).resolve().parents[1])
_GENERATED = "<fxnvtx "  # modules/traced_forward.py prints forwards under such a file name


def arm(options: dict[str, str]) -> None:
    """options: "folder" for the recordings; "first" in the program's own process; "depth", "path", "stages-only",
    "infer-steps", "work", "warmup" and "steps" as given to `fxnvtx run`, left out where they were not given."""
    if emit.mode == "off":
        return
    from .. import categories, recording
    from ..recording import loops, spool

    for module in (categories, loops, recording, spool):  # they run inside compiled regions
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
    if "work" in options:
        _as_long_as_the_process.enter_context(recording.metering())
    patch_older_releases()
    _ranges.add_sink(kept)
    os.register_at_fork(after_in_child=kept.forked)


# ---------------------------------------------------------------------------------------------------- tracebacks


def show_only_the_programs_frames() -> None:
    """From now on, in this process, for errors that nobody catches, in any thread."""
    main, other = sys.excepthook, threading.excepthook

    def uncaught(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> Any:
        _clean(value)
        return main(kind, value, without_ours(trace))

    def uncaught_in_thread(args: Any) -> Any:
        _clean(args.exc_value)
        return other(args)

    sys.excepthook = uncaught
    threading.excepthook = uncaught_in_thread


def without_ours(trace: TracebackType | None) -> TracebackType | None:
    """The same traceback without the frames of this package; a generated forward shows as the module's own."""
    frames: list[TracebackType] = []
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    below: TracebackType | None = None
    for item in reversed(frames):
        name = item.tb_frame.f_code.co_filename
        if name.startswith(_GENERATED):
            stand_in = _stood_in_for(item)
            if stand_in is not None:  # -1: no column, which would be one of the stand-in's own text
                below = TracebackType(below, stand_in.tb_frame, -1, stand_in.tb_lineno)
        elif not name.startswith(_OURS):
            below = TracebackType(below, item.tb_frame, item.tb_lasti, item.tb_lineno)
    return below


def _stood_in_for(item: TracebackType) -> TracebackType | None:
    """For a generated forward: a frame with the name and file of the module's own, at the line where that begins."""
    module = item.tb_frame.f_locals.get("self")
    code = getattr(getattr(type(module), "forward", None), "__code__", None)
    if code is None:
        return None
    lines = "\n" * (code.co_firstlineno - 1) + "raise LookupError"
    try:
        exec(compile(lines, code.co_filename, "exec").replace(co_name=code.co_name), {})
    except LookupError as error:
        return error.__traceback__.tb_next if error.__traceback__ is not None else None
    return None


def _clean(value: BaseException | None) -> None:
    """The error, and those that it came from or came up during, each once."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        cleaned = without_ours(one.__traceback__)
        if cleaned is not None:  # an error of our own is shown whole
            one.__traceback__ = cleaned
        todo += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
