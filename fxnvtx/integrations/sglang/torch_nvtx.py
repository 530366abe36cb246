"""Ranges that go through torch.cuda.nvtx, as SGLang's own do, for those who listen there and not to NVTX: whoever puts
functions of their own in the place of torch's (a test, another tracer) wants to be called. Roctx is
compile/listeners.py's.

Nothing is asked at a range: the module notices when one of its functions is replaced.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

from ... import ranges
from ...compile import when_imported
from ...ranges import emit
from .targets import guarded

__all__ = ["also_through_torch"]

NAMES = ("range_push", "range_pop", "mark")


class TorchNvtx:
    """A listener (see stack.Live) that calls what stands in the module now."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._open: set[int] = set()  # id() of the ranges whose push went through

    @guarded
    def opened(self, entry: ranges.Open) -> None:
        self._module.range_push(entry.label.text)
        self._open.add(id(entry))

    @guarded
    def closed(self, entry: ranges.Open) -> None:
        if id(entry) in self._open:
            self._open.discard(id(entry))
            self._module.range_pop()

    @guarded
    def marked(self, mark: ranges.Mark) -> None:
        if replaced(self._module, "mark"):
            self._module.mark(mark.label.text)

    def stray_pop(self) -> None: ...


def also_through_torch() -> None:
    """Let fxnvtx's ranges go through torch.cuda.nvtx too while somebody listens there. Idempotent; imports no torch."""
    when_imported("torch.cuda.nvtx", _watch)


def _watch(module: ModuleType) -> None:
    if getattr(type(module), "fxnvtx_watches", False):
        return
    listener = TorchNvtx(module)

    def look() -> None:
        wanted = any(replaced(module, name) for name in NAMES) and not on_roctx()
        if wanted != any(s is listener for s in emit.sinks):
            (ranges.add_sink if wanted else ranges.remove_sink)(listener)

    class Watched(type(module)):  # type: ignore[misc]
        fxnvtx_watches = True

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name in NAMES and emit.mode != "off":
                look()

    module.__class__ = Watched
    if emit.mode != "off":
        look()


def replaced(module: ModuleType, name: str) -> bool:
    """Whether the function is another one than torch's own."""
    return getattr(getattr(module, name, None), "__module__", module.__name__) != module.__name__


def on_roctx() -> bool:
    """Whether every range goes through these functions already."""
    import torch

    from ...compile.listeners import chosen

    return chosen(getattr(torch.version, "hip", None), emit.mode, os.environ)
