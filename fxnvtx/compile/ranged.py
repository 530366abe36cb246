"""The callable that Dynamo gets: the compiled region, the range around it, and the range around its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import ranges as _ranges
from ..ranges import pop, push
from .notices import warn_once
from .region import BACKWARD, Call, Region
from .runtime import Table, current
from .torch_private import hide_module

__all__ = ["ranged", "watched"]


def ranged(
    region: Region, compiled: Callable[..., Any], *, table: Table | None = None, watching: bool = True
) -> Callable[..., Any]:
    """`compiled` with `region`'s ranges. Runs also where a CUDA graph replays the region and no generated code runs."""

    def call(*args: Any) -> Any:
        if not _ranges.active:
            return compiled(*args)
        return _listened(region, compiled, args, table, watching)

    return _marked(call, compiled)


def watched(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """One piece of a region: it has its own backward."""

    def call(*args: Any) -> Any:
        result = compiled(*args)
        if _ranges.active and current.call is not None and not current.silent:
            _watch(current.call, result)
        return result

    return _marked(call, compiled)


def _marked(call: Callable[..., Any], compiled: Any) -> Callable[..., Any]:
    """With what torch asks of a compiled callable, without what makes Dynamo look through it."""
    marks = {k: v for k, v in getattr(compiled, "__dict__", {}).items() if not k.startswith(("_torchdynamo", "__"))}
    call.__dict__.update(marks)
    return call


def _listened(
    region: Region, compiled: Callable[..., Any], args: tuple[Any, ...], table: Table | None, watching: bool
) -> Any:
    try:
        call = region.call(args)
    except Exception as error:  # a model runs, whatever its ranges may be called
        warn_once("names", f"the compiled region {region.title} is not shown, naming it failed: {error!r}")
        return compiled(*args)
    before = current.call, current.silent, current.cursor
    current.call, current.silent, current.cursor = call, call.silent, None
    opened = [] if current.silent else call.open()
    try:
        if table is not None:
            current.cursor = table.enter()
        result = compiled(*args)
        if watching and not current.silent:
            _watch(call, result)
        return result
    finally:
        if current.cursor is not None:
            current.cursor.close()
        current.call, current.silent, current.cursor = before
        for entry in reversed(opened):
            pop(entry)


def _watch(call: Call, result: Any) -> None:
    if torch.is_grad_enabled():
        for node in _backward_nodes(result):
            Backward(call).watch(node)


def _backward_nodes(result: Any) -> Iterator[Any]:
    """The autograd node of this very call (one for all outputs; outputs that are views hide it one step back)."""
    seen = set()
    for tensor in result if isinstance(result, (tuple, list)) else (result,):
        node = getattr(tensor, "grad_fn", None)
        for candidate in (node, *(n for n, _ in getattr(node, "next_functions", ()))):
            if candidate is not None and type(candidate).__name__ == "CompiledFunctionBackward":
                if candidate not in seen:
                    seen.add(candidate)
                    yield candidate
                break


class Backward:
    """The range around one call's backward, opened and closed by autograd on the thread that runs it."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.opened: list[Any] = []
        self.before: list[tuple[Call | None, bool]] = []

    def watch(self, node: Any) -> None:
        node.register_prehook(self.begin)
        node.register_hook(self.end)

    def begin(self, gradients: Any) -> None:
        if current.unfinished is not None:  # a backward that failed before its generated code began
            current.unfinished()
        if not _ranges.active:
            return
        self.before.append((current.call, current.silent))
        current.call, current.silent = self.call, self.call.silent
        current.unfinished = self.finish
        if current.silent:
            return
        if self.call.region.replayed:
            self.open()  # no generated code will run that could ask for it
        else:
            current.opening = self.open  # at the first launch: a backward that only hands gradients on has none

    def open(self) -> None:
        current.opening = None
        self.opened = [push(BACKWARD, None, self.call.control), *self.call.open()]

    def end(self, gradients: Any, incoming: Any) -> None:
        self.finish()

    def finish(self) -> None:
        """Close what `begin` opened. Also called from the generated code where a kernel raised: autograd would not."""
        current.unfinished = current.opening = None
        opened, self.opened = self.opened, []
        for entry in reversed(opened):
            pop(entry)
        if self.before:
            current.call, current.silent = self.before.pop()


hide_module(globals())  # autograd and compiled code call this with Dynamo watching
