"""speedscope's file format: one evented profile per thread and device."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from ..output import writing
from ..recording import Recording
from .chrome import Source, files_of
from .instances import Process, nested, processes

__all__ = ["write"]

SCHEMA = "https://www.speedscope.app/file-format-schema.json"


def write(
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
