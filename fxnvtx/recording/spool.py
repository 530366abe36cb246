"""A recording that outlives its process, and which part of a run is shown in it: ranges are appended to a file while
the program runs.

A process may end in ways that run no Python any more (SIGTERM, SIGKILL, os._exit, a crash). So nothing is left for the
end: what has begun at the outermost level is on disk when it begins, what is inside it at the latest when the outermost
range ends. A process that dies in the middle of one leaves it open, and its reader says so.

One JSON object a line: {"meta": {...}}, then {"ranges": [[number, label, category, payload, thread, level, start, end,
leaked], ...], "ended": [[number, end, leaked], ...], "marks": [...], "classes": {label: class}, "strays": n}. Where
there is something to say, also "work": [the rows of work that became known since]; with `--infer-steps` "sites":
{number: [shapes, [[call of a function, place, loops, function], ...]]}. Rows of start/end ranges and of
what is inside one go on with their `crossing` and `inside`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..categories import Numbers
from ..errors import CaptureError
from ..ranges import Mark, Open, classes_of, emit, label
from ..ranges.stack import in_order
from . import News, Range, RangeMark, Recording
from .loops import Call, Frame, Site, Sites, inferred

__all__ = ["SUFFIX", "Spool", "Window", "read_spool"]


@dataclass
class Window:
    """Opens and closes as ranges begin and end; NVTX hears only what lies inside, and so does the recording.

    warmup: so many outermost ranges of the process are left out. steps: those to show, counted from 0 in each request;
    where an outermost range is a model's call and no request, the calls themselves are the steps.
    """

    warmup: int = 0
    steps: Numbers | None = None

    def __post_init__(self) -> None:
        self.is_open = False
        self._calls = 0
        self._steps = 0
        self._nvtx = emit.nvtx_on  # what there is to hear it
        self._show(False)

    def opened(self, entry: Open) -> bool:
        """Called before NVTX hears of the range; returns whether it is shown."""
        category = entry.label.category
        if entry.level == 0:
            self._calls += 1
            self._steps = 0
            number = self._calls - self.warmup - 1
            if self.steps is None:
                self._show(number >= 0)
            else:
                itself = category not in ("request", "stage", "loop")
                self._show(itself and number >= 0 and number in self.steps)
        elif category == "step" and self.steps is not None and self._calls > self.warmup:
            self._steps += 1
            self._show(self._steps - 1 in self.steps)
        return self.is_open

    def closed(self, entry: Open) -> None:
        if self.steps is None or not self.is_open:
            return
        if entry.level == 0 or (entry.label.category == "step" and self._steps not in self.steps):
            self._show(False)

    def _show(self, shown: bool) -> None:
        # no callback: the recorder is a listener all along, so nothing else depends on this
        self.is_open = shown
        emit.nvtx_on = self._nvtx and shown


SUFFIX = ".spool"
FORMAT = "fxnvtx-spool"
_MANY = 64  # ranges that may wait for an outermost range to end
_OUTER = frozenset({"request", "stage", "loop", "step"})


class Spool:
    """A sink of fxnvtx.ranges. Holds no file open: a program may close or reuse every descriptor it finds."""

    def __init__(self, folder: Path, first: bool, window: Window | None = None, sites: Sites | None = None) -> None:
        self.folder = folder
        self.first = first  # whether this is the program's own process and not one that it started
        self.window = window
        self.sites = sites
        self._begin()

    def _begin(self) -> None:
        self.path: Path | None = None
        self.broken = False
        self._new: deque[Open] = deque()
        self._marks: deque[Mark] = deque()
        self._unfinished: list[tuple[int, Open]] = []
        self._count = 0
        self._outer: set[int] = set()  # shown and still open: what is known is written when they end
        self._came_from: dict[int, Site] = {}
        self._labels: set[str] = set()
        self._news = News()
        self._strays = 0
        self._rank: int | None = None
        self._lock = threading.RLock()

    def forked(self) -> None:
        """In a child made by os.fork: what the parent has collected is the parent's."""
        self.first = False
        self._begin()

    # the side that ranges calls

    def opened(self, entry: Open) -> None:
        if self.window is not None and not self.window.opened(entry):
            return
        if entry.level == 0 or entry.label.category in _OUTER:
            self._outer.add(id(entry))
        if self.sites is not None and entry.level == 0 and entry.label.category == "module":
            site = self.sites.here()
            if site is not None:
                self._came_from[id(entry)] = site
        self._new.append(entry)
        if entry.level == 0 or len(self._new) >= _MANY:
            self.write()

    def closed(self, entry: Open) -> None:
        if id(entry) not in self._outer:
            return
        self._outer.discard(id(entry))
        self.write()
        if self.window is not None:
            self.window.closed(entry)

    def marked(self, mark: Mark) -> None:
        if self.window is None or self.window.is_open:
            self._marks.append(mark)

    def stray_pop(self) -> None:
        self._strays += 1

    def write(self) -> None:
        """Append what has come since the last time. Never raises: the program must go on."""
        if self.broken:
            return
        try:
            with self._lock:
                self._write()
        except FileNotFoundError:  # the run is over and this process goes on
            self.broken = True
        except Exception as error:  # a full disk, a folder that is gone, a payload whose repr() raises
            self.broken = True
            emit.log.warning("the recording of process %d stops here: %s", os.getpid(), error)

    def _write(self) -> None:
        rows, still = [], []
        ended = []
        sites = {}
        for number, entry in self._unfinished:
            if entry.end_ns is None:
                still.append((number, entry))
            else:
                ended.append([number, entry.end_ns, entry.leaked])
        named = []
        while self._new:
            entry = self._new.popleft()
            self._count += 1
            end = entry.end_ns  # read once: another thread may be closing it
            if end is None:
                still.append((self._count, entry))
            text = entry.label.text
            site = self._came_from.pop(id(entry), None)
            if site is not None:
                sites[self._count] = [site.shapes, [[f.number, f.place, f.loops, f.function] for f in site.frames]]
            if text not in self._labels:
                self._labels.add(text)
                named.append(entry.label)
            rows.append(
                [
                    self._count,
                    text,
                    entry.label.category,
                    entry.payload,
                    entry.thread_id,
                    entry.level,
                    entry.start_ns,
                    end,
                    entry.leaked,
                    *((entry.crossing, entry.inside) if entry.crossing or entry.inside else ()),
                ]
            )
        self._unfinished = still
        marks = []
        while self._marks:
            m = self._marks.popleft()
            marks.append([m.label.text, m.label.category, m.payload, m.thread_id, m.time_ns])
        work = self._news.rows()
        if rows or ended or marks or work:
            classes = classes_of(named)
            line = {"ranges": rows, "ended": ended, "marks": marks, "classes": classes, "strays": self._strays}
            if work:
                line["work"] = work
            if sites:
                line["sites"] = sites
            self._append([*self._meta(), line])

    def _meta(self) -> Iterator[dict[str, Any]]:
        rank = _rank() if self._rank is None else self._rank
        if self.path is None or rank != self._rank:
            self._rank = rank
            meta: dict[str, Any] = {"pid": os.getpid(), "clock": "perf_counter_ns", "first": self.first}
            if rank is not None:
                meta["rank"] = rank
            yield {"format": FORMAT, "version": 1, "meta": meta}

    def _append(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line, default=repr) + "\n" for line in lines).encode()
        if self.path is None:
            self.path = _free_path(self.folder)
        with open(self.path, "ab", buffering=0) as file:
            file.write(text)


def _free_path(folder: Path) -> Path:
    """A file of this process's own. A number that the system has given out twice gets a second file."""
    pid = os.getpid()
    for count in range(1_000_000):
        path = folder / (f"{pid}{SUFFIX}" if not count else f"{pid}-{count}{SUFFIX}")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            continue
        return path
    raise OSError(f"{folder} is full of recordings of process {pid}")


def _rank() -> int | None:
    """This process's place among its like: what torchrun says, else torch.distributed once that is set up."""
    rank = os.environ.get("RANK", "")
    if rank.isdigit():
        return int(rank)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return None


def read_spool(path: str | os.PathLike[str]) -> Recording:
    """The recording that a process left behind, whether it still runs, has ended, or was killed while it wrote.

    Raises CaptureError where the file is no spool or its lines say nothing.
    """
    recording = Recording()
    entries: dict[int, Open] = {}
    marks: list[RangeMark] = []
    classes: dict[str, str] = {}
    meta: dict[str, Any] = {}
    sites: dict[int, Site] = {}
    work: list[list[Any]] = []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise CaptureError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        for line in lines[:-1]:  # what follows the last line end is empty, or was being written
            item = json.loads(line)
            if "meta" in item:
                meta = dict(item["meta"])
                continue
            for row in item["ranges"]:
                entries[row[0]] = _entry(*row[1:])
            for number, end, leaked in item["ended"]:
                entries[number].end_ns, entries[number].leaked = end, leaked
            for label, category, payload, thread, time in item["marks"]:
                marks.append(RangeMark(label, category, payload, thread, time))
            classes.update(item["classes"])
            for number, (shapes, frames) in item.get("sites", {}).items():
                sites[int(number)] = Site(shapes, tuple(_frame(*frame) for frame in frames))
            work += [row for row in item.get("work", ()) if isinstance(row[0], str)]
            recording.strays = item["strays"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CaptureError(f"{path} is a damaged fxnvtx recording: {error!r}; record it again") from error
    if not meta and lines[:-1]:
        raise CaptureError(f"{path} is not an fxnvtx recording: run the program with `fxnvtx run` again")
    shown = {entry.label.text for entry in entries.values()} | {mark.label for mark in marks}
    meta |= {"classes": classes, "work": [row for row in work if row[0] in shown]}
    recording.fill(nested([*_steps(entries, sites), *entries.values()]), marks, meta)
    return recording


def _steps(entries: dict[int, Open], sites: dict[int, Site]) -> Iterator[Open]:
    """Ranges for the loops that the outermost calls came from, around them, and so before them."""
    if not sites:
        return
    calls = [
        Call(entry.label.text, entry.thread_id, entry.start_ns, entry.end_ns, sites[number])
        for number, entry in entries.items()
        if number in sites and entry.end_ns is not None and not entry.leaked
    ]
    for entry in entries.values():
        entry.level += 2
    for loop in inferred(calls):
        first, last = loop.iterations[0][0], loop.iterations[-1][-1]
        count = len(loop.iterations)
        yield _span(f"loop in {loop.function} (inferred)", "loop", count, 0, first, last)
        for number, iteration in enumerate(loop.iterations):
            yield _span(f"step_{number} (inferred)", "step", number, 1, iteration[0], iteration[-1])


def _frame(number: int, place: int, loops: list[list[int]], function: str) -> Frame:
    return Frame(number, place, tuple((first, last) for first, last in loops), function)


def _span(text: str, category: str, payload: int, level: int, first: Call, last: Call) -> Open:
    entry = Open(label(text, category), payload, level, first.thread_id)
    entry.start_ns, entry.end_ns = first.start_ns, last.end_ns
    return entry


def nested(entries: Iterable[Open]) -> list[Range]:
    """Ranges by start. What lies between two of them may not have been shown: so depth counts those that were."""
    enclosing: dict[tuple[int, int], list[Open]] = {}
    found = []
    ordered = sorted(entries, key=lambda e: e.start_ns)  # stable: a thread's own order survives ties
    known = {entry.crossing for entry in ordered}
    for entry in ordered:
        inside = entry.inside if entry.inside in known else 0
        above = enclosing.setdefault((entry.thread_id, inside), [])
        while above and (above[-1].level >= entry.level or _over(above[-1], entry.start_ns)):
            above.pop()
        text = entry.label
        found.append(
            Range(
                text.text,
                text.category,
                entry.payload,
                entry.thread_id,
                len(above),
                entry.start_ns,
                entry.end_ns,
                entry.leaked,
                entry.crossing,
                inside,
            )
        )
        if not entry.crossing:
            above.append(entry)
    return in_order(found)


def _over(entry: Open, now: int) -> bool:
    return entry.end_ns is not None and entry.end_ns < now


def _entry(
    text: str,
    category: str,
    payload: Any,
    thread: int,
    level: int,
    start: int,
    end: int | None,
    leaked: bool,
    crossing: int = 0,
    inside: int = 0,
) -> Open:
    entry = Open(label(text, category), payload, level, thread)
    entry.start_ns, entry.end_ns, entry.leaked = start, end, leaked
    entry.crossing, entry.inside = crossing, inside
    return entry
