"""The in-process listener: collect ranges, give them back as a list and as a tree, save and load them."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from .. import ranges as _ranges
from ..errors import CaptureError, ToolError
from ..output import writing
from ..ranges import emit
from ..ranges.crossing import Crossing
from ..ranges.labels import Label
from ..ranges.stack import Event, Log, Range, RangeMark, in_order, read_events
from .work import carried

__all__ = ["Node", "Range", "RangeMark", "Recording", "build_tree", "record"]

FORMAT = "fxnvtx-recording"
VERSION = 1


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


class Recording:
    """What `record()` collected. Reading it while it still records gives the ranges so far."""

    def __init__(self) -> None:
        self.meta: dict[str, Any] = {}  # of the process, and `classes`: of labels that name modules, its class
        self.strays = 0
        self._since = perf_counter_ns()
        # by the number of a stack: the thread's id, and its events in as many pieces as recorders came and went
        self._logs: dict[int, tuple[int, list[Log]]] = {}
        self._stopped = False
        self._read: tuple[list[Range], list[RangeMark]] | None = None

    # the side that ranges calls, under its lock
    def listen(self, number: int, thread_id: int, log: Log) -> None:
        self._logs.setdefault(number, (thread_id, []))[1].append(log)

    def stray_pop(self) -> None:
        self.strays += 1

    def stop(self) -> None:
        """Freeze: later pops of ranges still open do not change what was recorded."""
        if not self._stopped:
            self._stopped = True
            self._logs = {
                n: (thread, [[_as_it_is(e) for log in logs for e in log]]) for n, (thread, logs) in self._logs.items()
            }
            labels = self._labels()
            self.meta["classes"] = _ranges.classes_of(labels)  # now: a model may be gone when somebody reads
            self.meta["work"] = carried({known.text for known in labels})

    def fill(self, ranges: list[Range], marks: list[RangeMark], meta: dict[str, Any]) -> None:
        """Make this the recording of what was collected elsewhere; `ranges` by start."""
        self._stopped = True
        self.meta = meta
        self._read, self._logs = (ranges, sorted(marks, key=lambda m: m.time_ns)), {}

    @property
    def empty(self) -> bool:
        """Whether nothing at all has happened. Asked cheaply: no range is made for the answer."""
        return self._read is None and not any(log for _, logs in list(self._logs.values()) for log in logs)

    def _labels(self) -> set[Label]:
        events = (event for _, logs in self._logs.values() for log in logs for event in log)
        found = set()
        for event in events:
            if type(event) is Crossing:
                found.add(event.label)
            elif type(event) is tuple and len(event) > 3 and event[3] >= self._since:
                found.add(event[0])
        return found

    @property
    def ranges(self) -> list[Range]:
        """All ranges by start time."""
        return self._both()[0]

    @property
    def marks(self) -> list[RangeMark]:
        return self._both()[1]

    def _both(self) -> tuple[list[Range], list[RangeMark]]:
        if self._read is not None:
            return self._read
        ranges: list[Range] = []
        marks: list[RangeMark] = []
        logged = [
            (thread_id, [event for log in list(logs) for event in log]) for thread_id, logs in list(self._logs.values())
        ]
        known = frozenset(
            event.number
            for _, events in logged
            for event in events
            if type(event) is Crossing and event.start_ns >= self._since
        )
        for thread_id, events in logged:
            found = read_events(thread_id, events, self._since, known)
            ranges += found[0]
            marks += found[1]
        ranges = in_order(ranges)
        marks.sort(key=lambda m: m.time_ns)
        if self._stopped:
            self._read, self._logs = (ranges, marks), {}
        return ranges, marks

    @property
    def balanced(self) -> bool:
        """Every push met its own pop: none leaked, none still open, no pop without a push."""
        return self.strays == 0 and all(r.end_ns is not None and not r.leaked for r in self.ranges)

    def tree(self) -> list[Node]:
        """The outermost ranges of every thread, each with what is inside it."""
        return build_tree(self.ranges)

    def _repr_html_(self) -> str:
        """What a notebook shows: the folded tree with its times."""
        from ..report import from_recording

        return from_recording(self)._repr_html_()

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row per range, in the order of `ranges`: label, category, payload, thread_id,
        depth, start_ns, end_ns, duration_ns (both missing for a range that is still open), leaked.

        Raises ToolError where pandas is not installed: nothing else needs it.
        """
        try:
            import pandas  # type: ignore[import-not-found,import-untyped,unused-ignore]
        except ImportError as error:
            raise ToolError("to_pandas() needs pandas, which is not installed: `pip install pandas`") from error
        rows = [
            (r.label, r.category, r.payload, r.thread_id, r.depth, r.start_ns, r.end_ns,
             None if r.end_ns is None else r.end_ns - r.start_ns, r.leaked)
            for r in self.ranges
        ]  # fmt: skip
        names = ("label", "category", "payload", "thread_id", "depth", "start_ns", "end_ns", "duration_ns", "leaked")
        frame = pandas.DataFrame(rows, columns=list(names))
        # whole numbers also where one is missing: a float has no room for nanoseconds since boot
        return frame.astype({"end_ns": "Int64", "duration_ns": "Int64"})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write JSON: {"format", "version", "meta", "ranges": [[label, category, payload, thread_id, depth,
        start_ns, end_ns, leaked], ...], "marks": [...]}; rows of and inside start/end ranges go on with their
        `crossing` and `inside`."""
        rows = [
            [
                *(r.label, r.category, _jsonable(r.payload), r.thread_id, r.depth, r.start_ns, r.end_ns, r.leaked),
                *((r.crossing, r.inside) if r.crossing or r.inside else ()),
            ]
            for r in self.ranges
        ]
        marks = [[m.label, m.category, _jsonable(m.payload), m.thread_id, m.time_ns] for m in self.marks]
        document = {
            "format": FORMAT,
            "version": VERSION,
            "meta": _jsonable(self.meta),
            "strays": self.strays,
            "ranges": rows,
            "marks": marks,
        }
        target = Path(path)
        with writing(target) as file:
            json.dump(document, file, default=repr)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recording:
        """Read what `save` wrote."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise CaptureError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise CaptureError(f"{path} is not an fxnvtx recording: it is no JSON ({error})") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise CaptureError(f"{path} is not an fxnvtx recording: write one with Recording.save()")
        if document.get("version") != VERSION:
            raise CaptureError(
                f"{path} has version {document.get('version')}, this fxnvtx reads {VERSION}: update fxnvtx"
            )
        recording = cls()
        try:
            recording.meta = dict(_checked(document["meta"], dict))
            recording.strays = _checked(document["strays"], int)
            rows, marks = _checked(document["ranges"], list), _checked(document["marks"], list)
            recording._read = [_read_range(*row) for row in rows], [_read_mark(*row) for row in marks]
            recording._stopped = True
        except (KeyError, TypeError, ValueError) as error:
            raise CaptureError(f"{path} is a damaged fxnvtx recording: {error!r}; record it again") from error
        return recording


def _jsonable(value: Any) -> Any:
    """The value, or its repr where JSON has no form for it: a strange payload must not cost the recording."""
    if value is None or type(value) in {str, int, float, bool}:
        return value
    try:
        json.dumps(value, default=repr)
    except (TypeError, ValueError, RecursionError):
        return repr(value)
    return value


def _checked(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise ValueError(f"{str(value)[:40]!r} in an unexpected place")
    return value


def _read_range(
    label: str,
    category: str,
    payload: Any,
    thread_id: int,
    depth: int,
    start: int,
    end: int | None,
    leaked: bool,
    *more: int,
) -> Range:
    crossing, inside = more or (0, 0)
    for value in (thread_id, depth, start, crossing, inside):
        _checked(value, int)
    if depth < 0:
        raise ValueError(f"depth {depth}")
    return Range(
        _checked(label, str),
        _checked(category, str),
        payload,
        thread_id,
        depth,
        start,
        _checked(end, int, type(None)),
        _checked(leaked, bool),
        crossing,
        inside,
    )


def _read_mark(label: str, category: str, payload: Any, thread_id: int, time: int) -> RangeMark:
    return RangeMark(
        _checked(label, str), _checked(category, str), payload, _checked(thread_id, int), _checked(time, int)
    )


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


def _as_it_is(event: Event) -> Event:
    """The event, if need be a copy that does not change any more."""
    return copy.copy(event) if type(event) is Crossing else event


# set by fxnvtx.modules: why instrumented models may have stayed silent, or None where there is nothing to say
explain_silence: Callable[[], str | None] = lambda: None  # noqa: E731


def _no_meter() -> AbstractContextManager[None]:
    return nullcontext()


# set by fxnvtx.compile: counts the work of eager calls while the block runs
metering: Callable[[], AbstractContextManager[None]] = _no_meter


@contextmanager
def record(*, work: bool = False) -> Iterator[Recording]:
    """Collect every range of every thread while the block runs.

    >>> with record() as recording:
    ...     model(x)
    >>> recording.tree()

    work: count the FLOPs and bytes of eager layers, too, at the first call with each set of input shapes (which takes
    longer; time another one). Compiled layers carry theirs without being asked. What is counted once is carried by all
    later recordings and captures of the process.
    """
    recording = Recording()
    recording.meta = {"pid": os.getpid(), "clock": "perf_counter_ns"}
    if os.environ.get("RANK", "").isdigit():
        recording.meta["rank"] = int(os.environ["RANK"])
    _ranges.add_sink(recording)
    try:
        with metering() if work else nullcontext():
            yield recording
    finally:
        _ranges.remove_sink(recording)
        recording.stop()
        if recording.empty and not emit.silence_told:
            reason = explain_silence()
            if reason:
                emit.silence_told = True
                emit.log.warning("this recording is empty: %s", reason)
