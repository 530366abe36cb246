"""One process of a capture: which requests and steps of it count, one step of it as it ran, and what was made of it.

The wish is a `Window`, what it leaves out an `Omitted`; a `Part` is what one process contributed to a report.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import islice
from typing import Any, TypeVar

from ..categories import COMPILE, LOOP, REQUEST, STAGE, STEP, Numbers
from ..errors import ConfigError
from ..recording import Entry
from .labels import Name, Point, Span, category_of, fold
from .render import readable_ns
from .tree import Node, Tree

__all__ = ["WHOLE", "Gpu", "Numbers", "Omitted", "Part", "Timeline", "Window", "omitted", "timeline_of"]


# --------------------------------------------------------------------------------------------------------- what counts


_TIME = re.compile(r"^(\d{1,9}(?:\.\d{1,9})?)(s|ms|us|ns)?$")
_UNITS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}

Item = TypeVar("Item", Span, Point)


def read_times(text: str) -> tuple[int, int | None]:
    """`1.5s:2s`, `250ms:`, `:3` (seconds): from and to in ns, None for the end. Raises ConfigError."""
    first, mark, last = text.replace(" ", "").partition(":")
    found = [_TIME.match(part) if part else None for part in (first, last)]
    if not mark or (first and not found[0]) or (last and not found[1]):
        raise ConfigError(f"{text[:40]!r} is no part of the capture: write FROM:TO like 1.5s:2s, 250ms: or :3s")
    start, end = (None if at is None else int(Decimal(at[1]) * _UNITS[at[2] or "s"]) for at in found)
    if end is not None and end <= (start or 0):
        raise ConfigError(f"{text[:40]!r} is empty: the second time must be larger")
    return start or 0, end


@dataclass(frozen=True)
class Window:
    """requests, steps: which count, by their order within a process and within a request; None: all. first: leave out
    so many of the first requests. compiling: keep what compiles (otherwise requests in which something was compiled are
    left out, where there are others). between: from and to (None: the end), in ns after the process's first range:
    ranges are cut to it, and what was launched in it counts. timeline: keep every range of one step (`Part.timeline`).
    """

    requests: Numbers | None = None
    steps: Numbers | None = None
    first: int = 0
    compiling: bool = False
    between: tuple[int, int | None] | None = None
    timeline: bool = False

    @property
    def whole(self) -> bool:
        """Whether no range is left out as a whole."""
        return self.requests is None and self.steps is None and not self.first and self.compiling


WHOLE = Window(compiling=True)
_END = 1 << 62


def inside(start: Any, end: Any, low: int, high: int) -> Any:
    """Whether a range has part of it within a time (numbers or arrays)."""
    return (start < high) & ((end > low) | (start >= low))


@dataclass
class Omitted:
    """Per thread the times that do not count, and sentences that say so. clip: what is outside of it counts neither."""

    clip: tuple[int, int] | None = None
    times: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def cut_to(self, between: tuple[int, int | None], begin: int) -> None:
        """Set `clip`. begin: when the process's first range starts."""
        start, end = between
        self.clip = begin + start, _END if end is None else begin + end
        until = "the end" if end is None else readable_ns(end)
        self.notes.append(f"only {readable_ns(start)} to {until} after the first range is shown (--between)")

    def clipped(self, items: Iterable[Span]) -> Iterator[Span]:
        """The spans cut to `clip`; those outside of it are gone."""
        if self.clip is None:
            yield from items
            return
        low, high = self.clip
        for thread, start, end, name, payload, is_open in items:
            if inside(start, end, low, high):
                yield thread, max(start, low), min(end, high), name, payload, is_open

    def without(self, items: Iterable[Item]) -> Iterator[Item]:
        """The spans or points (thread first, then start and end) that lie outside of these times."""
        if not self.times:
            yield from items
            return
        starts = {thread: [start for start, _ in times] for thread, times in self.times.items()}
        for item in items:
            known = starts.get(item[0])
            if known is not None:
                place = bisect_right(known, item[1]) - 1
                if place >= 0 and item[1] < self.times[item[0]][place][1]:
                    continue
            yield item


@dataclass
class _Unit:
    """A request, or an outermost range where there are none, and the steps in it. call: an outermost range that is no
    part of a request either, like a model's."""

    thread: int
    start: int
    end: int
    request: bool
    text: str
    call: bool = False
    compiles: bool = False
    steps: list[tuple[int, int]] = field(default_factory=list)


def omitted(spans: Callable[[], Iterator[Span]], window: Window) -> Omitted:
    """What the window leaves out of one process."""
    found = Omitted()
    if window.whole:
        return found
    units = _units(spans())
    asked = [unit for unit in units if unit.request] or units
    asked.sort(key=lambda unit: unit.start)
    away: list[_Unit] = []
    what = "requests" if any(unit.request for unit in units) else "outermost ranges"
    if window.requests is not None:
        away = [unit for number, unit in enumerate(asked) if number not in window.requests]
        if len(away) == len(asked):
            raise ConfigError(f"--requests leaves nothing: there are {len(asked):,} {what}, counted from 0")
        away += [unit for unit in units if unit.request != asked[0].request]
        found.notes.append(f"{len(asked) - sum(u in asked for u in away):,} of {len(asked):,} {what} are shown")
    elif window.first and len(asked) > 1:
        # never all of them: the last one is shown
        away = asked[: min(window.first, len(asked) - 1)]
        first = "first" if len(away) == 1 else f"first {len(away):,}"
        found.notes.append(f"the {first} of {len(asked):,} {what} {'is' if len(away) == 1 else 'are'} left out")
    if not window.compiling:
        _leave_out_compiling(units, asked, away, what, found.notes)
    chosen = window.steps
    if chosen is not None and not any(unit.request or unit.steps for unit in units):
        away += _other_calls(asked, away, chosen, found.notes)
        chosen = None
    gone = {id(unit) for unit in away}
    for unit in units:
        if id(unit) in gone:
            found.times.setdefault(unit.thread, []).append((unit.start, unit.end))
        elif chosen is not None:
            for number, step in enumerate(unit.steps):
                if number not in chosen:
                    found.times.setdefault(unit.thread, []).append(step)
    if chosen is not None:
        kept = [unit for unit in units if id(unit) not in gone]
        count = max((len(unit.steps) for unit in kept), default=0)
        shown = max((sum(n in chosen for n in range(len(unit.steps))) for unit in kept), default=0)
        if not shown:
            raise ConfigError(f"--steps leaves nothing: a request has {count:,} steps, counted from 0")
        found.notes.append(f"{shown:,} of {count:,} steps of a request are shown, and what is outside of steps")
    for times in found.times.values():
        times.sort()
    return found


def _other_calls(asked: list[_Unit], away: list[_Unit], steps: Numbers, notes: list[str]) -> list[_Unit]:
    """Where models are called without requests and steps, each call is one, for `fxnvtx run --steps` too."""
    gone = {id(unit) for unit in away}
    kept = [unit for unit in asked if id(unit) not in gone]
    others = [unit for number, unit in enumerate(kept) if number not in steps or not unit.call]
    if len(others) == len(kept):
        calls = f"{sum(unit.call for unit in kept):,} outermost ranges that could be one"
        raise ConfigError(f"--steps leaves nothing: there are no steps, and {calls}, counted from 0")
    notes.append(f"{len(kept) - len(others):,} of {len(kept):,} outermost ranges are shown: there are no steps in them")
    return others


def _leave_out_compiling(
    units: list[_Unit], asked: list[_Unit], away: list[_Unit], what: str, notes: list[str]
) -> None:
    """First calls compile: they would drown everything else."""
    gone = {id(unit) for unit in away}
    compiling = [unit for unit in units if unit.compiles and id(unit) not in gone]
    if not compiling:
        return
    # what ran only once is shown, compilation and all: it would be gone altogether
    alike = {_alike(unit) for unit in asked if not unit.compiles and id(unit) not in gone}
    out = [unit for unit in compiling if _alike(unit) in alike]
    away.extend(out)
    if out:
        notes.append(f"{len(out):,} {what} in which something was compiled are left out (--keep-compile shows them)")
    if len(out) < len(compiling):
        notes.append(f"compilation is part of the times of {len(compiling) - len(out):,} {what}: it ran in all alike")


def _alike(unit: _Unit) -> str:
    return fold(unit.text, REQUEST) if unit.request else unit.text


def _units(spans: Iterator[Span]) -> list[_Unit]:
    """The outermost requests; and the outermost ranges that hold none."""
    units: list[_Unit] = []
    outer: _Unit | None = None  # the outermost range around here
    request: _Unit | None = None
    step_end = -1
    for thread, start, end, name, _payload, _open in spans:
        if outer is None or outer.thread != thread or start >= outer.end:
            call = category_of(name) not in (REQUEST, STAGE, LOOP)
            outer = _Unit(thread, start, end, False, name.text, call)
            request = None
            step_end = -1
            units.append(outer)
        category = category_of(name)
        if category == REQUEST and (request is None or start >= request.end):
            if outer.start == start and outer.end == end and not outer.request and units[-1] is outer:
                outer.request, request = True, outer
            else:
                request = _Unit(thread, start, end, True, name.text)
                units.append(request)
            step_end = -1
        unit = request if request is not None and start < request.end else outer
        if category == COMPILE:
            unit.compiles = True
        elif category == STEP and start >= step_end:
            step_end = end
            unit.steps.append((start, end))
    holders = _holding_requests(units)
    return [unit for unit in units if id(unit) not in holders]


def _holding_requests(units: list[_Unit]) -> set[int]:
    """Outermost ranges around requests: the requests in them are the units."""
    found: set[int] = set()
    outer: _Unit | None = None
    for unit in units:
        if outer is None or outer.thread != unit.thread or unit.start >= outer.end:
            outer = unit
        elif unit.request and not outer.request:
            found.add(id(outer))
    return found


# ------------------------------------------------------------------------------------------------- what was made of it


@dataclass(frozen=True)
class Gpu:
    """A device as the capture's own table has it. bandwidth: of its memory, bytes a second, 0 where it does not say."""

    name: str
    bandwidth: int = 0


@dataclass
class Timeline:
    """Every range of one step, and what was launched in it. spans: thread, level, start, end, name. work: device,
    stream, start, end, name. Times in ns from the step's start. cut: whether there were more."""

    title: str
    length: int
    spans: list[tuple[int, int, int, int, Name]]
    work: list[tuple[int, int, int, int, str]]
    cut: bool = False


@dataclass
class Part:
    """One process of one capture. `side` holds start/end ranges, which no total counts."""

    source: str
    pid: int
    rank: int | None = None
    index: int = 0
    tree: Tree = field(default_factory=Tree)
    side: Tree = field(default_factory=Tree)
    notes: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    classes: dict[str, str] = field(default_factory=dict)  # label -> class of the module
    has_gpu: bool = False
    device_calls: bool = False  # whether the distributions over calls are of device time
    timeline: Timeline | None = None
    has_memory: bool = False  # whether allocations on the device were recorded
    operations: int = 0
    work: list[Entry] = field(default_factory=list)  # what ranges stand for
    gpus: list[Gpu] = field(default_factory=list)
    # the longest times the device was idle: length, end, the range around both launches, what ended it
    gaps: list[tuple[int, int, str, str]] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"rank {self.rank}" if self.rank is not None else f"process {self.pid}"


# -------------------------------------------------------------------------------------------------- one step as it ran


MOST = 20_000  # ranges, and operations
Times = tuple[int, int]
Work = tuple[int, int, int, int, str]


def timeline_of(
    root: Node, spans: Callable[[Times], Iterable[Span]], work: Callable[[Times], Iterable[Work]]
) -> Timeline | None:
    """The first call of a usual step (of the outermost range that takes longest, where there are none). spans, work:
    give the ranges that start within a time, by thread, start, and end downwards; and what was launched in it."""
    chosen = _chosen(root)
    if chosen is None or chosen.first is None:
        return None
    begin, length = chosen.first, max(1, chosen.cpu // chosen.calls)
    times = (begin, begin + length)
    found: list[tuple[int, int, int, int, object]] = []
    thread: int | None = None
    ends: list[int] = []
    some = list(islice(spans(times), MOST + 1))
    for tid, start, end, name, _payload, _open in some[:MOST]:
        if tid != thread:
            thread, ends = tid, []
        while ends and (ends[-1] < start or (ends[-1] == start and end > start)):
            ends.pop()
        found.append((tid, len(ends), start - begin, end - begin, name))
        ends.append(end)
    operations = list(islice(work(times), MOST + 1))
    shown = [
        (device, stream, start - begin, end - begin, name) for device, stream, start, end, name in operations[:MOST]
    ]
    return Timeline(chosen.name.text, length, found, shown, max(len(some), len(operations)) > MOST)  # type: ignore[arg-type]


def _chosen(root: Node) -> Node | None:
    """The step in the middle by time, of those outside of others."""
    steps: list[Node] = []
    todo = list(root.children.values())
    while todo:
        node = todo.pop()
        if category_of(node.name) == STEP and node.calls:
            steps.append(node)
        else:
            todo.extend(node.children.values())
    if not steps:
        steps = [node for node in root.children.values() if node.calls and not node.is_unknown()]
        requests = [node for node in steps if category_of(node.name) == REQUEST]
        return max(requests or steps, key=lambda node: node.cpu // node.calls, default=None)
    steps.sort(key=lambda node: (node.gpu or node.cpu) / node.calls)
    return steps[len(steps) // 2]
