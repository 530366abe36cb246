"""The in-process listener: collect ranges, give them back as a list and as a tree, save and load them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import ranges as _ranges
from .errors import CaptureError
from .output import writing

__all__ = ["Node", "Range", "RangeMark", "Recording", "build_tree", "record"]

FORMAT = "fxnvtx-recording"
VERSION = 1


@dataclass(frozen=True)
class Range:
    """One closed push/pop pair, or one still open when the recording stopped (end_ns None).

    `depth` counts the enclosing ranges of the same thread in the same recording. Times are nanoseconds of
    `time.perf_counter_ns()`. `leaked`: it was closed by an enclosing range's pop, not by its own.
    """

    label: str
    category: str
    payload: Any
    thread_id: int
    depth: int
    start_ns: int
    end_ns: int | None
    leaked: bool = False


@dataclass(frozen=True)
class RangeMark:
    """One instant."""

    label: str
    category: str
    payload: Any
    thread_id: int
    time_ns: int


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
        self.meta: dict[str, Any] = {}
        self.strays = 0
        self._opened: list[_ranges.Open] = []
        self._marked: list[_ranges.Mark] = []
        self._frozen: list[Range] | None = None
        self._frozen_marks: list[RangeMark] | None = None

    # the side that ranges.py calls; list.append is atomic, so threads need no lock
    def opened(self, entry: _ranges.Open) -> None:
        self._opened.append(entry)

    def marked(self, mark: _ranges.Mark) -> None:
        self._marked.append(mark)

    def stray_pop(self) -> None:
        self.strays += 1

    def stop(self) -> None:
        """Freeze: later pops of ranges still open do not change what was recorded."""
        if self._frozen is None:
            self._frozen, self._frozen_marks = self._snapshot(), self._snapshot_marks()
            self.meta["classes"] = _ranges.classes_of({entry.label for entry in self._opened})
            self._opened, self._marked = [], []

    @property
    def ranges(self) -> list[Range]:
        """All ranges by start time."""
        return self._frozen if self._frozen is not None else self._snapshot()

    @property
    def marks(self) -> list[RangeMark]:
        return self._frozen_marks if self._frozen_marks is not None else self._snapshot_marks()

    @property
    def balanced(self) -> bool:
        """Every push met its own pop: none leaked, none still open, no pop without a push."""
        return self.strays == 0 and all(r.end_ns is not None and not r.leaked for r in self.ranges)

    def tree(self) -> list[Node]:
        """The outermost ranges of every thread, each with what is inside it."""
        return build_tree(self.ranges)

    def _repr_html_(self) -> str:
        """What a notebook shows: the folded tree with its times."""
        from .report import from_recording

        return from_recording(self)._repr_html_()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write JSON: {"format", "version", "meta", "ranges": [[label, category, payload, thread_id, depth,
        start_ns, end_ns, leaked], ...], "marks": [...]}."""
        rows = [
            [r.label, r.category, _jsonable(r.payload), r.thread_id, r.depth, r.start_ns, r.end_ns, r.leaked]
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
            recording._frozen = [_read_range(*row) for row in _checked(document["ranges"], list)]
            recording._frozen_marks = [_read_mark(*row) for row in _checked(document["marks"], list)]
        except (KeyError, TypeError, ValueError) as error:
            raise CaptureError(f"{path} is a damaged fxnvtx recording: {error!r}; record it again") from error
        return recording

    def _snapshot(self) -> list[Range]:
        entries = sorted(self._opened, key=lambda e: e.start_ns)  # stable: a thread's own order survives ties
        enclosing: dict[int, list[_ranges.Open]] = {}
        found = []
        for entry in entries:
            levels = enclosing.setdefault(entry.thread_id, [])
            while levels and (levels[-1].level >= entry.level or _over(levels[-1], entry.start_ns)):
                levels.pop()
            text = entry.label
            found.append(
                Range(
                    text.text,
                    text.category,
                    entry.payload,
                    entry.thread_id,
                    len(levels),
                    entry.start_ns,
                    entry.end_ns,
                    entry.leaked,
                )
            )
            levels.append(entry)
        return found

    def _snapshot_marks(self) -> list[RangeMark]:
        marks = sorted(self._marked, key=lambda m: m.time_ns)
        return [RangeMark(m.label.text, m.label.category, m.payload, m.thread_id, m.time_ns) for m in marks]


def _over(entry: _ranges.Open, now: int) -> bool:
    return entry.end_ns is not None and entry.end_ns < now


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
    label: str, category: str, payload: Any, thread_id: int, depth: int, start: int, end: int | None, leaked: bool
) -> Range:
    for value in (thread_id, depth, start):
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
    )


def _read_mark(label: str, category: str, payload: Any, thread_id: int, time: int) -> RangeMark:
    return RangeMark(
        _checked(label, str), _checked(category, str), payload, _checked(thread_id, int), _checked(time, int)
    )


def build_tree(ranges: list[Range]) -> list[Node]:
    """Nest ranges (given by start) by thread and depth."""
    roots: list[Node] = []
    enclosing: dict[int, list[Node]] = {}
    for item in ranges:
        node = Node(item.label, item.category, item.payload, item.start_ns, item.end_ns)
        above = enclosing.setdefault(item.thread_id, [])
        del above[item.depth :]
        (above[-1].children if above else roots).append(node)
        above.append(node)
    return roots


# set by instrument.py: why instrumented models may have stayed silent, or None where there is nothing to say
explain_silence: Callable[[], str | None] = lambda: None  # noqa: E731


@contextmanager
def record() -> Iterator[Recording]:
    """Collect every range of every thread while the block runs.

    >>> with record() as recording:
    ...     model(x)
    >>> recording.tree()
    """
    recording = Recording()
    recording.meta = {"pid": os.getpid(), "clock": "perf_counter_ns"}
    if os.environ.get("RANK", "").isdigit():
        recording.meta["rank"] = int(os.environ["RANK"])
    _ranges.add_sink(recording)
    try:
        yield recording
    finally:
        _ranges.remove_sink(recording)
        recording.stop()
        if not recording.ranges and not _ranges.silence_told:
            reason = explain_silence()
            if reason:
                _ranges.silence_told = True
                _ranges.log.warning("this recording is empty: %s", reason)
