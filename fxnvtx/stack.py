"""What is open on a thread, and the log of what happened there. Both are plain tuples and numbers: they are made in
the middle of a model's forward, and become objects when somebody reads them (events.py).

An entry of a stack is a tuple that begins with the range's label:

    (label,)                             made by a generated forward; it went to NVTX only
    (label, owner)                       nobody records; `owner` is the instrumented model whose module this is
    (label, owner, payload, start_ns)    the same entry is in the log too
    (label, owner, payload, start_ns, Open)   somebody wants to be told of every range at once

An entry is itself the handle that closes it: it is compared by identity, never by value.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from time import perf_counter_ns
from typing import Any, Protocol, TypeAlias

from .crossing import Crossing
from .labels import Label

__all__ = ["UNTOLD", "Entry", "Event", "Live", "Log", "Mark", "Open", "RangeStack", "Sink", "Stacks"]

Entry: TypeAlias = "tuple[Any, ...]"
# entry: opened; entry, time: closed (time < 0: closed at -time by the range around it); (label, payload, time): a mark;
# Crossing: opened, and it knows itself when it ends; (Crossing or None,): what follows lies in this one
Event: TypeAlias = "tuple[Any, ...] | int | Crossing"
Log: TypeAlias = "list[Event]"
UNTOLD = object()  # in place of a Crossing: a new log has not been told yet


class Open:
    """An open range as those see it who are told at once."""

    __slots__ = (
        "crossing",
        "end_ns",
        "inside",
        "label",
        "leaked",
        "level",
        "on_nvtx",
        "payload",
        "start_ns",
        "thread_id",
    )

    def __init__(self, text: Label, payload: object, level: int, thread_id: int) -> None:
        self.label = text
        self.payload = payload
        self.level = level  # how many ranges are open around it on its thread
        self.thread_id = thread_id
        self.crossing = 0  # the number of a range that may cross others (crossing.py); 0: push/pop
        self.inside = 0  # the number of the crossing range that it lies in
        self.on_nvtx = False
        self.end_ns: int | None = None
        self.leaked = False  # closed by an outer range's pop
        self.start_ns = perf_counter_ns()


class Mark:
    """An instant: a label at a time."""

    __slots__ = ("label", "payload", "thread_id", "time_ns")

    def __init__(self, text: Label, payload: object, thread_id: int, time_ns: int) -> None:
        self.label = text
        self.payload = payload
        self.thread_id = thread_id
        self.time_ns = time_ns


_numbers = itertools.count(1)


class Sink(Protocol):
    """What a recorder offers."""

    def listen(self, number: int, thread_id: int, log: Log) -> None:
        """From now on the stack with this number appends its events to `log` (also called by a new thread)."""

    def stray_pop(self) -> None: ...


class Live(Protocol):
    """What somebody offers who wants to be told of every range at once, on its thread. Costs every range a call."""

    def opened(self, entry: Open) -> None:
        """Called before NVTX hears of it."""

    def closed(self, entry: Open) -> None: ...

    def marked(self, mark: Mark) -> None: ...

    def stray_pop(self) -> None: ...


class RangeStack(list[Entry]):
    """The open ranges of one thread, the outermost first. Only its own thread changes it."""

    __slots__ = ("__weakref__", "inside", "log", "number", "special", "stopped", "thread_id", "torn")

    def __init__(self, thread_id: int) -> None:
        self.thread_id = thread_id
        self.number = next(_numbers)  # unlike a thread's id never used again
        self.log: Log | None = None  # None: no recorder listens
        self.stopped: list[Entry] = []  # popped by a thread that may not pop them: ours does at its next turn
        self.special = False  # whether the next push has more to do than to push
        # Whether an entry was closed by the pop of an outer one since nothing was open: a depth says no more then
        # what lies there
        self.torn = False
        # Of the start/end ranges the one that, as far as log and NVTX were told, what begins here lies in
        self.inside: Crossing | object | None = None

    @property
    def labels(self) -> tuple[Label, ...]:
        return tuple([entry[0] for entry in self])

    def holds(self, entry: Entry) -> bool:
        """Whether this very entry is open."""
        return any(open_ is entry for open_ in tuple(self))  # a copy: another thread may be asking

    def stop(self, entry: Entry) -> None:
        """Called by a thread that is not the stack's own: let that one close the entry."""
        self.stopped.append(entry)
        self.special = True

    def was_stopped(self, entry: Entry) -> bool:
        """Whether another thread has popped the entry. Forgets it: it is being closed."""
        for index, stopped in enumerate(self.stopped):
            if stopped is entry:
                del self.stopped[index]
                return True
        return False


class Stacks:
    """All threads' stacks, and who records them. Calls of one instance must not overlap (a lock of the caller's)."""

    def __init__(self) -> None:
        self._alive: dict[int, weakref.ref[RangeStack]] = {}

    def add(self, stack: RangeStack, sinks: Iterable[Sink]) -> None:
        number, forget = stack.number, self._alive.pop
        self._alive[number] = weakref.ref(stack, lambda _: forget(number, None))
        self._listen(stack, sinks)

    def changed(self, sinks: Iterable[Sink]) -> None:
        """Other recorders than before: every stack begins a new log, which all of them get. So none needs to know
        where it came in, and what nobody wants any more is freed."""
        for stack in self.all():
            self._listen(stack, sinks)

    def all(self) -> list[RangeStack]:
        return [stack for reference in list(self._alive.values()) if (stack := reference()) is not None]

    def _listen(self, stack: RangeStack, sinks: Iterable[Sink]) -> None:
        log: Log | None = None
        for sink in sinks:
            if log is None:
                log = []
            sink.listen(stack.number, stack.thread_id, log)
        stack.log = log
        stack.inside = UNTOLD
