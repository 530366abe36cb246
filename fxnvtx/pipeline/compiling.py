"""Compiled components under the residency manager."""

from __future__ import annotations

import torch

from .composed import ComposedPipeline

__all__ = ["compile_component"]


def compile_component(pipeline: ComposedPipeline, name: str) -> None:
    """Put torch.compile(backend="fxnvtx") around a component. Compiling happens at its first call."""
    pipeline.components[name] = torch.compile(pipeline.components[name], backend="fxnvtx")
    pipeline.residency.refresh_pipeline()
