"""Every pipeline built from now on is instrumented, without importing diffusers for it."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from ...compile.imports import no_longer_when_imported, when_imported
from ...compile.torch_private import hide_module
from ...instrument import log_once
from .components import is_pipeline
from .registry import Held, Options, methods

__all__ = ["unwatch", "watch"]


# The classes whose method every pipeline of diffusers goes through while it is built.
_BUILDERS = {
    "diffusers.pipelines.pipeline_utils": ("DiffusionPipeline", "register_modules"),
    "diffusers.modular_pipelines.modular_pipeline": ("ModularPipeline", "__init__"),
}


class _Watch:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.held: list[Held] = []

    def arm(self, module: types.ModuleType) -> None:
        kind, method = _BUILDERS[module.__name__]
        owner = getattr(module, kind, None)
        if isinstance(owner, type):
            held = methods.hold(owner, method, self.wrap)
            if held is not None:
                self.held.append(held)

    def wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(pipe, *args, **kwargs)
            self.meet(pipe)
            return result

        return call

    def meet(self, pipe: Any) -> None:
        from . import attach

        if _now is not self or not is_pipeline(pipe):
            return
        try:
            attach.attach(pipe, self.options, type(pipe).__name__)
        except Exception as error:  # the program must go on
            log_once(f"watch {type(pipe).__name__}", f"{type(pipe).__name__} is not instrumented: {error}")


_now: _Watch | None = None


def watch(options: Options) -> None:
    global _now
    if _now is not None:
        _now.options = options
        return
    _now = _Watch(options)
    for module in _BUILDERS:
        when_imported(module, _now.arm)


def unwatch() -> None:
    """Stop; pipelines that are instrumented stay so."""
    global _now
    if _now is None:
        return
    for module in _BUILDERS:
        no_longer_when_imported(module, _now.arm)
    for held in _now.held:
        methods.release(held)
    _now = None


hide_module(globals(), nested=True)  # some of this runs while a compiled component is being called
