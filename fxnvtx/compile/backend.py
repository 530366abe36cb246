"""The Dynamo backend "fxnvtx"."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any

import torch

from .. import ranges as _ranges
from ..ranges import label, pop, push
from . import inductor
from .region import Region, remember
from .roots import Frame, read_graph
from .runtime import close, current

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


def fxnvtx_backend(graph_module: Any, example_inputs: Any, *, mode: Any = None, options: Any = None) -> Callable[..., Any]:
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


def ranged(region: Region, compiled: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if not _ranges.active:
            return compiled(*args)
        return listened(*args)

    def listened(*args: Any) -> Any:
        bound = region.call(args)
        before, before_silent = current.call, current.silent
        current.call, current.silent = bound, bound.silent
        opened = [] if current.silent else bound.open()
        try:
            return compiled(*args)
        finally:
            current.call, current.silent = before, before_silent
            for entry in reversed(opened):
                close(entry)

    call.__dict__.update({k: v for k, v in vars(compiled).items() if k != "__wrapped__"} if isinstance(compiled, types.FunctionType) else {})
    return call
