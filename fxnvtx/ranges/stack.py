"""What is open on a thread, the log of what happened there, and the ranges that are read from it. What is open and the
log are plain tuples and numbers: they are made in the middle of a model's forward, and become objects when somebody
reads them.

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from time import perf_counter_ns
from typing import Any, Protocol, TypeAlias

from .crossing import Crossing
from .labels import Label

__all__ = [
    "NOT_YET",
    "Entry",
    "Event",
    "Live",
    "Log",
    "Mark",
    "Node",
    "Open",
    "Range",
    "RangeMark",
    "RangeStack",
    "Sink",
    "Stacks",
    "build_tree",
    "in_order",
    "read_events",
]

Entry: TypeAlias = "tuple[Any, ...]"
# entry: opened; entry, time: closed (time < 0: closed at -time by the range around it); (label, payload, time): a mark;
# Crossing: opened, and it knows itself when it ends; (Crossing or None,): what follows lies in this one
Event: TypeAlias = "tuple[Any, ...] | int | Crossing"
Log: TypeAlias = "list[Event]"
NOT_YET = object()  # in place of a Crossing: a new log has not been told yet


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
        stack.inside = NOT_YET


# ---------------------------------------------------------------------------------------------------------- read back


@dataclass(frozen=True)
class Range:
    """One closed range, or one still open when the recording stopped (end_ns None).

    `depth` counts the enclosing ranges in the same recording. Times are nanoseconds of `time.perf_counter_ns()`.
    `leaked`: it was closed by an enclosing range's pop, not by its own. `crossing`: a number of its own for a
    start/end range (of a coroutine or generator: it may cross others of its thread), 0 for a push/pop pair.
    `inside`: the number of the innermost start/end range around it, 0 for none.
    """

    label: str
    category: str
    payload: Any
    thread_id: int
    depth: int
    start_ns: int
    end_ns: int | None
    leaked: bool = False
    crossing: int = 0
    inside: int = 0


@dataclass(frozen=True)
class RangeMark:
    """One instant."""

    label: str
    category: str
    payload: Any
    thread_id: int
    time_ns: int


class _Opened:
    """`place`: how many push/pop ranges it lies in within the start/end range around it."""

    __slots__ = ("end_ns", "entry", "inside", "leaked", "place")

    def __init__(self, entry: Entry | Crossing, inside: int, stack: list[_Opened]) -> None:
        self.entry = entry
        self.inside = inside
        self.place: int = 0 if not stack or stack[-1].inside != inside else stack[-1].place + 1
        self.end_ns: int | None = None
        self.leaked = False


def read_events(
    thread_id: int, events: Iterable[Event], since: int = 0, known: frozenset[int] = frozenset()
) -> tuple[list[Range], list[RangeMark]]:
    """The ranges and marks of one stack in order of their starts. Of what lies in a start/end range, one of `known`,
    `depth` counts from there; `in_order` completes it.

    Ranges that started before `since` (nanoseconds) belong to no recording that began then: their ends are passed over.
    """
    found: list[_Opened] = []
    marks: list[RangeMark] = []
    stack: list[_Opened] = []
    within: Crossing | None = None
    # one behind the last: what an entry means shows in the event after it
    for event, following in itertools.pairwise([*events, ()]):
        if type(event) is int:
            continue
        if type(event) is Crossing:
            within = event
            if event.start_ns >= since:
                found.append(_Opened(event, 0 if event.parent is None else event.parent.nearest(known), stack))
            continue
        assert type(event) is tuple
        if len(event) == 1:
            within = event[0]
        elif len(event) == 3:
            text, payload, time = event
            marks.append(RangeMark(text.text, text.category, payload, thread_id, time))
        elif type(following) is int:
            closing = _take(stack, event)
            if closing is not None:
                closing.end_ns, closing.leaked = abs(following), following < 0
        elif event[3] >= since:
            while within is not None and within.end_ns is not None and within.end_ns <= event[3]:
                within = within.parent
            found.append(_Opened(event, 0 if within is None else within.nearest(known), stack))
            stack.append(found[-1])
    return [_range(thread_id, opened) for opened in found], marks


def in_order(ranges: list[Range]) -> list[Range]:
    """Ranges of all threads by start, with the depth that each has in the whole."""
    ranges = sorted(ranges, key=lambda r: r.start_ns)  # stable: a thread's own order survives ties
    if not any(r.crossing for r in ranges):
        return ranges
    depths = {0: -1}
    for position, item in enumerate(ranges):
        if item.inside:
            item = ranges[position] = replace(item, depth=item.depth + depths.get(item.inside, -1) + 1)
        if item.crossing:
            depths[item.crossing] = item.depth
    return ranges


def _take(stack: list[_Opened], entry: Entry) -> _Opened | None:
    for index in range(len(stack) - 1, -1, -1):
        if stack[index].entry is entry:
            return stack.pop(index)
    return None


def _range(thread_id: int, opened: _Opened) -> Range:
    entry = opened.entry
    if isinstance(entry, Crossing):
        text, payload, start, end, number = entry.label, entry.payload, entry.start_ns, entry.end_ns, entry.number
    else:
        (text, _, payload, start), end, number = entry[:4], opened.end_ns, 0
    place, leaked, inside = opened.place, opened.leaked, opened.inside
    return Range(text.text, text.category, payload, thread_id, place, start, end, leaked, number, inside)


@dataclass
class Node:
    """One range with the ranges inside it."""

    label: str
    category: str
    payload: Any
    start_ns: int
    end_ns: int | None
    children: list[Node] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        """This node and all below it, in order of their starts."""
        todo = [self]
        while todo:
            node = todo.pop()
            yield node
            todo.extend(reversed(node.children))


def build_tree(ranges: list[Range]) -> list[Node]:
    """Nest ranges (given by start): push/pop ranges by thread and depth, within the start/end range around them."""
    roots: list[Node] = []
    enclosing: dict[tuple[int, int], list[Node]] = {}  # by thread and start/end range: the open push/pop ranges
    crossing: dict[int, tuple[Node, int]] = {}  # by number: a start/end range, and the depth of what is inside
    for item in ranges:
        node = Node(item.label, item.category, item.payload, item.start_ns, item.end_ns)
        around, depth = crossing.get(item.inside, (None, 0))
        chain = enclosing.setdefault((item.thread_id, item.inside if around is not None else 0), [])
        place = max(0, item.depth - depth)
        above = chain[min(place, len(chain)) - 1] if place and chain else around
        (roots if above is None else above.children).append(node)
        if item.crossing:
            crossing[item.crossing] = node, item.depth + 1
        else:
            del chain[place:]
            chain.append(node)
    return roots
