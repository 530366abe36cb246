"""The primitive: push/pop that can never lose balance, and who listens.

Balance is kept by a stack per thread (stack.py). Every push puts one entry on it and returns that entry; a pop
names the entry it closes. So a pop closes its own range and whatever was leaked inside it, and does
nothing at all when an outer pop has closed it already. NVTX itself only knows "close the innermost".
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any, cast

from nvtx._lib.lib import mark

from ..categories import OP, TASK_SWITCH
from .crossing import Crossing, around, latest, surrounding, switch
from .labels import (
    HANDLE,
    Label,
    label,
    nvtx_end,
    nvtx_pop,
    nvtx_push,
    nvtx_start,
)
from .stack import Entry, Live, Mark, Open, RangeStack, Sink, Stacks

__all__ = [
    "add_sink",
    "attend",
    "begin",
    "close_deep",
    "end",
    "listening",
    "local",
    "mark_now",
    "on_listeners_changed",
    "open_labels",
    "pop",
    "push",
    "remove_sink",
    "stacks",
    "tell_closed",
    "tool_attached",
    "unwind",
    "why_silent",
]

log = logging.getLogger("fxnvtx")


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
crossings: set[int] = set()  # numbers of the open ranges that may cross others: while there are any, all stacks attend
silence_logged = False  # whether the log has said why nothing is emitted; once is enough
listener_lock = threading.RLock()
_on_change: list[Callable[[], None]] = []
stacks = Stacks()
_before_this_process = 0  # crossing ranges up to this number are those of the process that this one was forked from


def listening() -> bool:
    """Whether a range emitted now would reach anybody."""
    return active


def on_listeners_changed(callback: Callable[[], None]) -> None:
    """Call `callback()` whenever somebody starts or stops listening."""
    _on_change.append(callback)


def add_sink(sink: Sink | Live) -> None:
    global sinks, silence_logged
    if mode == "off":
        if not silence_logged:
            silence_logged = True
            log.warning("FXNVTX=off: this recording stays empty; unset FXNVTX to record")
        return
    with listener_lock:
        sinks = (*sinks, sink)
        _changed()


def remove_sink(sink: Sink | Live) -> None:
    global sinks
    with listener_lock:
        sinks = tuple(s for s in sinks if s is not sink)
        _changed()


def _changed() -> None:
    global active, live
    stacks.changed(_recorders())
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
        with listener_lock:
            stacks.add(self.stack, _recorders())
        self.stack.special = bool(crossings)


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
            tell_closed(stack, entry)
        else:
            log = stack.log
            if log is not None:
                log += (entry, perf_counter_ns())
            if nvtx_on:
                nvtx_pop(HANDLE)
    else:
        close_deep(stack, entry)
    if stack.special and stack.stopped:
        attend(stack)


def _push_live(stack: RangeStack, text: Label, payload: object, owner: object) -> Entry:
    inside = around() if crossings else None
    opened = Open(text, payload, len(stack), stack.thread_id)
    if inside is not None:
        opened.level += inside.level + 1
        opened.inside = inside.number
    entry = (text, owner, payload, opened.start_ns, opened)
    stack.append(entry)
    log = stack.log
    if log is not None:
        log.append(entry)
    for listener in live:
        listener.opened(opened)
    if nvtx_on:
        opened.on_nvtx = True
        nvtx_push(text.attributes if payload is None else text.with_payload(payload), HANDLE)
    return entry


def tell_closed(stack: RangeStack, entry: Entry, leaked: bool = False) -> None:
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
    for listener in live:
        listener.closed(opened)


def unwind(stack: RangeStack, depth: int) -> None:
    """Close everything above `depth` entries: ranges that were leaked inside one being closed."""
    while len(stack) > depth:
        entry = stack[-1]
        del stack[-1]
        stack.torn = True
        leaked = not stack.was_stopped(entry)
        if leaked and len(entry) > 1 and hasattr(entry[1], "closed_early"):  # a `with` statement's (ranges.range)
            entry[1].closed_early(stack)
        tell_closed(stack, entry, leaked)


def close_deep(stack: RangeStack, entry: Entry) -> None:
    """The rare pop, of what is not on top: something leaked inside it, an outer pop was faster, or it is another
    thread's (a generator collected here): only the owner may pop, it does so at its next turn."""
    for index in reversed(range(len(stack))):
        if stack[index] is entry:
            unwind(stack, index + 1)
            del stack[-1]
            tell_closed(stack, entry)
            return
    for other in stacks.all():
        if other is not stack and other.holds(entry):
            other.stop(entry)
            return


def attend(stack: RangeStack) -> None:
    """Before a push: close what other threads popped, once it is on top; and tell which start/end range it lies in,
    if any is open anywhere."""
    while stack and stack.was_stopped(stack[-1]):
        entry = stack[-1]
        del stack[-1]
        tell_closed(stack, entry)
    for entry in tuple(stack.stopped):
        if not stack.holds(entry):  # an outer pop was faster
            stack.was_stopped(entry)
    if crossings:
        _tell_inside(stack, around())
    stack.special = False
    if stack.stopped or crossings:  # asked after the flag is down: who adds to one meanwhile raises it again
        stack.special = True


def _tell_inside(stack: RangeStack, inside: Crossing | None) -> None:
    """Tell those who listen that what begins now on this thread lies in this start/end range."""
    if inside is stack.inside:
        return
    stack.inside = inside
    log = stack.log
    if log is not None:
        log.append((inside,))
    if nvtx_on:
        while inside is not None and (inside.nvtx is None or inside.thread_id != stack.thread_id):
            inside = inside.parent
        mark(label(TASK_SWITCH, OP).with_payload(0 if inside is None else inside.nvtx), HANDLE)


def open_labels() -> tuple[str, ...]:
    """The texts of the ranges that are open around what runs now: of this context's start/end ranges, then of the
    thread's push/pop ranges, the outermost first."""
    texts = [entry[0].text for entry in reversed(local.stack)]
    if crossings:
        texts += [crossing.label.text for crossing in surrounding()]
    return tuple(reversed(texts))


def begin(text: Label, payload: object = None, owner: object = None, opener: object = None) -> Crossing | None:
    """Open a range that need not end before others of its thread do: what runs in this context from now on lies inside
    it. Returns what `end` needs; None when nobody listens."""
    global emitted
    if not active:
        return None
    emitted = True
    stack = local.stack
    if stack.special:
        attend(stack)  # nothing is to be told where no other one is open
    made = Crossing(text, payload, owner, opener, stack.thread_id, len(stack))
    switch(made)
    stack.inside = made
    crossings.add(made.number)
    for other in stacks.all():
        other.special = True
    made.start_ns = perf_counter_ns()
    log = stack.log
    if log is not None:
        log.append(made)
    if live:
        opened = made.opened = Open(text, payload, made.level, stack.thread_id)
        opened.start_ns, opened.crossing = made.start_ns, made.number
        opened.inside = 0 if made.parent is None else made.parent.number
        for listener in live:
            listener.opened(opened)
    if nvtx_on:
        made.nvtx = nvtx_start(text.attributes if payload is None else text.with_payload(payload))
    return made


def end(made: Crossing | None) -> None:
    """Close what `begin` opened, wherever that was. A second time it does nothing."""
    if made is None or made.end_ns is not None:
        return
    made.end_ns = perf_counter_ns()
    crossings.discard(made.number)
    now = around()  # may pass over others that have ended meanwhile
    switch(now)
    stack = local.stack
    if stack.inside is made:
        stack.inside = now
    if made.nvtx is not None and made.number > _before_this_process:
        nvtx_end(made.nvtx)
    if made.opened is not None:
        made.opened.end_ns = made.end_ns
        for listener in live:
            listener.closed(made.opened)


def mark_now(text: Label, payload: object = None) -> None:
    """Emit an instant."""
    if not active:
        return
    log = local.stack.log
    now = perf_counter_ns()
    if log is not None:
        log.append((text, payload, now))
    for listener in live:
        listener.marked(Mark(text, payload, local.id, now))
    if nvtx_on:
        mark(text.with_payload(payload), HANDLE)


def _before_fork() -> None:
    listener_lock.acquire()


def _after_fork() -> None:
    listener_lock.release()


def _after_fork_in_child() -> None:
    listener_lock.release()
    global _before_this_process
    _before_this_process = latest()
    switch(None)
    crossings.clear()
    # The child has the parent's open ranges on its stack, but its tool never saw them begin. Of other threads it has
    # the stacks, not the threads.
    global stacks
    stacks = Stacks()
    local.__dict__.clear()
    local.__init__()  # type: ignore[misc]


# A child must not inherit a lock whose owner it does not have.
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
