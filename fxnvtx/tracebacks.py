"""The program's own traceback is its own: what an uncaught error prints names no function of ours."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["show_only_the_programs_frames", "without_ours"]

_OURS = str(Path(__file__).resolve().parent)
_GENERATED = "<fxnvtx "  # levels.py prints forwards under such a file name


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
    """The same traceback without the frames of this package."""
    frames: list[TracebackType] = []
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    below: TracebackType | None = None
    for item in reversed(frames):
        name = item.tb_frame.f_code.co_filename
        if not name.startswith((_OURS, _GENERATED)):
            below = TracebackType(below, item.tb_frame, item.tb_lasti, item.tb_lineno)
    return below


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
