"""fxnvtx inside SGLang-Diffusion, through SGLang's own plugin entry point (0.5.21 and later).

`pip install fxnvtx` beside SGLang is all: SGLang calls `register` in its main, HTTP and worker processes. Releases from
0.5.13 on that load no plugins are started with `fxnvtx run`, which patches the same places as they are imported.

With SGLang's flag `--enable-layerwise-nvtx-marker` its markers are then fxnvtx's: request, stage, loop, step, guidance
pass and scheduler; layers, inside torch.compile too; the root of `vae.decode` and `vae.encode`; weights that move, with
bytes. Without the flag everything is as it was.

Environment variables (a value without meaning is told once and ignored):

    FXNVTX_SGLANG         layers (the default) | stages (no layers: small captures of long runs) | off
    FXNVTX_SGLANG_DEPTH   levels of modules below a component that get ranges; all without it
    FXNVTX_SGLANG_STEPS   denoising steps, from 0, that show their layers, like 4-8,20; all without it
    FXNVTX_SGLANG_SHAPES  1 (the default: markers with input shapes, as SGLang's have) | 0
    FXNVTX_SGLANG_RECORD  a folder: one recording per request and rank, for `fxnvtx report`
"""

from __future__ import annotations

from typing import Any

__all__ = ["missing_targets", "patch_older_releases", "register"]


def register() -> None:
    """What SGLang calls in each of its processes. Registers hooks and imports nothing of SGLang's runtime."""
    from .plugin import register as run

    run()


def patch_older_releases() -> None:
    """What `fxnvtx run` calls in each process: for releases that would not call `register`. Imports nothing of SGLang,
    and does nothing where that is not installed."""
    from .plugin import patch_older_releases as run

    run()


def missing_targets() -> list[str] | None:
    """What the installed SGLang lacks of what the plugin hooks into, in words; None where SGLang is not installed."""
    from .targets import missing_targets as run

    return run()


def __dir__() -> list[Any]:
    return __all__
