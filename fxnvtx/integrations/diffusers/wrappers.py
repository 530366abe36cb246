"""The wrappers: what runs instead of a pipeline's, component's, scheduler's or block's method.

Each asks first whether somebody listens and whether the object is known; if not it only passes the call on. None of
them can fail on its own account, and each closes what it opened whatever the call raises.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from ...categories import OP, STAGE
from ...compile.torch_private import hide_module
from ...ranges import Entry, Label, emit, label, pop, push
from .registry import Bound
from .thread_state import Request, Tiling, find, follow, note_timesteps, state

__all__ = [
    "bar_method",
    "cache_context",
    "pass_label",
    "request",
    "root_method",
    "scheduler_step",
    "set_timesteps",
    "stage",
    "tiled_method",
]


DISTINCT_REQUEST_LABELS = 1 << 16
Refresh = Callable[[Any], None]
Method = Callable[..., Any]
# diffusers' names of the passes of classifier-free guidance, in full; any other name of a pass is kept as it is
PASSES = {"cond": "conditional", "uncond": "unconditional", "cond_uncond": "conditional_unconditional"}


def shown(thing: Any) -> Bound | None:
    bound = find(thing)
    return bound if bound is not None and bound.pipe.shown else None


def request(refresh: Refresh) -> Callable[[Method], Method]:
    """Around a pipeline's call. A pipeline that another one calls as its component is a stage of that request."""

    def wrap(original: Method) -> Method:
        if inspect.isgeneratorfunction(original):

            def stream(self: Any, *args: Any, **kwargs: Any) -> Any:
                bound = shown(self) if emit.active else None
                if bound is None or _under_way(bound):
                    return (yield from original(self, *args, **kwargs))
                entry = push(_request_label(bound), type(self).__name__)
                try:
                    return (yield from original(self, *args, **kwargs))
                finally:
                    pop(entry)

            return stream

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = shown(self) if emit.active else None
            if bound is None or _under_way(bound):
                return original(self, *args, **kwargs)
            refresh(bound.pipe)
            outer, passes = state.request, state.passes
            shown_as = _request_label(bound)
            entry = push(shown_as, type(self).__name__)
            state.stages += shown_as.category == STAGE
            state.request = running = Request(bound.pipe, outer)
            state.passes = None
            try:
                return original(self, *args, **kwargs)
            finally:
                running.close()
                state.stages -= shown_as.category == STAGE
                state.request, state.passes, state.timesteps = outer, passes, None
                pop(entry)

        return call

    return wrap


def _under_way(bound: Bound) -> bool:
    running = state.request
    while running is not None:
        if running.pipe is bound.pipe:
            return True
        running = running.outer
    return False


def _request_label(bound: Bound) -> Label:
    if state.request is not None:
        return _stage_label(bound.pipe.name)
    return label(f"request#{next(bound.pipe.numbers) % DISTINCT_REQUEST_LABELS}", "request")


def _stage_label(text: str) -> Label:
    return label(text, OP if state.stages else STAGE)


def _ranged(text: Callable[[Any, Bound], Label], name: str) -> Callable[[Method], Method]:
    """A range around a method of a known object; once, where a method calls the one it overrides."""

    def wrap(original: Method) -> Method:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = shown(self) if emit.active else None
            key = (id(self), name)
            if bound is None or key in state.inside:
                return original(self, *args, **kwargs)
            shown_as = text(self, bound)
            entry = push(shown_as)
            state.inside.add(key)
            state.stages += shown_as.category == STAGE
            try:
                return original(self, *args, **kwargs)
            finally:
                state.stages -= shown_as.category == STAGE
                state.inside.discard(key)
                pop(entry)

        return call

    return wrap


def stage(name: str) -> Callable[[Method], Method]:
    """Around a pipeline's method that is a stage (`encode_prompt`), or a modular block's call."""
    return _ranged(lambda _, bound: _stage_label(name if bound.role == "pipeline" else bound.name), name)


def root_method(name: str) -> Callable[[Method], Method]:
    """Around a component's method that bypasses its forward: `vae.decode`."""
    return _ranged(lambda _, bound: _stage_label(f"{bound.name}.{name}"), name)


def scheduler_step(original: Method) -> Method:
    """Around a scheduler's step, also a step of the copies that a pipeline makes of its scheduler."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        key = (id(self), "step")
        if not emit.active or key in state.inside or not _steps_here(self):
            return original(self, *args, **kwargs)
        entry = push(label("scheduler_step", "op"))
        state.inside.add(key)
        try:
            return original(self, *args, **kwargs)
        finally:
            state.inside.discard(key)
            pop(entry)
            if state.passes:  # a second-order scheduler has the next ones for another evaluation
                state.passes.clear()

    return call


def set_timesteps(original: Method) -> Method:
    """After it, the timesteps of the loop to come are known."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if emit.active and _steps_here(self):
            note_timesteps(self, original, args, kwargs)
        return result

    return call


def _steps_here(scheduler: Any) -> bool:
    if state.request is not None:
        return state.request.pipe.shown
    return shown(scheduler) is not None


class _Pass(AbstractContextManager[Any]):
    """A cache context of diffusers with a range around it: it says which pass of guidance this is."""

    def __init__(self, inner: Any, text: Label) -> None:
        self.inner = inner
        self.text = text
        self.entry: Entry | None = None

    def __enter__(self) -> Any:
        self.entry = push(self.text)
        state.named_pass += 1
        try:
            return self.inner.__enter__()
        except BaseException:
            self._leave()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> Any:
        try:
            return self.inner.__exit__(kind, value, trace)
        finally:
            self._leave()

    def _leave(self) -> None:
        state.named_pass -= 1
        pop(self.entry)


def cache_context(original: Method) -> Method:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = original(self, *args, **kwargs)
        if not emit.active or shown(self) is None:
            return inner
        name = args[0] if args else kwargs.get("name")
        return _Pass(inner, label(f"predict_noise.{PASSES.get(str(name), name)}", "op"))

    return call


def pass_label(number: int) -> Label:
    """Of the number-th call of a denoiser within a step, where nothing tells what the pass is for."""
    return label(f"predict_noise.pass_{number}" if number else "predict_noise", "op")


def tiled_method(name: str) -> Callable[[Method], Method]:
    """Around tiled_decode and its like: from then on calls of the VAE's parts are told apart by their tile."""
    shown_name = name.lstrip("_")

    def wrap(original: Method) -> Method:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = shown(self) if emit.active else None
            key = (id(self), shown_name)
            if bound is None or key in state.inside:
                return original(self, *args, **kwargs)
            outer = state.tiling
            shown_as = _stage_label(f"{bound.name}.{shown_name}")
            entry = push(shown_as)
            state.inside.add(key)
            state.stages += shown_as.category == STAGE
            state.tiling = Tiling(bound.name, args[0] if args else next(iter(kwargs.values()), None), outer)
            try:
                return original(self, *args, **kwargs)
            finally:
                state.tiling = outer
                state.stages -= shown_as.category == STAGE
                state.inside.discard(key)
                pop(entry)

        return call

    return wrap


def bar_method(original: Method) -> Method:
    """What progress_bar() returns gets followed: it is where a pipeline says that a step is over."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bar = original(self, *args, **kwargs)
        if not emit.active or shown(self) is None:
            return bar
        iterable = args[0] if args else kwargs.get("iterable")
        return follow(bar, iterable, kwargs.get("desc"))

    return call


hide_module(globals(), nested=True)  # some of this runs while a compiled component is being called
