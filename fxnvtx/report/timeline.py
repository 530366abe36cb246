"""Every range of one step, for those who want to see it as it ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

from ..categories import REQUEST, STEP
from .labels import Span, category_of
from .part import Timeline
from .tree import Node

__all__ = ["timeline_of"]

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
    todo = list(root.kids.values())
    while todo:
        node = todo.pop()
        if category_of(node.name) == STEP and node.calls:
            steps.append(node)
        else:
            todo.extend(node.kids.values())
    if not steps:
        steps = [node for node in root.kids.values() if node.calls and not node.is_unknown()]
        requests = [node for node in steps if category_of(node.name) == REQUEST]
        return max(requests or steps, key=lambda node: node.cpu // node.calls, default=None)
    steps.sort(key=lambda node: (node.gpu or node.cpu) / node.calls)
    return steps[len(steps) // 2]
