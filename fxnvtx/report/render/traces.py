"""Every single range and device operation, streamed: as Chrome trace events, which open in Perfetto and in
chrome://tracing, and in speedscope's format, one evented profile per thread and device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ...output import writing
from ...recording import Recording
from ..capture import as_sqlite, kind_of, rank_of, recording_of
from ..capture.nsys import PUSH_POP, START_END, Reader
from ..capture.recording import damaged_recording, shown_apart, spans_of
from ..capture.schema import damaged, detect, open_capture
from ..labels import Span

__all__ = ["write_chrome", "write_speedscope"]


# ------------------------------------------------------------------------------------------------------- what there is


# device, stream, start, end, name. Sorted by device, stream, start.
Work = tuple[int, int, int, int, str]


@dataclass
class Process:
    """One process of a capture. `spans` and `work` read it anew on every call."""

    source: str
    pid: int
    title: str
    spans: Callable[[], Iterator[Span]]
    side: Callable[[], Iterator[Span]]
    work: Callable[[], Iterator[Work]]


def processes(source: Recording | Path, files: ExitStack, exact: bool = True) -> list[Process]:
    """The processes of a recording or capture; `files` keeps open what they read from."""
    if isinstance(source, Recording):
        return [_recorded(source, "recording")]
    kind = kind_of(source)
    if kind in ("recording", "spool"):
        files.enter_context(damaged_recording(str(source)))
    recording = recording_of(source, kind)
    if recording is not None:
        return [_recorded(recording, str(source))]
    path = files.enter_context(as_sqlite(source, kind))
    connection = open_capture(path)
    files.callback(connection.close)
    files.enter_context(damaged(source))
    schema = detect(connection, path)
    reader = Reader(connection, schema, path, exact, None)
    rank = rank_of(source)
    pids = reader.processes()
    found = []
    for pid in pids:
        number = (pid >> 24) & 0xFFFFFF
        title = f"rank {rank}" if rank is not None and len(pids) == 1 else f"process {number}"
        found.append(
            Process(
                str(source),
                number,
                title,
                lambda pid=pid: reader.spans(pid, PUSH_POP),  # type: ignore[misc]
                lambda pid=pid: reader.spans(pid, START_END),  # type: ignore[misc]
                lambda pid=pid: reader.device_work(pid),  # type: ignore[misc]
            )
        )
    return found


def _recorded(recording: Recording, source: str) -> Process:
    rank, pid = recording.meta.get("rank"), recording.meta.get("pid")
    number = pid if isinstance(pid, int) else 1
    return Process(
        source,
        number,
        f"rank {rank}" if rank is not None else f"process {number}",
        lambda: spans_of(shown_apart(recording.ranges)[0], exact=True),
        lambda: spans_of(shown_apart(recording.ranges)[1], exact=True),
        lambda: iter(()),
    )


def nested(spans: Iterable[Span]) -> Iterator[tuple[int, bool, int, Span]]:
    """(thread, opens, time, span) such that closes match opens in reverse order: a range that crosses the one around
    it is cut where that one ends."""
    stack: list[tuple[int, Span]] = []
    thread: int | None = None
    for span in spans:
        if span[0] != thread:
            while stack:
                end, open_span = stack.pop()
                yield open_span[0], False, end, open_span
            thread = span[0]
        start, end = span[1], span[2]
        while stack and (stack[-1][0] < start or (stack[-1][0] == start and end > start)):
            closed, open_span = stack.pop()
            yield open_span[0], False, closed, open_span
        if stack and end > stack[-1][0]:
            end = stack[-1][0]
        stack.append((end, span))
        yield span[0], True, start, span
    while stack:
        end, open_span = stack.pop()
        yield open_span[0], False, end, open_span


# ------------------------------------------------------------------------------------------------- Chrome trace events


Source = Recording | str | os.PathLike[str]
# Perfetto reads 32-bit process ids. Linux ends at 4,194,304: two sources that know the same one are told apart above
# that, and devices, 256 to a source, lie above those.
_AGAIN = 5_000_000
_DEVICES = 1_500_000_000
_SIDE = 1 << 24  # start/end ranges get thread ids above any real one


def write_chrome(
    source: Source | Sequence[Source], path: str | os.PathLike[str], tick: Callable[[int], None] | None = None
) -> Path:
    """Write every range (and device operation) of a recording or of captures to `path`; returns the path.

    One process per rank, one track per thread, one per device stream. Times are microseconds with three decimals, from
    the first event of each source. Streams: memory does not grow with the capture. tick: called now and then with the
    number of events written since the last call. Raises CaptureError, OutputError.
    """
    sources: list[Source] = list(source) if isinstance(source, (list, tuple)) else [source]  # type: ignore[list-item]
    with writing(path, files_of(sources)) as file:
        file.write('{"displayTimeUnit": "ns", "traceEvents": [\n')
        first = True
        taken: set[int] = set()
        for index, one in enumerate(sources):
            with ExitStack() as files:
                whole = one if isinstance(one, Recording) else Path(one)  # type: ignore[arg-type]
                for number, event in enumerate(_events(processes(whole, files), index, taken), 1):
                    if tick is not None and not number & 0x3FFF:
                        tick(0x4000)
                    file.write(("" if first else ",\n") + json.dumps(event))
                    first = False
        file.write("\n]}\n")
    return Path(path)


def files_of(sources: Sequence[Source]) -> list[str | os.PathLike[str]]:
    """The sources that are files."""
    return [source for source in sources if not isinstance(source, Recording)]


def _events(found: list[Process], index: int, taken: set[int]) -> Iterator[dict[str, Any]]:
    base = _begin(found)
    for place, process in enumerate(found):
        pid = process.pid
        while pid in taken:
            pid += _AGAIN
        taken.add(pid)
        yield _named("process_name", pid, 0, process.title)
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": place}}
        threads: set[int] = set()
        # one closed event per range: half the size of a begin and an end
        for thread, opens, time, span in nested(process.spans()):
            tid = thread & 0xFFFFFF
            if tid not in threads:
                threads.add(tid)
                yield _named("thread_name", pid, tid, f"thread {tid}")
            if not opens:
                yield _range(span[3], span[4], pid, tid, span[1] - base, time - base)
        for number, span in enumerate(process.side()):
            tid = _SIDE + number % 64
            yield _range(span[3], span[4], pid, tid, span[1] - base, span[2] - base)
        tracks: set[tuple[int, int]] = set()
        for device, stream, start, end, name in process.work():
            gpu = _DEVICES + device + index * 256
            if (device, stream) not in tracks:
                if not any(known == device for known, _ in tracks):
                    yield _named("process_name", gpu, 0, f"GPU {device}")
                tracks.add((device, stream))
                yield _named("thread_name", gpu, stream, f"stream {stream}")
            yield {
                "ph": "X",
                "name": name,
                "cat": "kernel",
                "pid": gpu,
                "tid": stream,
                "ts": _us(start - base),
                "dur": _us(end - start),
            }


def _begin(found: list[Process]) -> int:
    """The first moment of a source: small numbers keep their nanoseconds in a double."""
    starts = []
    for process in found:
        thread: int | None = None
        for span in process.spans():
            if span[0] != thread:  # the first of each thread is its earliest
                thread = span[0]
                starts.append(span[1])
        starts.extend(work[2] for work in process.work())
        starts.extend(span[1] for span in process.side())
    return min(starts, default=0)


def _range(name: Any, payload: Any, pid: int, tid: int, start: int, end: int) -> dict[str, Any]:
    event: dict[str, Any] = {
        "ph": "X",
        "name": name.text,
        "cat": name.category,
        "pid": pid,
        "tid": tid,
        "ts": _us(start),
        "dur": _us(end - start),
    }
    if payload is not None:
        event["args"] = {"payload": payload if isinstance(payload, (int, float, str, list, dict)) else repr(payload)}
    return event


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _us(ns: int) -> float:
    return ns / 1000


# ---------------------------------------------------------------------------------------------------------- speedscope


SCHEMA = "https://www.speedscope.app/file-format-schema.json"


def write_speedscope(
    source: Source | Sequence[Source], path: str | os.PathLike[str], tick: Callable[[int], None] | None = None
) -> Path:
    """Write a recording or captures to `path`; returns the path. Times are nanoseconds. Of device operations that
    overlap on a device the later one is cut, because a profile is one stack. tick: called now and then with the number
    of events written since the last call. Raises CaptureError, OutputError."""
    sources: list[Source] = list(source) if isinstance(source, (list, tuple)) else [source]  # type: ignore[list-item]
    frames: dict[str, int] = {}
    with writing(path, files_of(sources)) as file:
        file.write(f'{{"$schema": "{SCHEMA}", "exporter": "fxnvtx", "profiles": [\n')
        profiles = _Profiles(file, frames, tick)
        for one in sources:
            with ExitStack() as files:
                whole = one if isinstance(one, Recording) else Path(one)  # type: ignore[arg-type]
                for process in processes(whole, files):
                    _threads(process, profiles)
                    _devices(process, profiles)
        profiles.close()
        # last, because only now all frames are known; the order of keys is free
        file.write('\n], "shared": {"frames": ')
        json.dump([{"name": name} for name in frames], file)
        file.write("}}\n")
    return Path(path)


class _Profiles:
    def __init__(self, file: TextIO, frames: dict[str, int], tick: Callable[[int], None] | None) -> None:
        self._file = file
        self._tick = tick
        self._frames = frames
        self._open = False
        self._any = False
        self._events = 0
        self._start = self._end = 0

    def begin(self, name: str, start: int) -> None:
        self.close()
        self._file.write(",\n" if self._any else "")
        self._file.write(f'{{"type": "evented", "unit": "nanoseconds", "name": {json.dumps(name)}, "events": [')
        self._any = self._open = True
        self._events = 0
        self._start = self._end = start

    def event(self, opens: bool, name: str, at: int) -> None:
        frame = self._frames.setdefault(name, len(self._frames))
        comma = ",\n" if self._events else ""
        self._file.write(f'{comma}{{"type": "{"O" if opens else "C"}", "frame": {frame}, "at": {at}}}')
        self._events += 1
        if self._tick is not None and not self._events & 0x3FFF:
            self._tick(0x4000)
        self._end = max(self._end, at)

    def close(self) -> None:
        if self._open:
            self._file.write(f'], "startValue": {self._start}, "endValue": {self._end}}}')
            self._open = False


def _threads(process: Process, profiles: _Profiles) -> None:
    now: int | None = None
    for thread, opens, time, span in nested(process.spans()):
        if thread != now:
            now = thread
            profiles.begin(f"{process.title}, thread {thread & 0xFFFFFF}", time)
        profiles.event(opens, span[3].text, time)


def _devices(process: Process, profiles: _Profiles) -> None:
    for device, stream, work in _streams(process):
        now: int | None = None
        for start, end, name in work:
            if now is None:
                profiles.begin(f"{process.title}, GPU {device} stream {stream}", start)
                now = start
            start = max(start, now)
            if end > start:
                profiles.event(True, name, start)
                profiles.event(False, name, end)
                now = end


def _streams(process: Process) -> Iterator[tuple[int, int, Iterator[tuple[int, int, str]]]]:
    """The operations stream by stream. Each must be used up before the next."""
    rows = process.work()
    row = next(rows, None)
    while row is not None:
        device, stream = row[0], row[1]

        def one(first: tuple[int, int, int, int, str] = row) -> Iterator[tuple[int, int, str]]:
            nonlocal row
            row = None
            yield first[2], first[3], first[4]
            for item in rows:
                if item[:2] != first[:2]:
                    row = item
                    return
                yield item[2], item[3], item[4]

        yield device, stream, one()
