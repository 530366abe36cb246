"""The primitive: push/pop that can never lose balance, and who listens.

Balance is kept by a stack per thread (stack.py). Every push puts one entry on it and returns that entry; a pop
names the entry it closes. So a pop closes its own range and whatever was leaked inside it, and does
nothing at all when an outer pop has closed it already. NVTX itself only knows "close the innermost".
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
from typing import Any, TypeVar, cast

from nvtx._lib.lib import mark

from .labels import CATEGORIES, DOMAIN, HANDLE, Label, classes_of, domain, label, nvtx_pop, nvtx_push
from .stack import Entry, Live, Mark, Open, RangeStack, Sink, Stacks

__all__ = [
    "CATEGORIES",
    "DOMAIN",
    "HANDLE",
    "Entry",
    "Label",
    "Mark",
    "Open",
    "RangeStack",
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
sinks: tuple[Sink | Live, ...] = ()
live: tuple[Live, ...] = ()  # those of them that are told of every range at once
active = nvtx_on
emitted = False
silence_told = False  # whether the log has said why nothing is emitted; once is enough
_listener_lock = threading.RLock()
_on_change: list[Callable[[], None]] = []
_stacks = Stacks()


def listening() -> bool:
    """Whether a range emitted now would reach anybody."""
    return active


def on_listeners_changed(callback: Callable[[], None]) -> None:
    """Call `callback()` whenever somebody starts or stops listening."""
    _on_change.append(callback)


def add_sink(sink: Sink | Live) -> None:
    global sinks, silence_told
    if mode == "off":
        if not silence_told:
            silence_told = True
            log.warning("FXNVTX=off: this recording stays empty; unset FXNVTX to record")
        return
    with _listener_lock:
        sinks = (*sinks, sink)
        _changed()


def remove_sink(sink: Sink | Live) -> None:
    global sinks
    with _listener_lock:
        sinks = tuple(s for s in sinks if s is not sink)
        _changed()


def _changed() -> None:
    global active, live
    _stacks.changed(_recorders())
    live = cast("tuple[Live, ...]", tuple(s for s in sinks if not hasattr(s, "listen")))
    active = nvtx_on or bool(sinks)
    for callback in _on_change:
        callback()


def _recorders() -> list[Sink]:
    return cast("list[Sink]", [s for s in sinks if hasattr(s, "listen")])


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
        self.id: int = threading.get_native_id()
        self.stack = RangeStack(self.id)
        # instrumented models whose outermost call on this thread began while they were switched off
        self.silent: set[Any] = set()
        with _listener_lock:
            _stacks.add(self.stack, _recorders())


local = _Thread()


def push(text: Label, payload: object = None, owner: object = None) -> Entry | None:
    """Open a range on this thread. Returns what `pop` needs; None when nobody listens.

    `owner` is the instrumented model whose module the range names.
    """
    global emitted
    if not active:
        return None
    emitted = True
    stack = local.stack
    if stack.special:
        attend(stack)
    if live:
        return _push_live(stack, text, payload, owner)
    log = stack.log  # another thread may start or stop a recorder meanwhile
    entry: Entry
    if log is None:
        entry = (text, owner)
        stack.append(entry)
    else:
        entry = (text, owner, payload, perf_counter_ns())
        stack.append(entry)
        log.append(entry)
    if nvtx_on:
        nvtx_push(text.attributes if payload is None else text.with_payload(payload), HANDLE)
    return entry


def pop(entry: Entry | None) -> None:
    """Close the range that `push` returned, and whatever was leaked inside it."""
    if entry is None:
        return
    stack = local.stack
    if stack and stack[-1] is entry:
        del stack[-1]
        if live:
            _closed(stack, entry)
        else:
            log = stack.log
            if log is not None:
                log += (entry, perf_counter_ns())
            if nvtx_on:
                nvtx_pop(HANDLE)
    else:
        close_deep(stack, entry)
    if stack.special:
        attend(stack)


def _push_live(stack: RangeStack, text: Label, payload: object, owner: object) -> Entry:
    opened = Open(text, payload, len(stack), stack.thread_id)
    entry = (text, owner, payload, opened.start_ns, opened)
    stack.append(entry)
    log = stack.log
    if log is not None:
        log.append(entry)
    for told in live:
        told.opened(opened)
    if nvtx_on:
        opened.on_nvtx = True
        nvtx_push(text.attributes if payload is None else text.with_payload(payload), HANDLE)
    return entry


def _closed(stack: RangeStack, entry: Entry, leaked: bool = False) -> None:
    """Tell those who listen that `entry`, already off the stack, is over."""
    log = stack.log
    now = perf_counter_ns()
    if log is not None and len(entry) > 2:
        log += (entry, -now if leaked else now)
    if len(entry) < 5:
        if nvtx_on:
            nvtx_pop(HANDLE)
        return
    opened: Open = entry[4]
    opened.end_ns, opened.leaked = now, leaked
    if opened.on_nvtx:
        nvtx_pop(HANDLE)
    for told in live:
        told.closed(opened)


def unwind(stack: RangeStack, depth: int) -> None:
    """Close everything above `depth` entries: ranges that were leaked inside one being closed."""
    while len(stack) > depth:
        entry = stack[-1]
        del stack[-1]
        stack.torn = True
        _closed(stack, entry, leaked=not stack.was_stopped(entry))


def close_deep(stack: RangeStack, entry: Entry) -> None:
    """The rare pop, of what is not on top: something leaked inside it, an outer pop was faster, or it is another
    thread's (a generator collected here): only the owner may pop, it does so at its next turn."""
    for index in _backwards(len(stack)):
        if stack[index] is entry:
            unwind(stack, index + 1)
            del stack[-1]
            _closed(stack, entry)
            return
    for other in _stacks.all():
        if other is not stack and other.holds(entry):
            other.stop(entry)
            return


def attend(stack: RangeStack) -> None:
    """What other threads left to do: close what they popped, once it is on top."""
    while stack and stack.was_stopped(stack[-1]):
        entry = stack[-1]
        del stack[-1]
        _closed(stack, entry)
    for entry in tuple(stack.stopped):
        if not stack.holds(entry):  # an outer pop was faster
            stack.was_stopped(entry)
    stack.special = False
    if stack.stopped:  # asked after the flag is down: who stops an entry meanwhile raises it again
        stack.special = True


def _backwards(size: int) -> Any:
    return reversed(_builtin_range(size))


def mark_now(text: Label, payload: object = None) -> None:
    """Emit an instant."""
    if not active:
        return
    log = local.stack.log
    now = perf_counter_ns()
    if log is not None:
        log.append((text, payload, now))
    for told in live:
        told.marked(Mark(text, payload, local.id, now))
    if nvtx_on:
        mark(text.with_payload(payload), HANDLE)


def _before_fork() -> None:
    _listener_lock.acquire()


def _after_fork() -> None:
    _listener_lock.release()


def _after_fork_in_child() -> None:
    _listener_lock.release()
    # The child has the parent's open ranges on its stack, but its tool never saw them begin. Of other threads it has
    # the stacks, not the threads.
    global _stacks
    _stacks = Stacks()
    local.__dict__.clear()
    local.__init__()  # type: ignore[misc]


# A child must not inherit a lock whose owner it does not have.
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)

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
    stack = local.stack
    while mine:
        entry = mine.pop()
        if entry is None:  # pushed while nobody listened
            return
        if stack.holds(entry):
            pop(entry)
            return
        # closed already by an enclosing range: it was leaked, and this pop belongs to an earlier push
    for sink in sinks:
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
        self._opened: dict[int, list[Entry | None]] = {}  # by thread: each touches its own list only

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
