"""Which part of a run is shown: without its first calls (warm-up), and of each request only some steps."""

from __future__ import annotations

from dataclasses import dataclass

from . import ranges as _ranges
from .steps import Numbers

__all__ = ["Window"]


@dataclass
class Window:
    """Opens and closes as ranges begin and end; NVTX hears only what lies inside, and so does the recording.

    warmup: so many outermost ranges of the process are left out. steps: those to show, counted from 0 in each request;
    where an outermost range is a model's call and no request, the calls themselves are the steps.
    """

    warmup: int = 0
    steps: Numbers | None = None

    def __post_init__(self) -> None:
        self.is_open = False
        self._calls = 0
        self._steps = 0
        self._nvtx = _ranges.nvtx_on  # what there is to hear it
        self._show(False)

    def opened(self, entry: _ranges.Open) -> bool:
        """Called before NVTX hears of the range; returns whether it is shown."""
        category = entry.label.category
        if entry.level == 0:
            self._calls += 1
            self._steps = 0
            number = self._calls - self.warmup - 1
            if self.steps is None:
                self._show(number >= 0)
            else:
                itself = category not in ("request", "stage", "loop")
                self._show(itself and number >= 0 and number in self.steps)
        elif category == "step" and self.steps is not None and self._calls > self.warmup:
            self._steps += 1
            self._show(self._steps - 1 in self.steps)
        return self.is_open

    def closed(self, entry: _ranges.Open) -> None:
        if self.steps is None or not self.is_open:
            return
        if entry.level == 0 or (entry.label.category == "step" and self._steps not in self.steps):
            self._show(False)

    def _show(self, shown: bool) -> None:
        # no callback: the recorder is a listener all along, so nothing else depends on this
        self.is_open = shown
        _ranges.nvtx_on = self._nvtx and shown
