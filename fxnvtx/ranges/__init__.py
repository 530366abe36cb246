"""Ranges as users and the rest of fxnvtx open them: `range`, and what it is made of.

What happens at a push and a pop, and who listens, is in emit.py. What changes there while a program runs
(`emit.active`, `emit.nvtx_on`, ...) has to be read there.
"""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable
from sys import _getframe
from time import perf_counter_ns
from types import TracebackType
from typing import Any, TypeVar, cast

from . import emit
from .crossing import ASYNC, Crossing, held_function, is_left_inside, surrounding
from .emit import (
    add_sink,
    attend,
    begin,
    end,
    listening,
    local,
    mark_now,
    on_listeners_changed,
    open_labels,
    pop,
    push,
    remove_sink,
    tell_closed,
    tool_attached,
    why_silent,
)
from .labels import CATEGORIES, DOMAIN, HANDLE, Label, classes_of, domain, label, nvtx_pop, nvtx_push
from .stack import Entry, Mark, Open, RangeStack

__all__ = [
    "CATEGORIES",
    "DOMAIN",
    "HANDLE",
    "Crossing",
    "Entry",
    "Label",
    "Mark",
    "Open",
    "RangeStack",
    "add_sink",
    "begin",
    "classes_of",
    "domain",
    "end",
    "label",
    "listening",
    "local",
    "mark_now",
    "maybe_nvtx_range",
    "nvtx_pop",
    "nvtx_push",
    "on_listeners_changed",
    "open_labels",
    "pop",
    "push",
    "range",
    "range_pop",
    "range_push",
    "remove_sink",
    "tool_attached",
    "why_silent",
]

F = TypeVar("F", bound=Callable[..., Any])


def range_push(
    text: str | Label, *, category: str | None = None, payload: object = None, color: int | None = None
) -> None:
    """Open a range; close it with `range_pop()` on the same thread. Prefer `range`, which cannot leak."""
    made = text if type(text) is Label else label(cast(str, text), category, color)
    _unnamed().append(push(made, payload))


def range_pop() -> None:
    """Close the range that this thread's last `range_push` opened. Never closes a range of anybody else."""
    mine = _unnamed()
    stack = local.stack
    while mine:
        entry = mine.pop()
        if entry is None:  # pushed while nobody listened
            return
        if stack.holds(entry):
            pop(entry)
            return
        # closed already by an enclosing range: it was leaked, and this pop belongs to an earlier push
    for sink in emit.sinks:
        sink.stray_pop()


def _unnamed() -> list[Entry | None]:
    """This thread's ranges from `range_push`, which has no handle to give back."""
    try:
        return cast("list[Entry | None]", local.unnamed)
    except AttributeError:
        local.unnamed = []
        return cast("list[Entry | None]", local.unnamed)


class range:  # noqa: N801 - a context manager and decorator, spelled like a function
    """A range around a block of code or a function.

    `payload` is a number (it reaches NVTX) or any JSON value (it reaches recordings). Works as a context
    manager (re-entrant, and from several threads at once), as an asynchronous one, and as a decorator of functions,
    coroutine functions and generator functions of both kinds. With enabled=False the decorator returns the function
    untouched.

    What the thread may leave in between becomes a start/end range, which may cross others: `async with`, a `with` in a
    coroutine with an await in its body, and decorated coroutines and generators. Everything else is push/pop.
    """

    __slots__ = ("_opened", "enabled", "label", "payload")

    def __init__(
        self,
        text: str | Label,
        *,
        category: str | None = None,
        payload: object = None,
        color: int | None = None,
        enabled: bool = True,
    ) -> None:
        self.label = text if type(text) is Label else label(cast(str, text), category, color)
        self.payload = payload
        self.enabled = enabled
        # What is not on a stack under this object as its owner: by thread, each touches its own list only. None: nobody
        # listened, or an outer pop was faster
        self._opened: dict[int, list[Entry | Crossing | None]] = {}

    def __enter__(self) -> range:
        if not self.enabled:
            return self
        if not emit.active:
            self._opened.setdefault(local.id, []).append(None)
            return self
        frame = _getframe(1)
        if frame.f_code.co_flags & ASYNC and is_left_inside(frame):
            self._opened.setdefault(local.id, []).append(begin(self.label, self.payload, opener=self))
        elif self._opened:
            self._opened.setdefault(local.id, []).append(push(self.label, self.payload))
        else:
            push(self.label, self.payload, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._opened:
            stack = local.stack
            entry = stack[-1] if stack else ()
            if len(entry) > 1 and entry[1] is self:  # the usual case: pop(), without looking for the stack again
                del stack[-1]
                if emit.live:
                    tell_closed(stack, entry)
                else:
                    log = stack.log
                    if log is not None:
                        log += (entry, perf_counter_ns())
                    if emit.nvtx_on:
                        nvtx_pop(HANDLE)
                if stack.special and stack.stopped:
                    attend(stack)
                return
        if self.enabled:
            self._leave()

    def closed_early(self, stack: RangeStack) -> None:
        """An outer pop was faster than the `with` statement's: that one, to come, has nothing to do."""
        self._opened.setdefault(stack.thread_id, []).append(None)

    def _leave(self) -> None:
        mine = self._opened.get(local.id)
        if not mine:
            for stack in (local.stack, *emit.stacks.all()):
                for entry in reversed(tuple(stack)):
                    if len(entry) > 1 and entry[1] is self:
                        pop(entry)
                        return
            # entered on another thread: a generator that is finalized here, or a forked child
            mine = next((other for other in list(self._opened.values()) if other), None)
            if not mine:
                return
        last = mine[-1]
        if type(last) is not Crossing:
            del mine[-1]  # nothing else that is still open can have been entered since
            pop(last)  # type: ignore[arg-type]  # type() narrows nothing
        else:
            self._leave_crossing(mine)
        if not mine:
            for thread_id, other in list(self._opened.items()):
                if other is mine:
                    self._opened.pop(thread_id, None)

    def _leave_crossing(self, mine: list[Any]) -> None:
        # of several tasks' the one of ours
        found = next((c for c in surrounding() if c.opener is self and c in mine), None)
        if found is not None:
            mine.remove(found)
            end(found)
            return
        # The context knows of none: the last that was not entered in a coroutine, else the last
        last = next((i for i in reversed(builtins.range(len(mine))) if type(mine[i]) is not Crossing), -1)
        opened: Any = mine.pop(last)
        close: Any = end if type(opened) is Crossing else pop
        close(opened)

    async def __aenter__(self) -> range:
        if self.enabled:
            self._opened.setdefault(local.id, []).append(begin(self.label, self.payload, opener=self))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self._leave()

    def __call__(self, function: F) -> F:
        if not self.enabled:
            return function
        text, payload = self.label, self.payload

        inner = held_function(function, lambda: begin(text, payload), end)
        if inner is None:

            def inner(*args: Any, **kwargs: Any) -> Any:
                entry = push(text, payload)
                try:
                    return function(*args, **kwargs)
                finally:
                    pop(entry)

        return cast(F, functools.wraps(function)(inner))


def maybe_nvtx_range(text: str, enabled: bool = True) -> range:
    """`range(text)` where `enabled`, else nothing: one line instead of an if around a with."""
    return range(text, enabled=enabled)
