"""What we ask of Dynamo itself: the frame it compiles, its backends, and its way of compiling a graph in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch.fx import Node

from ..errors import CompileError
from .roots import Frame

__all__ = ["compile_pieces", "current_frame", "lookup", "reset"]


def current_frame() -> Frame:
    """The frame that Dynamo is compiling on this thread, as far as this torch tells."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        root = InstructionTranslator.current_tx().output.root_tx
        return Frame(root.f_code, root.f_locals, root.f_globals)
    except (ImportError, AttributeError):
        return Frame(None, {}, {})


def reset(inner: Any, cuda_graphs: bool) -> None:
    """What torch._dynamo.reset() does to the inner backend."""
    if inner == "inductor":
        if cuda_graphs:
            from torch._inductor.cudagraph_trees import reset_cudagraph_trees

            reset_cudagraph_trees()
    elif hasattr(inner, "reset"):
        inner.reset()


def lookup(inner: Any) -> Callable[..., Any]:
    """The Dynamo backend of this name, or the callable itself."""
    from torch._dynamo.backends.registry import list_backends, lookup_backend
    from torch._dynamo.exc import InvalidBackend

    try:
        return lookup_backend(inner)
    except InvalidBackend as error:
        names = ", ".join(list_backends(()))
        raise CompileError(f"inner={inner!r} is no Dynamo backend; known ones: {names}") from error


def compile_pieces(
    graph_module: Any, example_inputs: Any, pieces: dict[Node, int], compiler: Callable[[Any, Any], Any]
) -> Callable[..., Any]:
    """Cut a graph into numbered pieces and compile each, as Dynamo's DDPOptimizer does at its bucket boundaries."""
    from torch._dynamo.backends import distributed as split
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.split_module import split_module

    if len(set(pieces.values())) < 2:
        return cast("Callable[..., Any]", compiler(graph_module, example_inputs))
    whole = split_module(graph_module, None, lambda node: pieces[node])  # type: ignore[arg-type]
    split.propagate_dynamo_source(graph_module, whole)
    split.propagate_metadata(graph_module, whole)
    fake_mode = detect_fake_mode(example_inputs) or FakeTensorMode()
    split.SubmodCompiler(whole, compiler, fake_mode).run(*example_inputs)
    whole.recompile()
    return whole.forward
