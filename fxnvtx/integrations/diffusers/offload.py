"""Weights that accelerate and diffusers move: `residency.load <component>`, `residency.offload <component>`, in bytes.

enable_model_cpu_offload makes new hook objects after every request, so the methods are wrapped on the hooks' classes,
for as long as a pipeline is instrumented.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn

from ...compile.torch_private import hide_module
from ...modules.selection import unwrapped
from ...ranges import emit, label, pop, push
from .registry import Bound, Held, methods, named_modules, pipes

__all__ = ["hold_residency", "nbytes", "release_residency"]


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
