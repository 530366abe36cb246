"""Other people's libraries, each in a module of its own that imports the library only when it is used; and vLLM-Omni's
plugin, which imports nothing of that: in every process of its engine, each model that is called shows its layers.

vLLM-Omni calls the functions of the entry-point group `vllm_omni.general_plugins` in its main process and in each
worker, before a model is built. Its diffusion pipelines are modules that own transformer, VAE and text encoders and are
entered through `forward()`; so they are found as `fxnvtx run` finds models, by who owns what.

    FXNVTX_VLLM_OMNI=1          without it, nothing happens
    FXNVTX_VLLM_OMNI_DEPTH=2    levels below each model; all without it

Ranges go to whoever listens: Nsight Systems, or torch.profiler while vLLM-Omni's own profiler runs.
"""

from __future__ import annotations

import os

__all__ = ["register_vllm_omni"]

_started = False


def register_vllm_omni() -> None:
    """The entry point. Safe to call more than once, which vLLM-Omni reserves the right to do."""
    global _started
    wanted = os.environ.get("FXNVTX_VLLM_OMNI", "").strip().lower()
    if _started or wanted in ("", "0", "off", "false"):
        return
    from ..ranges import emit
    from .everything import Everything

    depth = os.environ.get("FXNVTX_VLLM_OMNI_DEPTH", "").strip()
    if depth and not depth.isdecimal():
        emit.log.warning("FXNVTX_VLLM_OMNI_DEPTH=%s is no number of levels: all are shown", depth)
    _started = True
    Everything(int(depth) if depth.isdecimal() else None).start()
