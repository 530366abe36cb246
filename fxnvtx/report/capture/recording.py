"""Reader of fxnvtx recordings: the ranges collected inside the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...categories import MODULE
from ...categories import PIECE as PIECE_CATEGORY
from ...errors import CaptureError, FxnvtxError
from ...recording import Range, Recording, read_entry
from ..labels import PIECE, Name, Span, clean, infer_category, numbered
from ..part import WHOLE, Part, Window, omitted, timeline_of
from ..work import different
from .schema import one_line

__all__ = ["damaged_recording", "load_recording", "read_recording", "shown_apart", "spans_of"]


def read_recording(
    recording: Recording, source: str = "recording", exact: bool = False, window: Window = WHOLE
) -> Part:
    """The tree of a recording. Launches are not in it: recordings know CPU time only."""
    meta = recording.meta
    part = Part(source, _number(meta.get("pid")) or 0, rank=_number(meta.get("rank")))
    classes = meta.get("classes")
    if isinstance(classes, dict):
        part.classes = {str(label): str(name) for label, name in classes.items()}
    work = meta.get("work")
    if isinstance(work, list):
        part.work = [entry for row in work if (entry := read_entry(row)) is not None]
    kinds = different(part.work)
    ranges = recording.ranges
    with damaged_recording(source):
        # not at the top: numpy is imported only when a capture is read
        from ..attribution.threads import fill

        nesting, crossing = shown_apart(ranges)
        left_out = omitted(lambda: spans_of(nesting, exact), window)
        if window.between is not None and ranges:
            left_out.cut_to(window.between, min(item.start_ns for item in ranges))
        part.notes.extend(left_out.notes)
        fill(part.tree, left_out.clipped(left_out.without(spans_of(nesting, exact, kinds))))
        if crossing:  # start/end ranges, as in a capture: beside the tree, and in no total
            fill(part.side, spans_of(crossing, exact))
            part.side.total()
    part.tree.total()
    if window.timeline:
        part.timeline = timeline_of(
            part.tree.root,
            lambda times: (span for span in spans_of(nesting, exact) if times[0] <= span[1] < times[1]),
            lambda times: (),
        )
    leaked = sum(1 for item in ranges if item.leaked)
    if leaked:
        part.notes.append(f"{leaked:,} ranges were closed by the range around them (leaked)")
    return part


@contextmanager
def damaged_recording(source: str) -> Iterator[None]:
    """Turn what rows of the wrong types cause into one CaptureError."""
    try:
        yield
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, FxnvtxError):
            raise
        raise CaptureError(f"{source} is a damaged fxnvtx recording: {one_line(error)}") from error


def shown_apart(ranges: list[Range]) -> tuple[list[Range], list[Range]]:
    """The ranges that nest, and the start/end ranges that do not."""
    if not any(item.crossing for item in ranges):
        return ranges, []
    # here, because numpy is needed for nothing else
    from ..attribution.tasks import beside

    aside = beside(ranges)
    return [r for r in ranges if r.crossing not in aside], [r for r in ranges if r.crossing in aside]


def spans_of(ranges: list[Range], exact: bool = False, kinds: frozenset[str] = frozenset()) -> Iterator[Span]:
    """The ranges in the order a sweep wants, by thread and then start; open ones end where the recording does. kinds:
    the modules whose payload says which kind of call it is."""
    last = max((item.end_ns or item.start_ns for item in ranges), default=0)
    names: dict[tuple[str, str], Name] = {}
    # stable: of two ranges that start together the outer one was recorded first
    for item in sorted(ranges, key=lambda r: (r.thread_id, r.start_ns, r.depth)):
        key = (item.label, item.category)
        name = names.get(key)
        if name is None:
            text = item.label if exact else clean(item.label)
            name = names[key] = Name(text, item.category or infer_category(text))
        payload = item.payload
        if name.category == PIECE_CATEGORY:
            name, payload = name._replace(category=MODULE), PIECE
        elif payload is not None and not exact and name.category in ("step", "request"):
            name = name._replace(text=numbered(name.text, name.category, payload))
        elif type(payload) is int and name.category == MODULE and name.text.partition(" in=")[0] in kinds:
            name = name._replace(number=payload)
        end = last if item.end_ns is None else item.end_ns
        yield item.thread_id, item.start_ns, end, name, payload, item.end_ns is None


def load_recording(path: Path, exact: bool = False, window: Window = WHOLE) -> Part:
    return read_recording(Recording.load(path), str(path), exact, window)


def _number(value: object) -> int | None:
    return value if type(value) is int else None
