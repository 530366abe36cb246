"""One model's switch: whether its ranges are shown now, and by which form of a call. Slots ask it at every call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import ranges as _ranges
from .crossing import surrounding

__all__ = ["Gate", "lock"]

# Over everything that says which modules have ranges. Where a change of listeners is under way its lock comes first.
lock = threading.RLock()


class Gate:
    """Read by every slot of one model. Switching a model writes here and touches no module."""

    def __init__(self, shapes: bool = False) -> None:
        self.shapes = shapes
        self.enabled = True
        self.fast = False
        self.nvtx_only = False
        self._silent_calls = 0

    @classmethod
    def off(cls) -> Gate:
        """A gate that is switched off for good."""
        gate = Gate()
        gate.enabled = False
        return gate

    def refresh(self) -> None:
        """The cheap path is for the settled case: switched on everywhere, nobody to be told at once."""
        self.fast = self.enabled and not self._silent_calls and not self.shapes and _ranges.active and not _ranges.live
        self.nvtx_only = self.fast and _ranges.nvtx_on and not _ranges.sinks

    def runs_on(self, stack: list[Any]) -> bool:
        """Whether a call of this model that emits is under way on the thread that owns `stack`."""
        return any(len(entry) > 1 and entry[1] is self for entry in reversed(stack)) or any(
            crossing.owner is self for crossing in surrounding()
        )

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Around an outermost call that began switched off."""
        silent = _ranges.local.silent
        silent.add(self)
        with lock:
            self._silent_calls += 1
            self.refresh()
        try:
            yield
        finally:
            silent.discard(self)
            with lock:
                self._silent_calls -= 1
                self.refresh()

    def look(self, key: int) -> None:
        """An outermost call of the module whose id() is `key` begins: see that what lies below it is as it was."""
