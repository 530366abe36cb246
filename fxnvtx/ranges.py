"""The primitive: push/pop that can never lose balance, and who listens.

Balance is kept by a stack per thread. Every push puts one entry on it and returns that entry; a pop
names the entry it closes. So a pop closes its own range and whatever was leaked inside it, and does
nothing at all when an outer pop has closed it already. NVTX itself only knows "close the innermost".

Two kinds of entry lie on a stack: an `Open` (made here), and a bare tuple (made by the paths that cannot
afford an object per range; it went to NVTX only, never to a recorder).
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable
from time import perf_counter_ns
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast

import nvtx
from nvtx._lib.lib import mark

from .labels import CATEGORIES, DOMAIN, HANDLE, Label, classes_of, domain, label, nvtx_pop, nvtx_push

__all__ = [
    "CATEGORIES",
    "DOMAIN",
    "HANDLE",
    "Label",
    "Mark",
    "Open",
    "classes_of",
    "domain",
    "label",
    "listening",
    "mark_now",
    "maybe_nvtx_range",
    "mode",
    "nvtx_pop",
    "nvtx_push",
    "pop",
    "push",
    "range",
    "range_pop",
    "range_push",
    "tool_attached",
]

log = logging.getLogger("fxnvtx")
F = TypeVar("F", bound=Callable[..., Any])


# ------------------------------------------------------------------------------------------------ listeners


class Sink(Protocol):
    """What a recorder offers. `opened` and `marked` are called on the thread that emits."""

    def opened(self, entry: Open) -> None: ...

    def marked(self, mark: Mark) -> None: ...

    def stray_pop(self) -> None: ...


def _read_mode() -> str:
    value = os.environ.get("FXNVTX", "auto").strip().lower() or "auto"
    if value in {"auto", "on", "off"}:
        return value
    log.warning("FXNVTX=%s has no meaning: use auto, on or off; auto is used", value)
    return "auto"


def tool_attached() -> bool:
    """Whether an NVTX tool listens to this process (it must have been there before the first NVTX call)."""
    return bool(HANDLE.enabled()) or bool(os.environ.get("NVTX_INJECTION64_PATH"))


mode = _read_mode()
# NVTX_DISABLE is the nvtx package's own switch; who sets it wants silence from us too.
nvtx_on = mode != "off" and not os.environ.get("NVTX_DISABLE") and (mode == "on" or tool_attached())
sinks: tuple[Sink, ...] = ()
active = nvtx_on
emitted = False
silence_told = False  # whether the log has said why nothing is emitted; once is enough
_listener_lock = threading.RLock()
_on_change: list[Callable[[], None]] = []


def listening() -> bool:
    """Whether a range emitted now would reach anybody."""
    return active


def on_listeners_changed(callback: Callable[[], None]) -> None:
    """Call `callback()` whenever somebody starts or stops listening."""
    _on_change.append(callback)


def add_sink(sink: Sink) -> None:
    global sinks, silence_told
    if mode == "off":
        if not silence_told:
            silence_told = True
            log.warning("FXNVTX=off: this recording stays empty; unset FXNVTX to record")
        return
    with _listener_lock:
        sinks = (*sinks, sink)
        _changed()


def remove_sink(sink: Sink) -> None:
    global sinks
    with _listener_lock:
        sinks = tuple(s for s in sinks if s is not sink)
        _changed()


def _changed() -> None:
    global active
    active = nvtx_on or bool(sinks)
    for callback in _on_change:
        callback()


def why_silent() -> str:
    """Why nothing is emitted, in words for a person."""
    if mode == "off":
        return "FXNVTX=off"
    if os.environ.get("NVTX_DISABLE"):
        return "NVTX_DISABLE is set and no fxnvtx.record() is running"
    return f"no NVTX tool is attached and no fxnvtx.record() is running (FXNVTX={mode})"


# ------------------------------------------------------------------------------------------------ push and pop


class _Thread(threading.local):
    """What each thread has of its own; __init__ runs once in every thread that touches it."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.id: int = threading.get_native_id()
        # instrumented models whose outermost call on this thread began while they were switched off
        self.silent: set[Any] = set()


local = _Thread()


class Open:
    """A range that has been pushed. Returned by `push`, taken by `pop`."""

    __slots__ = (
        "end_ns",
        "label",
        "leaked",
        "level",
        "on_nvtx",
        "owner",
        "payload",
        "stack",
        "start_ns",
        "stopped",
        "thread_id",
    )

    def __init__(self, text: Label, payload: object, stack: list[Any], thread_id: int) -> None:
        self.label = text
        self.payload = payload
        self.stack = stack
        self.level = len(stack)
        self.thread_id = thread_id
        self.on_nvtx = False
        self.owner: Any = None  # the instrumented model whose module this is
        self.end_ns: int | None = None
        self.leaked = False  # closed by an outer range's pop
        self.stopped = False  # popped from a thread that may not pop it
        self.start_ns = perf_counter_ns()

    def close(self) -> None:
        self.end_ns = perf_counter_ns()
        if self.on_nvtx:
            nvtx_pop(HANDLE)


class Mark:
    """An instant: a label at a time."""

    __slots__ = ("label", "payload", "thread_id", "time_ns")

    def __init__(self, text: Label, payload: object, thread_id: int) -> None:
        self.label = text
        self.payload = payload
        self.thread_id = thread_id
        self.time_ns = perf_counter_ns()


def push(text: Label, payload: object = None) -> Open | None:
    """Open a range on this thread. Returns what `pop` needs; None when nobody listens."""
    global emitted
    if not active:
        return None
    emitted = True
    stack = local.stack
    if stack:
        _sweep(stack)
    entry = Open(text, payload, stack, local.id)
    stack.append(entry)
    for sink in sinks:
        sink.opened(entry)
    if nvtx_on:
        attributes = text.attributes if payload is None else text.with_payload(payload)
        entry.on_nvtx = True
        nvtx_push(attributes, HANDLE)
    return entry


def pop(entry: Open | None) -> None:
    """Close the range that `push` returned, and whatever was leaked inside it."""
    if entry is None:
        return
    stack = entry.stack
    if stack is not local.stack:
        # A generator collected on another thread: only the owner may pop, it does so at its next turn.
        entry.stopped = True
        return
    if stack and stack[-1] is entry:
        del stack[-1]
        entry.close()
    else:
        for index in _backwards(len(stack)):
            if stack[index] is entry:
                unwind(stack, index + 1)
                del stack[-1]
                entry.close()
                break
    if stack:
        _sweep(stack)


def unwind(stack: list[Any], depth: int) -> None:
    """Close everything above `depth` entries: ranges that were leaked inside one being closed."""
    while len(stack) > depth:
        entry = stack[-1]
        del stack[-1]
        if type(entry) is tuple:
            nvtx_pop(HANDLE)
        else:
            entry.leaked = not entry.stopped
            entry.close()


def close_tuple(stack: list[Any], entry: tuple[Any, ...]) -> None:
    """The rare end of the cheap path: `entry` is not on top, so something leaked or an outer pop was faster."""
    for index in _backwards(len(stack)):
        if stack[index] is entry:
            unwind(stack, index)
            return


def _sweep(stack: list[Any]) -> None:
    while stack and type(stack[-1]) is Open and stack[-1].stopped:
        unwind(stack, len(stack) - 1)


def _backwards(size: int) -> Any:
    return reversed(_builtin_range(size))


def mark_now(text: Label, payload: object = None) -> None:
    """Emit an instant."""
    if not active:
        return
    if sinks:
        instant = Mark(text, payload, local.id)
        for sink in sinks:
            sink.marked(instant)
    if nvtx_on:
        mark(text.with_payload(payload), HANDLE)


def _after_fork() -> None:
    # The child has the parent's open ranges on its stack, but its tool never saw them begin.
    local.__dict__.clear()
    local.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=_after_fork)

# ------------------------------------------------------------------------------------------------ public forms

_builtin_range = __builtins__["range"] if isinstance(__builtins__, dict) else __builtins__.range


def range_push(
    text: str | Label, *, category: str | None = None, payload: object = None, color: int | None = None
) -> None:
    """Open a range; close it with `range_pop()` on the same thread. Prefer `range`, which cannot leak."""
    made = text if type(text) is Label else label(cast(str, text), category, color)
    _unnamed().append(push(made, payload))


def range_pop() -> None:
    """Close the range that this thread's last `range_push` opened. Never closes a range of anybody else."""
    mine = _unnamed()
    while mine:
        entry = mine.pop()
        if entry is None:  # pushed while nobody listened
            return
        if entry.end_ns is None:
            pop(entry)
            return
        # closed already by an enclosing range: it was leaked, and this pop belongs to an earlier push
    for sink in sinks:
        sink.stray_pop()


def _unnamed() -> list[Open | None]:
    """This thread's ranges from `range_push`, which has no handle to give back."""
    try:
        return cast("list[Open | None]", local.unnamed)
    except AttributeError:
        local.unnamed = []
        return cast("list[Open | None]", local.unnamed)


class range:  # noqa: N801 - a context manager and decorator, spelled like a function
    """A range around a block of code or a function.

    `payload` is a number (it reaches NVTX) or any JSON value (it reaches recordings). Works as a context
    manager (re-entrant, and from several threads at once) and as a decorator of functions, coroutine functions and
    generator functions of both kinds. With enabled=False the decorator returns the function untouched.
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
        self._opened: dict[int, list[Open | None]] = {}  # by thread: each touches its own list only

    def __enter__(self) -> range:
        self._opened.setdefault(local.id, []).append(push(self.label, self.payload) if self.enabled else None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        mine = self._opened.get(local.id)
        if not mine:  # entered on another thread: a generator that is finalized here, or a forked child
            mine = next((other for other in list(self._opened.values()) if other), None)
        if mine:
            pop(mine.pop())

    def __call__(self, function: F) -> F:
        if not self.enabled:
            return function
        text, payload = self.label, self.payload

        if inspect.isasyncgenfunction(function):

            async def inner(*args: Any, **kwargs: Any) -> Any:
                entry = push(text, payload)
                below = function(*args, **kwargs)
                try:
                    item = await below.asend(None)
                    while True:
                        try:
                            sent = yield item
                        except GeneratorExit:
                            await below.aclose()
                            raise
                        except BaseException as error:
                            item = await below.athrow(error)
                        else:
                            item = await below.asend(sent)
                except StopAsyncIteration:
                    return
                finally:
                    pop(entry)

        elif inspect.iscoroutinefunction(function):

            async def inner(*args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
                entry = push(text, payload)
                try:
                    return await function(*args, **kwargs)
                finally:
                    pop(entry)

        elif inspect.isgeneratorfunction(function):

            def inner(*args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
                entry = push(text, payload)
                try:
                    return (yield from function(*args, **kwargs))
                finally:
                    pop(entry)

        else:

            def inner(*args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
                entry = push(text, payload)
                try:
                    return function(*args, **kwargs)
                finally:
                    pop(entry)

        return cast(F, functools.wraps(function)(inner))


def maybe_nvtx_range(text: str, enabled: bool = True) -> range:
    """`range(text)` where `enabled`, else nothing: one line instead of an if around a with."""
    return range(text, enabled=enabled)


def nvtx_version() -> str:
    return str(getattr(nvtx, "__version__", "unknown"))
