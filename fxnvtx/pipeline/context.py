"""What the running request has decided: whether it shows ranges, who moves its weights, where its figures go.

Kept in a context variable and not on the stages: a stage object may serve two requests at once, call itself, or be
called by a router through `forward` alone, and the answer must stay the request's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..ranges import Label
    from .collective import Group
    from .profiler import StageProfiler
    from .residency.manager import ComponentResidencyManager

__all__ = ["Running", "running", "running_with"]

OnStep = Callable[[], None]


@dataclass(frozen=True)
class Running:
    """`use_nvtx`: the gate, None where nobody decided yet. `stage`: the stage whose range is open and has not begun."""

    use_nvtx: bool | None = None
    manager: ComponentResidencyManager | None = None
    profiler: StageProfiler | None = None
    group: Group | None = None
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
