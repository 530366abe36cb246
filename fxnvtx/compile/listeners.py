"""fxnvtx's ranges in the trace of torch.profiler, and on ROCm in AMD's profilers.

While a session of torch.profiler is on, each range is a user annotation. The one file that speaks to torch's profiler.
Private entry points, asked for by name and seen in torch 2.13; where one is missing, torch.profiler shows what it shows
without fxnvtx:

- `torch.autograd.profiler._run_on_profiler_start` and `_run_on_profiler_stop` run at every start and stop of a session
  (torch.profiler.profile, each active window of a schedule, the autograd profiler). Wrapping them tells us without
  asking at every range, and without a listener while no session is on.
- `torch.autograd._add_metadata_json` (what Profiler.add_metadata_json calls) notes in the trace that it has ranges of
  ours, so that the report leaves out torch's own.
- `torch.autograd._record_function_with_args_enter` and `_exit` are what torch.profiler.record_function stands for,
  without its dispatcher call: about 1.3 us a range and not 5.

On ROCm the same ranges go to roctx, which AMD's profilers listen to; the nvtx package reaches only NVIDIA's tools.
torch.cuda.nvtx is roctx in a ROCm build of torch. Only the choice is tested: no ROCm device has run this.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from .. import ranges as _ranges
from ..ranges import Mark, Open, emit
from .torch_private import hide_module

__all__ = ["METADATA", "ProfilerListener", "RoctxListener", "chosen", "follow_sessions", "listen_on_rocm"]

METADATA = "fxnvtx"  # the key in a trace; report/capture/kineto.py reads it


class ProfilerListener:
    """What happens to a range while a session is on. The profiler hears the threads that it follows, no others."""

    def __init__(self, enter: Callable[[str], Any], leave: Callable[[Any], object]) -> None:
        self._enter = enter
        self._leave = leave
        self._handles: dict[int, Any] = {}  # by id() of the open range: each thread touches its own only
        self._noted = False

    def opened(self, entry: Open) -> None:
        if not self._noted:
            self._noted = True
            _note()
        self._handles[id(entry)] = self._enter(entry.label.text)

    def closed(self, entry: Open) -> None:
        handle = self._handles.pop(id(entry), None)
        if handle is not None:  # else the range began before the session
            self._leave(handle)

    def marked(self, mark: Mark) -> None:
        """A trace has no place for an instant that lies in no operator."""

    def stray_pop(self) -> None: ...

    def session_over(self) -> None:
        """Let go of the ranges that are still open: what ends after the session is not in its trace."""
        handles, self._handles = self._handles, {}
        while True:
            try:
                _, handle = handles.popitem()  # the last first; each once, though another thread may be closing too
            except KeyError:
                return
            self._leave(handle)


class _Sessions:
    """How many sessions are on, and the listener that is there meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._listener: ProfilerListener | None = None

    def started(self) -> None:
        with self._lock:
            self._count += 1
            if self._listener is None and emit.mode != "off":
                self._listener = _make_listener()
                if self._listener is not None:
                    _ranges.add_sink(self._listener)

    def stopped(self) -> None:
        with self._lock:
            self._count = max(0, self._count - 1)
            if not self._count and self._listener is not None:
                listener, self._listener = self._listener, None
                _ranges.remove_sink(listener)
                listener.session_over()


def _make_listener() -> ProfilerListener | None:
    autograd = sys.modules.get("torch.autograd")
    enter = getattr(autograd, "_record_function_with_args_enter", None)
    leave = getattr(autograd, "_record_function_with_args_exit", None)
    return ProfilerListener(enter, leave) if callable(enter) and callable(leave) else None


def _note() -> None:
    """At the first range, because a session that is over takes no more of it."""
    add = getattr(sys.modules.get("torch.autograd"), "_add_metadata_json", None)
    if callable(add):
        add(METADATA, '{"ranges": "user_annotation"}')  # a literal: Dynamo may watch what is called here


def follow_sessions(profiler: ModuleType) -> None:
    """Listen while a session is on. `profiler` is torch.autograd.profiler; the rest of torch may not be there yet."""
    start = getattr(profiler, "_run_on_profiler_start", None)
    stop = getattr(profiler, "_run_on_profiler_stop", None)
    if not (callable(start) and callable(stop)):
        return
    sessions = _Sessions()

    @functools.wraps(start)
    def started(*args: Any, **kwargs: Any) -> Any:
        sessions.started()
        return start(*args, **kwargs)

    @functools.wraps(stop)
    def stopped(*args: Any, **kwargs: Any) -> Any:
        sessions.stopped()
        return stop(*args, **kwargs)

    profiler.__dict__.update(_run_on_profiler_start=started, _run_on_profiler_stop=stopped)


# ---------------------------------------------------------------------------------------------------------------- ROCm

# What rocprof, rocprofv2 and rocprofv3 set in the processes that they watch (the last preloads its library too).
_TOOLS = ("HSA_TOOLS_LIB", "ROCP_TOOL_LIB", "ROCP_TOOL_LIBRARIES")


def chosen(hip: str | None, mode: str, environment: Mapping[str, str]) -> bool:
    """Whether ranges go to roctx. hip: torch.version.hip, None where torch is no ROCm build. mode: FXNVTX's auto, on or
    off; with auto, one of AMD's profilers must be there."""
    if hip is None or mode == "off":
        return False
    return mode == "on" or any(name in environment for name in _TOOLS) or "rocprof" in environment.get("LD_PRELOAD", "")


class RoctxListener:
    """Pushes and pops as ranges begin and end; starts and ends those that may cross others."""

    def __init__(
        self,
        push: Callable[[str], object],
        pop: Callable[[], object],
        mark: Callable[[str], object],
        start: Callable[[str], object],
        end: Callable[[object], object],
    ) -> None:
        self._push = push
        self._pop = pop
        self._mark = mark
        self._start = start
        self._end = end
        self._heard: set[int] = set()  # ranges that were pushed, by id(): each thread touches its own only
        self._started: dict[int, object] = {}  # and those that were started, with what ends them

    def opened(self, entry: Open) -> None:
        if entry.crossing:
            self._started[id(entry)] = self._start(entry.label.text)
            return
        self._push(entry.label.text)
        self._heard.add(id(entry))

    def closed(self, entry: Open) -> None:
        if id(entry) in self._heard:  # else it began before this was there
            self._heard.discard(id(entry))
            self._pop()
        elif id(entry) in self._started:
            self._end(self._started.pop(id(entry)))

    def marked(self, mark: Mark) -> None:
        self._mark(mark.label.text)

    def stray_pop(self) -> None: ...


def listen_on_rocm(hip: str) -> None:
    """Start to listen where `chosen`. torch.cuda.nvtx is asked for at the first range: torch is only being imported."""
    if chosen(hip, emit.mode, os.environ):
        _ranges.add_sink(RoctxListener(*map(_nvtx, ("range_push", "range_pop", "mark", "range_start", "range_end"))))


def _nvtx(name: str) -> Callable[..., object]:
    def call(*args: object) -> object:
        import torch

        return getattr(torch.cuda.nvtx, name)(*args)

    return call


hide_module(globals())  # a listener is called inside compiled regions
