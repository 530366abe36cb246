"""The wrappers: what runs instead of a pipeline's, component's, scheduler's or block's method, and of the methods of
accelerate and diffusers that move weights.

Each asks first whether somebody listens and whether the object is known; if not it only passes the call on. None of
them can fail on its own account, and each closes what it opened whatever the call raises.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from itertools import chain
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ...categories import OP, STAGE
from ...compile.torch_private import hide_module
from ...modules.selection import unwrapped
from ...ranges import Entry, Label, emit, label, pop, push
from .registry import Bound, Held, methods, named_modules, pipes
from .thread_state import Request, Tiling, find, follow, note_timesteps, state

__all__ = [
    "bar_method",
    "cache_context",
    "hold_residency",
    "nbytes",
    "pass_label",
    "release_residency",
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


# --------------------------------------------------------------------------------------------------- weights that move

# `residency.load <component>` and `residency.offload <component>`, in bytes. enable_model_cpu_offload makes new hook
# objects after every request, so the methods are wrapped on the hooks' classes, while a pipeline is instrumented.

_held: list[Held] = []


def hold_residency() -> None:
    """Wrap what is imported by now; called again it takes in what has been imported since."""
    known = {(held.owner, held.name) for held in _held}
    for module, kind, method, wrap in _METHODS:
        owner = getattr(sys.modules.get(module), kind, None)
        if isinstance(owner, type) and (owner, method) not in known:
            held = methods.hold(owner, method, wrap)
            if held is not None:
                _held.append(held)


def release_residency() -> None:
    while _held:
        methods.release(_held.pop())


def nbytes(tensors: Iterable[Any]) -> int:
    """Bytes of the given tensors, each counted once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)}.values())


def weights(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    return [t for m in modules for t in chain(m.parameters(), m.buffers())]


def owner_of(module: Any) -> tuple[Bound, str] | None:
    """The component that a module is (part of), and the module's path from there."""
    module = unwrapped(module)
    for pipe in pipes():
        for bound in list(pipe.parts.values()):
            found = bound.paths.get(id(module))
            if found is not None and found[0]() is module:
                return bound, found[1]
    return None


def _name(modules: Iterable[Any]) -> str | None:
    """What is moved: a component, or the parts of it that go together. None where it belongs to no shown pipeline."""
    found = [owner_of(module) for module in modules]
    shown = [(b.name, path) for b, path in (f for f in found if f is not None) if b.pipe.shown]
    if not shown:
        return None
    names = list(dict.fromkeys(f"{name}.{path}" if path else name for name, path in shown))
    return names[0] if len(names) == 1 else f"{names[0]} +{len(names) - 1}"


def _around(
    what: str, modules: Callable[..., list[Any]], moved: Callable[..., int | None]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A range around a method that moves weights. `moved` tells the bytes, None where this call moves nothing."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not emit.active:
                return original(self, *args, **kwargs)
            name = _name(modules(self, *args))
            size = moved(self, *args) if name is not None else None
            if size is None:
                return original(self, *args, **kwargs)
            entry = push(label(f"residency.{what} {name}", "residency"), size)
            try:
                return original(self, *args, **kwargs)
            finally:
                pop(entry)

        return call

    return wrap


def _one(_: Any, module: Any = None, *rest: Any) -> list[Any]:
    return [] if module is None else [module]


def _bytes_to_come(hook: Any, module: nn.Module, *rest: Any) -> int | None:
    """Of a whole component; None where it is on its device already, which is what the hook finds out as well."""
    target = torch.device(hook.execution_device)
    absent = [t for t in weights([module]) if t.device != target and not _same_kind(t.device, target)]
    return nbytes(absent) if absent else None


def _same_kind(device: torch.device, target: torch.device) -> bool:
    return target.index is None and device.type == target.type


def _freed(pipe: Any) -> list[Any]:
    """What enable_model_cpu_offload left on its device and takes back at the end of a request."""
    if not getattr(pipe, "_all_hooks", None):
        return []
    parts = [part for _, part in named_modules(pipe)]
    return [part for part in parts if any(t.device.type not in ("cpu", "meta") for t in weights([part]))]


def _align_bytes(hook: Any, module: nn.Module, *rest: Any) -> int | None:
    return nbytes(chain(module.parameters(recurse=False), module.buffers(recurse=False))) if hook.offload else None


def _group(group: Any) -> list[Any]:
    return list(group.modules) or [group.onload_leader or group.offload_leader]


def _group_bytes(group: Any) -> int:
    return nbytes([*weights(group.modules), *group.parameters, *group.buffers])


_HOOKS, _GROUPS, _PIPELINES = (
    "accelerate.hooks",
    "diffusers.hooks.group_offloading",
    "diffusers.pipelines.pipeline_utils",
)
_METHODS = (
    (_HOOKS, "CpuOffload", "pre_forward", _around("load", _one, _bytes_to_come)),
    (
        _HOOKS,
        "UserCpuOffloadHook",
        "offload",
        _around("offload", lambda s: [s.model], lambda s: nbytes(weights([s.model]))),
    ),
    (_HOOKS, "AlignDevicesHook", "pre_forward", _around("load", _one, _align_bytes)),
    (_HOOKS, "AlignDevicesHook", "post_forward", _around("offload", _one, _align_bytes)),
    (_GROUPS, "ModuleGroup", "onload_", _around("load", _group, _group_bytes)),
    (_GROUPS, "ModuleGroup", "offload_", _around("offload", _group, _group_bytes)),
    (
        _PIPELINES,
        "DiffusionPipeline",
        "maybe_free_model_hooks",
        _around("offload", _freed, lambda s: nbytes(weights(_freed(s)))),
    ),
)


hide_module(globals(), nested=True)  # some of this runs while a compiled component is being called
