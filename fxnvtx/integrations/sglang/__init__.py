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
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .targets import ROOT, Options, Target, found_in, has_plugins, log, missing_targets, read_options, sglang_folder

__all__ = ["missing_targets", "patch_older_releases", "register"]


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
    from .torch_nvtx import also_through_torch

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
