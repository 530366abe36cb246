"""On ROCm the same ranges go to roctx, which AMD's profilers listen to; the nvtx package reaches only NVIDIA's tools.

torch.cuda.nvtx is roctx in a ROCm build of torch. Only the choice is tested: no ROCm device has run this.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from .. import ranges as _ranges
from ..ranges import Mark, Open
from .torch_private import hide_module

__all__ = ["RoctxListener", "chosen", "listen_on_rocm"]

# What rocprof, rocprofv2 and rocprofv3 set in the processes that they watch (the last preloads its library too).
_TOOLS = ("HSA_TOOLS_LIB", "ROCP_TOOL_LIB", "ROCP_TOOL_LIBRARIES")


def chosen(hip: str | None, mode: str, environment: Mapping[str, str]) -> bool:
    """Whether ranges go to roctx. hip: torch.version.hip, None where torch is no ROCm build. mode: FXNVTX's auto, on or
    off; with auto, one of AMD's profilers must be there."""
    if hip is None or mode == "off":
        return False
    return mode == "on" or any(name in environment for name in _TOOLS) or "rocprof" in environment.get("LD_PRELOAD", "")


class RoctxListener:
    """Pushes and pops as ranges begin and end."""

    def __init__(self, push: Callable[[str], object], pop: Callable[[], object], mark: Callable[[str], object]) -> None:
        self._push = push
        self._pop = pop
        self._mark = mark
        self._heard: set[int] = set()  # ranges that were pushed, by id(): each thread touches its own only

    def opened(self, entry: Open) -> None:
        self._push(entry.label.text)
        self._heard.add(id(entry))

    def closed(self, entry: Open) -> None:
        if id(entry) in self._heard:  # else it began before this was there
            self._heard.discard(id(entry))
            self._pop()

    def marked(self, mark: Mark) -> None:
        self._mark(mark.label.text)

    def stray_pop(self) -> None: ...


def listen_on_rocm(hip: str) -> None:
    """Start to listen where `chosen`. torch.cuda.nvtx is asked for at the first range: torch is only being imported."""
    if chosen(hip, _ranges.mode, os.environ):
        _ranges.add_sink(RoctxListener(_nvtx("range_push"), _nvtx("range_pop"), _nvtx("mark")))


def _nvtx(name: str) -> Callable[..., object]:
    def call(*args: str) -> object:
        import torch

        return getattr(torch.cuda.nvtx, name)(*args)

    return call


hide_module(globals())
