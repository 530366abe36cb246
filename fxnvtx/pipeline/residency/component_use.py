"""Who uses which component when: the uses of a request in order, and the requests under way."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ...errors import PipelineError
from ...steps import Numbers
from ..args import ServerArgs

__all__ = ["Active", "ComponentUse", "Request", "Requests", "Timeline"]


# ----------------------------------------------------------------------------------------------------------------- uses


@dataclass(frozen=True)
class ComponentUse:
    """One stage needs one component, for one phase of its work.

    `dtype`: convert floating-point weights to it for the use (None: as they are). `prefetch`: the weights may be
    brought in ahead of the use. `heavy`: worth bringing in ahead. `at_stage_entry`: the use begins with the stage and
    ends with it, whatever the stage does in between. `keep_ready`: the weights stay when the use ends, for the next
    request, until a use without it ends. `stage` is filled in by the pipeline.
    """

    component: str
    phase: str | None = None
    dtype: torch.dtype | None = None
    prefetch: bool = True
    heavy: bool = True
    at_stage_entry: bool = False
    keep_ready: bool = False
    stage: str = ""

    @property
    def key(self) -> tuple[str, str, str | None]:
        return self.stage, self.component, self.phase

    @property
    def prefix(self) -> str:
        """What the component's layers are called while this use lasts."""
        parts = (self.stage, self.component, self.phase)
        return ".".join(part for part in parts if part)

    def by(self, stage: str) -> ComponentUse:
        return replace(self, stage=stage)


class Timeline:
    """The uses of one request in order, and how far it has come."""

    def __init__(self, uses: Sequence[ComponentUse] = ()) -> None:
        self.uses = list(uses)
        self._position = -1

    def stage_begins(self, stage: str) -> None:
        """The next use to come is the first one of `stage`, the next one of that name from here on."""
        for index in (*range(self._position + 1, len(self.uses)), *range(self._position + 1)):
            if self.uses[index].stage == stage:
                self._position = index - 1
                return

    def of(self, stage: str) -> list[ComponentUse]:
        """The first use of each key that `stage` declares, in their order."""
        return list({u.key: u for u in reversed(self.uses) if u.stage == stage}.values())[::-1]

    def find(self, key: tuple[str, str, str | None]) -> ComponentUse | None:
        """The declared use with this key: the next one to come, else the last one that was."""
        return next((u for u in (*self.uses[self._position + 1 :], *self.uses) if u.key == key), None)

    def begins(self, use: ComponentUse) -> None:
        for index in range(self._position + 1, len(self.uses)):
            if self.uses[index].key == use.key:
                self._position = index
                return

    def next_heavy(self) -> ComponentUse | None:
        """The first use still to come that is worth bringing in ahead."""
        return next((u for u in self.uses[self._position + 1 :] if u.heavy), None)


# ------------------------------------------------------------------------------------------------------------- requests


@dataclass(eq=False)
class Active:
    """A use that is going on. `scoped`: it ends with a block, not with the next use. `ranged`: its layers may show."""

    use: ComponentUse
    module: nn.Module
    scoped: bool
    ranged: bool = False


@dataclass(eq=False)
class Request:
    """A request under way: its timeline, the stage it has come to, and its uses, the innermost one last.

    `outer`: the request in which this one was begun. `threads`: those that had a part in it, by identifier.
    """

    args: ServerArgs
    use_nvtx: bool
    timeline: Timeline
    stage: str | None = None
    active: list[Active] = field(default_factory=list)
    layers: bool = True  # whether the present step shows its layers
    windows: Numbers = field(default_factory=lambda: Numbers.read("0:"))
    outer: Request | None = None
    threads: set[int] = field(default_factory=set)
    finished: bool = False
    # what a key was last used with
    last_module: dict[tuple[str, str, str | None], weakref.ref[nn.Module]] = field(default_factory=dict)


# The innermost request that this context (thread, task, generator) has begun, of whichever manager.
_begun: ContextVar[Request | None] = ContextVar("fxnvtx_residency_request", default=None)


class Requests:
    """The requests of one manager that are under way. `lock` is held for the length of a manager's method, never for
    that of a request: so a request may be finished on any thread."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._fewer = threading.Condition(self.lock)
        self._live: list[Request] = []

    def __iter__(self) -> Iterator[Request]:
        return iter(tuple(self._live))

    def __reversed__(self) -> Iterator[Request]:
        return iter(tuple(reversed(self._live)))

    def __len__(self) -> int:
        return len(self._live)

    def wait_for_turn(self) -> None:
        """Return when this thread had a part in every request under way. Weights that move block by block cannot serve
        two threads at once; one thread (a nested request, the tasks of an event loop) never runs two of them."""
        me = threading.get_ident()
        self._fewer.wait_for(lambda: all(me in request.threads for request in self._live))

    def begin(self, request: Request) -> None:
        outer = _begun.get()
        while outer is not None and outer.finished:  # on another thread, which could not tell this context
            outer = outer.outer
        request.outer = outer
        request.threads.add(threading.get_ident())
        self._live.append(request)
        _begun.set(request)

    def leave(self, request: Request) -> None:
        request.finished = True
        self._live.remove(request)
        if _begun.get() is request:
            _begun.set(request.outer)
        self._fewer.notify_all()

    def current(self) -> Request | None:
        """The innermost one that this context has begun, else the only one there is."""
        found = _begun.get()
        while found is not None and found not in self._live:
            found = found.outer
        if found is None and len(self._live) == 1:
            return self._live[0]
        return found

    def require(self, given: Request | None = None) -> Request:
        """`given`, or the one that is meant here. Raises PipelineError where there is none, or no telling which."""
        if not self._live or (given is not None and given not in self._live):
            raise PipelineError("no request is under way: call begin_request() first")
        request = given or self.current()
        if request is None:
            raise PipelineError(
                f"{len(self._live)} requests are under way, and this thread began none of them: "
                "pass request=, as begin_request() returned it"
            )
        request.threads.add(threading.get_ident())
        return request
