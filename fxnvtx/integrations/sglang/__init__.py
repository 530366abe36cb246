"""fxnvtx inside SGLang-Diffusion, through SGLang's own plugin entry point (0.5.21 and later).

`pip install fxnvtx` beside SGLang is all: SGLang calls `register` in its main, HTTP and worker processes. Releases from
0.5.13 on that load no plugins are started with `fxnvtx run`, which patches the same places as they are imported.

With SGLang's flag `--enable-layerwise-nvtx-marker` its markers are then fxnvtx's: request, stage, loop, step, guidance
pass and scheduler; layers, inside torch.compile too; the root of `vae.decode` and `vae.encode`; weights that move, with
bytes. Without the flag everything is as it was.

Environment variables (a value without meaning is logged once and ignored):

    FXNVTX_SGLANG         layers (the default) | stages (no layers: small captures of long runs) | off
    FXNVTX_SGLANG_DEPTH   levels of modules below a component that get ranges; all without it
    FXNVTX_SGLANG_STEPS   denoising steps, from 0, that show their layers, like 4-8,20; all without it
    FXNVTX_SGLANG_SHAPES  1 (the default: markers with input shapes, as SGLang's have) | 0
    FXNVTX_SGLANG_RECORD  a folder: one recording per request and rank, for `fxnvtx report`

Ranges go through torch.cuda.nvtx too, as SGLang's own do, for those who listen there and not to NVTX: whoever puts
functions of their own in the place of torch's (a test, another tracer) wants to be called. Roctx is
compile/listeners.py's.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ... import ranges
from ...ranges import emit
from .targets import (
    ROOT,
    Options,
    Target,
    found_in,
    guarded,
    has_plugins,
    log,
    missing_targets,
    read_options,
    sglang_folder,
)

__all__ = ["also_through_torch", "missing_targets", "patch_older_releases", "register"]


def register() -> None:
    """What SGLang calls in each of its processes; imports nothing of its runtime.

    Registers hooks with SGLang's HookRegistry, which applies them when the process is ready for it; in a release
    without one (before 0.5.21) patches the classes as they are imported.
    """
    options = read_options()
    package = sglang_folder()
    if options.mode == "off" or package is None:
        return
    if not has_plugins(package):
        patch_older_releases(options)
        return
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType  # type: ignore[import-not-found]

    for target, handler in _handlers(options):
        HookRegistry.register(target.path, handler, HookType[target.kind])


def patch_older_releases(options: Options | None = None) -> None:
    """What `fxnvtx run` calls in each process, for releases that load no plugins: every target is patched right after
    its module has been imported. Does nothing where SGLang is not installed, or loads plugins; imports nothing of it.
    """
    options = options or read_options()
    package = sglang_folder()
    if options.mode == "off" or package is None or has_plugins(package):
        return
    if not (package / "multimodal_gen" / "runtime").is_dir():
        return
    from ...compile import when_imported

    for target, handler in _handlers(options):
        when_imported(f"{ROOT}{target.module}", functools.partial(_patch, target, handler))


def _handlers(options: Options) -> list[tuple[Target, Any]]:
    """Every target that this release has, with the plugin's function for it. Says once what it does not have."""
    from . import hooks

    found, missing = found_in(sglang_folder(), options.layers)
    if missing:
        lacking = "; ".join(dict.fromkeys(t.shows for t in missing))
        log.warning("this release of SGLang has no place for: %s", lacking)
    also_through_torch()
    handlers = hooks.handlers(options)
    return [(target, handlers[target.handler]) for target in found]


def _patch(target: Target, handler: Callable[..., Any], module: ModuleType) -> None:
    """Put a hook into the module that has just been imported. What other modules took from it earlier is exchanged."""
    outer, _, method = target.name.partition(".")
    owner: Any = getattr(module, outer) if method else module
    name = method or outer
    original = getattr(owner, name)
    if getattr(original, "_fxnvtx_hook", None) == target.handler:
        return
    hooked = _hooked(original, handler, target.kind)
    hooked._fxnvtx_hook = target.handler  # type: ignore[attr-defined]
    setattr(owner, name, hooked)
    if method:
        return
    for other in [m for n, m in list(sys.modules.items()) if n.startswith("sglang.") and isinstance(m, ModuleType)]:
        for key in [k for k, v in vars(other).items() if v is original]:
            setattr(other, key, hooked)


def _hooked(original: Callable[..., Any], handler: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """`original` with the handler as SGLang's own HookRegistry would put it."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kind == "REPLACE":
            return handler(*args, **kwargs)
        if kind == "AROUND":
            return handler(original, *args, **kwargs)
        result = original(*args, **kwargs)
        changed = handler(result, *args, **kwargs)
        return result if changed is None else changed

    return call


# ----------------------------------------------------------------------------- those who listen to torch.cuda.nvtx

_NAMES = ("range_push", "range_pop", "mark")


class _TorchNvtx:
    """A listener (see stack.Live) that calls what stands in the module now."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._open: set[int] = set()  # id() of the ranges whose push went through

    @guarded
    def opened(self, entry: ranges.Open) -> None:
        self._module.range_push(entry.label.text)
        self._open.add(id(entry))

    @guarded
    def closed(self, entry: ranges.Open) -> None:
        if id(entry) in self._open:
            self._open.discard(id(entry))
            self._module.range_pop()

    @guarded
    def marked(self, mark: ranges.Mark) -> None:
        if _replaced(self._module, "mark"):
            self._module.mark(mark.label.text)

    def stray_pop(self) -> None: ...


def also_through_torch() -> None:
    """Let fxnvtx's ranges go through torch.cuda.nvtx too while somebody listens there. Idempotent; imports no torch.

    Nothing is asked at a range: the module notices when one of its functions is replaced.
    """
    from ...compile import when_imported

    when_imported("torch.cuda.nvtx", _watch)


def _watch(module: ModuleType) -> None:
    if getattr(type(module), "fxnvtx_watches", False):
        return
    listener = _TorchNvtx(module)

    def look() -> None:
        wanted = any(_replaced(module, name) for name in _NAMES) and not _on_roctx()
        if wanted != any(s is listener for s in emit.sinks):
            (ranges.add_sink if wanted else ranges.remove_sink)(listener)

    class Watched(type(module)):  # type: ignore[misc]
        fxnvtx_watches = True

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name in _NAMES and emit.mode != "off":
                look()

    module.__class__ = Watched
    if emit.mode != "off":
        look()


def _replaced(module: ModuleType, name: str) -> bool:
    """Whether the function is another one than torch's own."""
    return getattr(getattr(module, name, None), "__module__", module.__name__) != module.__name__


def _on_roctx() -> bool:
    """Whether every range goes through these functions already."""
    import torch

    from ...compile.listeners import chosen

    return chosen(getattr(torch.version, "hip", None), emit.mode, os.environ)
