"""A request: what it carries, what it measures, and what it has decided for whatever runs inside of it.

The last is kept in a context variable and not on the stages: a stage object may serve two requests at once, call
itself, or be called by a router through `forward` alone, and the answer must stay the request's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from ..output import write_text

if TYPE_CHECKING:
    from ..ranges import Label
    from .manager import ComponentResidencyManager

__all__ = [
    "Batch",
    "Embedding",
    "RequestMetrics",
    "Running",
    "StageFigures",
    "StageProfiler",
    "StepFigures",
    "running",
    "running_with",
]


# ----------------------------------------------------------------------------------------------------- what it measures


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


# ------------------------------------------------------------------------------------------------------ what it carries


Embedding = tuple[Tensor, Tensor]  # one vector per token [1, length, dim], and one for the whole prompt [1, dim]


@dataclass
class Batch:
    """What was asked for, and what the stages have made of it so far. Raises ConfigError for what has no meaning."""

    prompt: str = ""
    negative_prompt: str = ""
    steps: int = 4
    refine_steps: int = 2
    guidance_scale: float = 4.0
    seed: int = 0
    is_warmup: bool = False

    embedding: Embedding | None = None
    negative_embedding: Embedding | None = None
    latent: Tensor | None = None  # [1, channels, height, width] or [1, channels, frames, height, width]
    image: Tensor | None = None  # uint8 [height, width, 3]
    video: Tensor | None = None  # uint8 [frames, height, width, 3]
    extra: dict[str, Any] = field(default_factory=dict)
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a str, not {type(getattr(self, name)).__name__}")
        for name in ("steps", "refine_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")


# -------------------------------------------------------------------------------------------------- what it has decided


OnStep = Callable[[], None]


class PassSharing(Protocol):
    """The ranks that share the passes of guidance."""

    cfg_rank: int
    cfg_size: int

    def gather_cfg(self, mine: Tensor) -> list[Tensor]: ...


@dataclass(frozen=True)
class Running:
    """`use_nvtx`: the gate, None where nobody decided yet. `stage`: the stage whose range is open and has not begun."""

    use_nvtx: bool | None = None
    manager: ComponentResidencyManager | None = None
    profiler: StageProfiler | None = None
    group: PassSharing | None = None
    on_step: OnStep | None = None
    stage: object | None = None
    requests: tuple[Label | None, ...] | None = None  # of a group: each member's range, None for a warm-up


_running: ContextVar[Running] = ContextVar("fxnvtx_running", default=Running())  # noqa: B039 - it is frozen


def running() -> Running:
    """What holds here and now."""
    return _running.get()


@contextmanager
def running_with(**changes: Any) -> Iterator[Running]:
    """Let `changes` hold for the length of a block."""
    changed = replace(_running.get(), **changes)
    token = _running.set(changed)
    try:
        yield changed
    finally:
        _running.reset(token)
