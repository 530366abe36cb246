"""Chrome trace events (JSON): opens in Perfetto and in chrome://tracing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..output import writing
from ..recording import Recording
from .instances import Process, nested, processes

__all__ = ["write"]

Source = Recording | str | os.PathLike[str]
# Perfetto reads 32-bit process ids. Linux ends at 4,194,304: two sources that know the same one are told apart above
# that, and devices, 256 to a source, lie above those.
_AGAIN = 5_000_000
_DEVICES = 1_500_000_000
_SIDE = 1 << 24  # start/end ranges get thread ids above any real one


def write(
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
