"""Every pipeline built from now on is instrumented, without importing diffusers for it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from ...compile.invisible import hide_module
from ...instrument import log_once
from .components import is_pipeline
from .registry import Held, Options, methods

__all__ = ["unwatch", "watch"]


# The classes whose method every pipeline of diffusers goes through while it is built.
_BUILDERS = {
    "diffusers.pipelines.pipeline_utils": ("DiffusionPipeline", "register_modules"),
    "diffusers.modular_pipelines.modular_pipeline": ("ModularPipeline", "__init__"),
}


class _Finder(importlib.abc.MetaPathFinder):
    """Sees the module of a builder being imported and lets `done` know afterwards."""

    def __init__(self, done: Callable[[str], None]) -> None:
        self.done = done
        self.looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _BUILDERS or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            _after_exec(spec.loader, lambda: self.done(fullname))
        return spec


def _after_exec(loader: Any, then: Callable[[], None]) -> None:
    execute = loader.exec_module

    def exec_module(module: types.ModuleType) -> None:
        del loader.exec_module
        execute(module)
        then()

    loader.exec_module = exec_module


class _Watch:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.held: list[Held] = []
        self.finder = _Finder(self.arm)

    def arm(self, module: str) -> None:
        kind, method = _BUILDERS[module]
        owner = getattr(sys.modules[module], kind, None)
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
        if module in sys.modules:
            _now.arm(module)
    sys.meta_path.insert(0, _now.finder)


def unwatch() -> None:
    """Stop; pipelines that are instrumented stay so."""
    global _now
    if _now is None:
        return
    if _now.finder in sys.meta_path:
        sys.meta_path.remove(_now.finder)
    for held in _now.held:
        methods.release(held)
    _now = None


hide_module(globals(), nested=True)  # some of this runs while a compiled component is being called
