"""Wall times per stage and step, under names that join one to one with those of the ranges."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch

from ..output import write_text

__all__ = ["RequestMetrics", "StageFigures", "StageProfiler", "StepFigures"]

FORMAT = "fxnvtx-metrics"
VERSION = 1


@dataclass
class StepFigures:
    """One pass of a loop. `range` is the label of its range."""

    range: str
    stage: str
    wall_ms: float


@dataclass
class StageFigures:
    """One stage of one request. `name` is its profile name, `range` the label of its range."""

    name: str
    range: str
    calls: int = 0
    wall_ms: float = 0.0
    memory: dict[str, int] | None = None


@dataclass
class RequestMetrics:
    """The figures of one request. `range` is the label of the request's range, None for a warm-up."""

    range: str | None = None
    total_ms: float = 0.0
    stages: dict[str, StageFigures] = field(default_factory=dict)  # by the label of the stage's range
    steps: list[StepFigures] = field(default_factory=list)

    def stage(self, name: str, range_label: str) -> StageFigures:
        """The figures of the stage whose range is `range_label`; under another name where `name` is somebody else's."""
        found = self.stages.get(range_label)
        if found is None:
            taken = {s.name for s in self.stages.values()}
            found = self.stages[range_label] = StageFigures(range_label if name in taken else name, range_label)
        return found

    def as_dict(self) -> dict[str, Any]:
        """{"format", "version", "range", "total_ms", "stages": [{"name", "range", "calls", "wall_ms", "memory"}],
        "steps": [{"range", "stage", "wall_ms"}]}; times in milliseconds, memory in bytes."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "range": self.range,
            "total_ms": self.total_ms,
            "stages": [dict(vars(s)) for s in self.stages.values()],
            "steps": [dict(vars(s)) for s in self.steps],
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `as_dict()` as JSON."""
        return write_text(path, json.dumps(self.as_dict(), indent=1))


class StageProfiler:
    """Measures stages and steps into a request's metrics.

    `sync`: wait for the device before each reading of the clock inside a step. `memory`: called after a stage, gives
    figures in bytes to note beside its time.
    """

    def __init__(
        self, metrics: RequestMetrics, *, sync: bool = False, memory: Callable[[], dict[str, int]] | None = None
    ) -> None:
        self.metrics = metrics
        self.sync = sync
        self.memory = memory

    @contextmanager
    def stage(self, name: str, range_label: str) -> Iterator[None]:
        """Around one call of a stage; calls of the same stage add up."""
        begin = perf_counter_ns()
        try:
            yield
        finally:
            figures = self.metrics.stage(name, range_label)
            figures.calls += 1
            figures.wall_ms += (perf_counter_ns() - begin) / 1e6
            if self.memory is not None:
                figures.memory = self.memory()

    @contextmanager
    def step(self, stage: str, range_label: str) -> Iterator[None]:
        """Around one step of a loop inside the stage with profile name `stage`."""
        self._wait()
        begin = perf_counter_ns()
        try:
            yield
            self._wait()
        finally:
            self.metrics.steps.append(StepFigures(range_label, stage, (perf_counter_ns() - begin) / 1e6))

    def _wait(self) -> None:
        if self.sync and torch.cuda.is_available():
            torch.cuda.synchronize()


def device_memory() -> dict[str, int]:
    """Bytes allocated on the current CUDA device now and at most; nothing without one."""
    if not torch.cuda.is_available():
        return {}
    return {"cuda_allocated": torch.cuda.memory_allocated(), "cuda_peak": torch.cuda.max_memory_allocated()}
