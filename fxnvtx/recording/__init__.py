"""The in-process listener: collect ranges, give them back as a list and a tree, save and load them; and how much work
each range stands for, as recordings and captures carry it.

An `Entry` says of one label and shape the operations and bytes. It is registered once, when it becomes known: compiled
code when it first runs for somebody who listens, eager code where somebody asked for it (`record(work=True)`). It goes
into the recordings that are stopped after that, and to NVTX as one registered string, which a tool keeps also where its
capture begins later.
"""

from __future__ import annotations

import copy
import json
import os
import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from time import perf_counter_ns
from typing import Any, NamedTuple

from nvtx._lib.lib import mark

from ..errors import CaptureError, ToolError
from ..output import writing
from ..ranges import add_sink, classes_of, emit, remove_sink
from ..ranges.crossing import Crossing
from ..ranges.labels import HANDLE, Label, domain
from ..ranges.stack import Event, Log, Node, Range, RangeMark, build_tree, in_order, read_events

__all__ = [
    "ONE_KIND",
    "PREFIX",
    "Entry",
    "News",
    "Node",
    "Range",
    "RangeMark",
    "Recording",
    "build_tree",
    "carried",
    "carry_work",
    "decoded",
    "encoded",
    "number_of",
    "read_entry",
    "record",
]

FORMAT = "fxnvtx-recording"
VERSION = 1


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
            self.meta["classes"] = classes_of(labels)  # now: a model may be gone when somebody reads
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
        return as_html(self)

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


def _as_it_is(event: Event) -> Event:
    """The event, if need be a copy that does not change any more."""
    return copy.copy(event) if type(event) is Crossing else event


# set by fxnvtx itself: a recording as its report shows it
as_html: Callable[[Recording], str] = lambda _: ""  # noqa: E731
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
    add_sink(recording)
    try:
        with metering() if work else nullcontext():
            yield recording
    finally:
        remove_sink(recording)
        recording.stop()
        if recording.empty and not emit.silence_logged:
            reason = explain_silence()
            if reason:
                emit.silence_logged = True
                emit.log.warning("this recording is empty: %s", reason)


# -------------------------------------------------------------------------------------------------------- how much work

PREFIX = "fxnvtx.work "
MOST = 100_000  # entries of one process
MOST_KINDS = 1_000  # kinds of call of one label
ONE_KIND = "one kind"  # the part of an entry that is about calls with its number and about no others
_COLOR = 0xFF888888


class Entry(NamedTuple):
    """What the ranges of one label do themselves, without the ranges inside them, in one run of the code around.

    under: label of the nearest module around, where the range is no module's (`fused(...)` says who by it). backward:
    it is inside a backward pass. part: which piece of the module's code this is; pieces add up, all others of a label
    are alternatives (other shapes). number: which of the label's kinds of call it is, where calls carry that as their
    payload (see `number_of`). calls: how many calls of the label the numbers are for. flops: operations by type
    of number, torch.utils.flop_counter's. moved: bytes read and written. unknown: why the numbers are not known.
    """

    label: str
    under: str
    backward: bool
    part: str
    calls: int
    flops: tuple[tuple[str, int], ...]
    moved: int
    unknown: str
    device: str
    number: int | None = None


# with the model that an entry is about: what is known of one goes with it, another may have the same labels
_entries: dict[Entry, weakref.ref[Any] | None] = {}
_registered = 0  # how many there have ever been
_lock = threading.Lock()


def carry_work(entries: Iterable[Entry], model: object = None) -> None:
    """Let every recording and capture of this process carry these, while `model` lives; those known already are not
    carried twice."""
    global _registered
    owner = None if model is None else weakref.ref(model)
    with _lock:
        for gone in [e for e, held in _entries.items() if held is not None and held() is None]:
            del _entries[gone]
        found = dict.fromkeys(entries)
        new = [e for e in found if e not in _entries][: max(0, MOST - len(_entries))]
        _entries.update(dict.fromkeys((e for e in found if e in _entries), owner))
        _entries.update(dict.fromkeys(new, owner))
        _registered += len(new)
    if emit.nvtx_on:
        for entry in new:
            mark(domain.get_event_attributes(encoded(entry), _COLOR, "work"), HANDLE)


_numbers: dict[str, dict[Hashable, int]] = {}


def number_of(label: str, call: Hashable) -> int | None:
    """The number of a kind of call (a module with some input shapes) among those with this label, from 0; None where
    there are too many. It is the payload of such a call's range: so everybody can tell which entry is about it."""
    with _lock:
        known = _numbers.get(label, {})
        found = known.get(call)
        if found is None and len(known) < MOST_KINDS and len(_numbers) < MOST:
            found = _numbers.setdefault(label, known)[call] = len(known)
        return found


def carried(labels: Collection[str]) -> list[list[Any]]:
    """What is known of these labels, as JSON has it."""
    with _lock:
        return [_row(e) for e, held in _entries.items() if e.label in labels and (held is None or held() is not None)]


class News:
    """What became known since one last asked: for a recording that is written while the process runs. Asking costs one
    comparison where there is nothing new."""

    def __init__(self) -> None:
        self._asked = 0
        self._given: set[Entry] = set()

    def rows(self) -> list[list[Any]]:
        """As JSON has them, each once."""
        if self._asked == _registered:
            return []
        with _lock:
            self._asked = _registered
            new = [e for e in _entries if e not in self._given]
        self._given.update(new)
        return [_row(e) for e in new]


def encoded(entry: Entry) -> str:
    """One line of text that `decoded` reads."""
    return PREFIX + json.dumps(_row(entry), separators=(",", ":"))


def decoded(text: str) -> Entry | None:
    """The entry that a text of a capture carries; None where it carries none that this version understands."""
    if not text.startswith(PREFIX):
        return None
    try:
        return read_entry(json.loads(text[len(PREFIX) :]))
    except (ValueError, RecursionError):
        return None


def _row(entry: Entry) -> list[Any]:
    return [dict(value) if isinstance(value, tuple) else value for value in entry]


_KINDS = (str, str, bool, str, int, dict, int, str, str)


def read_entry(row: Any) -> Entry | None:
    """An entry as JSON has it; None for anything else. Later versions may add to its end."""
    if not isinstance(row, list) or len(row) < len(_KINDS):
        return None
    values = row[: len(_KINDS)]
    if any(type(value) is not kind for value, kind in zip(values, _KINDS, strict=True)):
        return None
    flops = values[5]
    if any(type(n) is not int or n < 0 for n in (*flops.values(), values[4], values[6])) or values[4] < 1:
        return None
    values[5] = tuple(sorted((str(kind), n) for kind, n in flops.items()))
    number = row[len(_KINDS)] if len(row) > len(_KINDS) else None
    return Entry(*values)._replace(number=number if type(number) is int else None)
