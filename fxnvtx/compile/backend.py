"""The Dynamo backend "fxnvtx"."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ..ranges import label, pop, push
from . import inductor
from .ranged import ranged
from .region import remember
from .roots import Frame, read_graph

__all__ = ["fxnvtx_backend"]

log = logging.getLogger("fxnvtx")


def current_frame() -> Frame:
    """The frame that Dynamo is compiling on this thread."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        root = InstructionTranslator.current_tx().output.root_tx
        return Frame(root.f_code, root.f_locals, root.f_globals)
    except (ImportError, AttributeError):
        return Frame(None, {}, {})


def fxnvtx_backend(
    graph_module: Any, example_inputs: Any, *, mode: Any = None, options: Any = None
) -> Callable[..., Any]:
    config_patches = torch._TorchCompileInductorWrapper(mode, options, None).config
    region, owners = read_graph(graph_module, current_frame(), list(example_inputs))
    remember(region)
    entry = push(label("compile", "compile"))
    try:
        compiled = inductor.compile_graph(
            graph_module, example_inputs, config_patches, inductor.Compilation(region.key, owners)
        )
    finally:
        pop(entry)
    return ranged(region, compiled)
