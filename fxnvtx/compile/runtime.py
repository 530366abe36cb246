"""What runs: the callable that Dynamo gets, and what the generated code in it calls.

The callable is the compiled region, the range around it, and the range around its backward. The generated code goes
from the number of an owner to open ranges, on the thread that launches.

A table is a literal in the generated source and knows modules only by paths relative to the compiled region, so that
cached code is valid in every process and for every block it serves. Which block it is serving comes with the call.
Imports neither Dynamo nor Inductor: cached code runs without them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from time import perf_counter_ns
from typing import Any

import torch

from ..categories import MODULE, PIECE
from ..errors import warn_once
from ..ranges import HANDLE, Entry, Label, emit, label, local, nvtx_pop, nvtx_push, pop, push
from ..ranges.emit import attend, close_deep
from .labels import moved_row, moves_of
from .metering import register_work
from .region import BACKWARD, Call, Region, families
from .torch_private import hide_module

__all__ = ["Cursor", "Table", "current", "ranged", "watched"]


class _Current(threading.local):
    """The call of a compiled region that this thread is executing."""

    call: Call | None = None
    silent: bool = False
    cursor: Cursor | None = None  # where range nodes are in a graph that runs as it is
    unfinished: Callable[[], None] | None = None  # closes the range of a backward that is under way
    opening: Callable[[], None] | None = None  # opens it, at its first launch


def captured() -> bool:
    """Whether this thread is recording a CUDA graph. Its ranges tell the layers of every replay to come, so they are
    emitted also where the model is switched off: a graph is usually captured in a warm-up, which shows nothing else."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


current = _Current()
Levels = tuple[tuple[Any, Label], ...]


class Place:
    """Where a cursor is: at a row, having shown certain module calls. `moves`: by row, what to close, what to open, and
    the place after it. The code goes the same way in each call, so after the first one everything is found here."""

    __slots__ = ("moves", "row", "seen")

    def __init__(self, row: int, seen: int) -> None:
        self.row = row
        self.seen = seen  # a bit per module call (an int of as many bits is a small set that can be a key)
        self.moves: dict[int, Move] = {}


Move = tuple[int, tuple[Label, ...], Place]


class Resolved:
    """A table's rows as labels, for one block, and the ways between them."""

    __slots__ = ("_bits", "_places", "levels", "start")

    def __init__(self, levels: list[Levels]) -> None:
        self.levels = [(), *levels]  # 0 is the region itself
        self._bits: dict[Any, int] = {}
        self._places: dict[tuple[int, int], Place] = {}
        self.start = self._place(0, 0)

    def _place(self, row: int, seen: int) -> Place:
        found = self._places.get((row, seen))
        if found is None:
            found = self._places[row, seen] = Place(row, seen)
        return found

    def move(self, place: Place, row: int) -> Move:
        """From a place to a row. Who counts ranges wants to count calls: a module that had a range in this call already
        goes on. Only a module's call does so: the range of a fused kernel, and a user's own, are each one."""
        old, new = self.levels[place.row], self.levels[row]
        same = 0
        while same < min(len(old), len(new)) and old[same] == new[same]:
            same += 1
        opening, seen = [], place.seen
        for step, text in new[same:]:
            if text.category == MODULE:
                bit = 1 << self._bits.setdefault(step, len(self._bits))
                seen |= bit
                if place.seen & bit:
                    text = piece(text)
            opening.append(text)
        if len(self._places) > 8192 + 4 * len(self.levels):  # code that goes another way each time
            self._places.clear()
            self.start.moves.clear()
        found = place.moves[row] = (len(old) - same, tuple(opening), self._place(row, seen))
        return found


class Table:
    """The owners of one generated function. Rows as `owners.owners_of` writes them."""

    def __init__(
        self,
        key: str,
        backward: bool,
        rows: list[Any],
        shapes: list[list[list[int]]],
        below: bool = False,
        work: list[Any] | None = None,
    ) -> None:
        self.key = key
        self.backward = backward
        self.rows = rows
        self.shapes = shapes  # input shapes of launches: the payload of the range that a launch opens
        self.below = below  # the function is a subgraph's: one for all its calls
        self.work = work or []  # (row, flops, bytes, why unknown), in the order in which the code goes through rows
        self._resolved: dict[Any, tuple[Resolved, Any]] = {}

    def enter(self, *tensors: Any) -> Cursor | None:
        """Called at the start of the generated function, while somebody listens. `tensors`: those of its arguments
        that may be parameters, where these are needed to tell whose call it is."""
        if current.silent and not captured():
            return None
        try:
            call = current.call
            if call is not None and call.key == self.key:
                return Cursor(self, self.resolve(call, tensors), call, [])
            call = self._find(tensors)
            if call is None or (call.silent and not captured()):
                return None
            resolved = self.resolve(call, tensors)
        except Exception as error:  # a model runs, whatever its ranges may be called
            warn_once("names", f"layers of a compiled region are not shown, naming them failed: {error!r}")
            return None
        base = [push(BACKWARD, None, call.control)] if self.backward else []
        return Cursor(self, resolved, call, base + call.open())

    def _find(self, tensors: tuple[Any, ...]) -> Call | None:
        for reference in reversed(families.get(self.key, ())):
            region = reference()
            if region is not None:
                return region.call_of(tensors)
        return None

    def resolve(self, call: Call, tensors: tuple[Any, ...]) -> Resolved:
        moved = moves_of(self.rows, call.bindings, call.region.repeats, tensors) if self.below else None
        signature = (call.signature, moved)
        found = self._resolved.get(signature)
        if found is None:
            if len(self._resolved) > 1024:
                self._resolved.clear()
            names = call.names()
            found = (Resolved([names.levels(moved_row(row, moved)) for row in self.rows]), call)
            self._resolved[signature] = found
            register_work(self, found[0], call)
        return found[0]


class Cursor:
    """Where one call of a generated function is. Calling it with a row's number moves there."""

    __slots__ = ("_base", "_open", "_owner", "_place", "_resolved", "_shapes", "_stack")

    def __init__(self, table: Table, resolved: Resolved, call: Call, base: list[Any]) -> None:
        self._shapes = table.shapes
        self._resolved = resolved
        self._base = base
        self._place = resolved.start
        self._open: list[Entry | None] = []
        self._owner = call.control
        self._stack = local.stack

    def __call__(self, row: int, shapes: int = -1) -> None:
        place = self._place
        if not place.row and current.opening is not None:
            current.opening()
        closing, opening, self._place = place.moves.get(row) or self._resolved.move(place, row)
        mine, stack, nvtx_on = self._open, self._stack, emit.nvtx_on
        if stack.special:
            attend(stack)
        if emit.live:
            for _ in range(closing):
                pop(mine.pop())
            payload = self._payload(shapes)
            for left, text in enumerate(opening, 1 - len(opening)):
                mine.append(push(text, None if left else payload, self._owner))
            return
        log = stack.log
        while closing:
            closing -= 1
            entry = mine.pop()
            if stack and stack[-1] is entry:
                del stack[-1]
                if log is not None:
                    log += (entry, perf_counter_ns())
                if nvtx_on:
                    nvtx_pop(HANDLE)
            elif entry is not None:
                close_deep(stack, entry)
        if log is not None:
            owner, left = self._owner, len(opening)
            for text in opening:
                left -= 1
                entry = (text, owner, None if left else self._payload(shapes), perf_counter_ns())
                mine.append(entry)
                stack.append(entry)
                log.append(entry)
                if nvtx_on:
                    nvtx_push(text.attributes, HANDLE)
        elif nvtx_on:
            owner = self._owner
            for text in opening:
                entry = (text, owner)
                mine.append(entry)
                stack.append(entry)
                nvtx_push(text.attributes, HANDLE)
        else:  # the last listener has gone
            mine += [None] * len(opening)

    def _payload(self, shapes: int) -> object:
        return self._shapes[shapes] or None if shapes >= 0 else None

    def close(self) -> None:
        """End of the generated function, by return or exception."""
        mine = self._open
        while mine:
            pop(mine.pop())
        for entry in reversed(self._base):
            pop(entry)
        if current.unfinished is not None and sys.exc_info()[0] is not None:
            current.unfinished()


def piece(text: Label) -> Label:
    """The label of a range that goes on with the call of the module that `text` names."""
    return label(text.text, PIECE)


# ------------------------------------------------------------------------------------------------- what Dynamo calls


def ranged(
    region: Region, compiled: Callable[..., Any], *, table: Table | None = None, watching: bool = True
) -> Callable[..., Any]:
    """`compiled` with `region`'s ranges. Runs also where a CUDA graph replays the region and no generated code runs."""

    def call(*args: Any) -> Any:
        if not emit.active:
            return compiled(*args)
        return _listened(region, compiled, args, table, watching)

    return _marked(call, compiled)


def watched(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """One piece of a region: it has its own backward."""

    def call(*args: Any) -> Any:
        result = compiled(*args)
        if emit.active and current.call is not None and not current.silent:
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
        if not emit.active:
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
