"""Every single range and device operation, streamed: what timeline formats need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..recording import Recording
from .capture import as_sqlite, kind_of, rank_of
from .capture.nsys import PUSH_POP, START_END, Reader
from .capture.recording import damaged_recording, spans_of
from .capture.schema import damaged, detect, open_capture
from .labels import Span

__all__ = ["Process", "Work", "nested", "processes"]

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
    if kind == "recording":
        files.enter_context(damaged_recording(str(source)))
        return [_recorded(Recording.load(source), str(source))]
    path = source
    if kind in ("nsys-rep", "trace", "tables"):
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
        lambda: spans_of(recording.ranges, exact=True),
        lambda: iter(()),
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
