"""The books of the residency manager: who uses which component when, and which strategy holds whose weights."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from ..categories import Numbers
from ..errors import PipelineError
from ..modules.selection import unwrapped
from .args import ServerArgs
from .memory import ByteAccount, MemoryPlace, Place, ResidencyRanges, default_place
from .strategies import Strategy, strategy_class

__all__ = ["Active", "ComponentUse", "Holdings", "Request", "Requests", "Timeline", "UsesComponents", "uses_of"]


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


class UsesComponents(Protocol):
    """What the manager asks of a stage."""

    @property
    def component_name(self) -> str: ...

    def component_uses(self, args: ServerArgs, stage_name: str) -> list[ComponentUse]: ...


def uses_of(stages: Iterable[UsesComponents], args: ServerArgs) -> list[ComponentUse]:
    """The uses of these stages in their order, each with its stage."""
    return [use.by(s.component_name) for s in stages for use in s.component_uses(args, s.component_name)]


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

    def declared(
        self, component: str | ComponentUse, phase: str | None = None, dtype: torch.dtype | None = None
    ) -> ComponentUse:
        """The use that is meant here. Raises PipelineError where its stage declares none such."""
        wanted = component if isinstance(component, ComponentUse) else ComponentUse(component, phase, dtype)
        stage = wanted.stage or self.stage or ""
        found = self.timeline.find((stage, wanted.component, wanted.phase))
        if found is None:
            shown = wanted.by(stage).prefix
            raise PipelineError(f"the use {shown} was not declared: let component_uses() of stage {stage!r} return it")
        return wanted.by(stage) if wanted.dtype is not None else found


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


# ------------------------------------------------------------------------------------------------- weights


InUse = Callable[[Any], bool]


class Holdings:
    """The strategies of all modules that a manager has met. Keeps no module alive; `in_use(module)` says which ones may
    not be touched."""

    def __init__(
        self,
        kinds: Mapping[str, str],
        args: Callable[[], ServerArgs],
        place: Place | None,
        in_use: InUse,
        shows: Callable[[], bool],
    ) -> None:
        self.kinds = kinds
        self._args = args
        self.account = ByteAccount()
        self.marks = ResidencyRanges(shows)
        self._place = place
        self._in_use = in_use
        self._strategies: dict[int, tuple[weakref.ref[nn.Module], Strategy]] = {}  # by the id of the module

    @property
    def args(self) -> ServerArgs:
        """Those of the request that asks."""
        return self._args()

    def strategy(self, name: str, module: nn.Module) -> Strategy:
        """The strategy that the arguments want for component `name`; made, or changed between uses."""
        inner = unwrapped(module)
        mode = self.args.residency_mode(name, self.kinds.get(name, "other"))
        known = self.of(module)
        if known is not None and (known.mode == mode or self._in_use(module)):
            return known
        if known is not None:
            known.bring_back(inner)
            known.dispose()
        made = strategy_class(mode)(name, self._weights_place(), self.account, self.marks)
        made.refresh(inner)
        if not self._in_use(module):
            made.finish_use(inner)
        self._strategies[id(inner)] = weakref.ref(inner), made
        return made

    def of(self, module: nn.Module) -> Strategy | None:
        """The strategy that holds a module now."""
        inner = unwrapped(module)
        return next((s for m, s in self.known() if m is inner), None)

    def known(self) -> list[tuple[nn.Module, Strategy]]:
        """Of all modules that are still there; those of modules that are gone are taken off the account."""
        found = []
        for key, (ref, strategy) in list(self._strategies.items()):
            module = ref()
            if module is None:
                del self._strategies[key]
                strategy.dispose()
            else:
                found.append((module, strategy))
        return found

    def load(self, use: ComponentUse, module: Any, components: Mapping[str, Any]) -> None:
        """Bring the weights in that a use needs; an outer use of the same module has most of them there."""
        if not isinstance(module, nn.Module):
            return
        strategy = self.strategy(use.component, module)
        inner = unwrapped(module)
        if self._in_use(module):
            strategy.wait_for_use(inner, use.dtype)
            return
        strategy.refresh(inner)
        strategy.kept = use.keep_ready
        self.make_room(strategy, components)
        try:
            strategy.before_use(inner, use.dtype)
            strategy.wait_for_use(inner, use.dtype)
        except BaseException:
            strategy.kept = False
            strategy.give_up(inner)
            raise

    def bring_back(self, module: nn.Module) -> None:
        """All weights of a module into compute memory, and no part in them from here on."""
        strategy = self.of(module)
        if strategy is not None:
            strategy.bring_back(unwrapped(module))
            del self._strategies[id(unwrapped(module))]
            strategy.dispose()

    # ------------------------------------------------------------------------------------------------------ room

    def bound_bytes(self, components: Mapping[str, Any]) -> int:
        """All components that stay, and the largest one of those that do not (layer-wise: two blocks and what lies
        outside the blocks)."""
        found = [self.strategy(name, m) for name, m in components.items() if isinstance(m, nn.Module)]
        stay = sum(s.bound_bytes for s in found if s.stays)
        return stay + max((s.bound_bytes for s in found if not s.stays), default=0)

    def prefetch(self, strategy: Strategy, module: nn.Module, dtype: Any, components: Mapping[str, Any]) -> None:
        """Begin to bring in what a coming use needs first, if it fits beside what is there and is still to come."""
        needed = strategy.prefetch_bytes()
        fits = self._committed_bytes() + needed <= self.bound_bytes(components)
        if needed and (fits or self.args.performance_mode == "speed"):
            strategy.prefetch(unwrapped(module), dtype)

    def make_room(self, strategy: Strategy, components: Mapping[str, Any]) -> None:
        """Give up prefetches for other components where they and this use together exceed the bound."""
        if self.args.performance_mode == "speed":
            return
        bound = self.bound_bytes(components)
        needed = max(0, strategy.bound_bytes - strategy.committed_bytes)
        for module, other in self.known():
            if self._committed_bytes() + needed <= bound:
                return
            if other is not strategy and not self._in_use(module):
                other.finish_request(module)

    def _committed_bytes(self) -> int:
        """What is in memory or on its way, with what the uses that go on may still bring in."""
        return sum(
            max(s.committed_bytes, s.bound_bytes if s.offloads and self._in_use(m) else 0) for m, s in self.known()
        )

    def _weights_place(self) -> Place:
        if self._place is None:
            self._place = default_place(self.args.residency_dir)
        if isinstance(self._place, MemoryPlace) and self.args.residency_dir is not None:
            self._place.folder = self.args.residency_dir  # for what is put away from here on
        return self._place
