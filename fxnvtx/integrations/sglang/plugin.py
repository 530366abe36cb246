"""register(): hand SGLang the hooks that its release has a place for."""

from __future__ import annotations

from .options import log, read_options
from .targets import TARGETS, present, sglang_folder

__all__ = ["register"]


def register() -> None:
    """Registers hooks with SGLang's HookRegistry; SGLang applies them when the process is ready for it."""
    options = read_options()
    if options.mode == "off":
        return
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType  # type: ignore[import-not-found]

    from . import hooks

    package, missing = sglang_folder(), []
    handlers = hooks.handlers(options)
    for target in TARGETS:
        if target.layers and not options.layers:
            continue
        if present(target, package):
            HookRegistry.register(target.path, handlers[target.handler], HookType[target.kind])
        else:
            missing.append(target.shows)
    if missing:
        log.warning("this release of SGLang has no place for: %s", "; ".join(dict.fromkeys(missing)))
