"""Work joined with time: how long each range would take on a device that did its work at its peak (pure).

A range's own work is what its entry says (../work.py), as often as it was called. Its roof is the longer of two times:
all its operations at the device's peak, or all its bytes at the memory's. A range's total is the sum of what is inside:
so operations, bytes, times and roofs add up from layers to the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

from ..categories import MODULE, OP
from ..work import Entry
from .labels import Name, clean
from .peaks import Peaks
from .tree import Node

__all__ = ["Table", "rate"]

_Key = tuple[str, str, bool]


class Known(NamedTuple):
    """Of one call."""

    flops: tuple[tuple[str, Fraction], ...]
    moved: Fraction


class Table:
    """Entries by range. Parts of a module's code add up; different numbers of one part are of different shapes."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        by_key: dict[_Key, dict[str, set[Known | str]]] = {}
        self.devices: set[str] = set()
        for entry in entries:
            flops = tuple((kind, Fraction(n, entry.calls)) for kind, n in entry.flops)
            known: Known | str = entry.unknown or Known(flops, Fraction(entry.moved, entry.calls))
            key = (clean(entry.label), clean(entry.under), entry.backward)
            by_key.setdefault(key, {}).setdefault(entry.part, set()).add(known)
            self.devices.add(entry.device)
        self._found = {key: _settled(parts) for key, parts in by_key.items()}

    def __bool__(self) -> bool:
        return bool(self._found)

    def of(self, name: Name, under: str, backward: bool) -> Known | str | None:
        """The work of one call; a text that says why it is not known; None where nothing was said of this range."""
        text = name.text.partition(" in=")[0]
        return self._found.get((text, "" if name.category == MODULE else under, backward))


def _settled(parts: dict[str, set[Known | str]]) -> Known | str:
    alone = parts.pop("eager", None)
    eager = None if alone is None else _one(alone)
    if not parts:
        assert eager is not None
        return eager
    total: dict[str, Fraction] = {}
    moved = Fraction(0)
    for part in parts.values():
        one = _one(part)
        if isinstance(one, str):
            return one
        for kind, count in one.flops:
            total[kind] = total.get(kind, Fraction(0)) + count
        moved += one.moved
    found = Known(tuple(sorted(total.items())), moved)
    return found if eager in (None, found) else "it ran both eagerly and compiled"


def _one(some: set[Known | str]) -> Known | str:
    if len(some) > 1:
        return next((one for one in some if isinstance(one, str)), "it ran with different shapes")
    return next(iter(some))


_QUIET = frozenset({MODULE, OP})  # ranges whose own time on the host is that of operators


def rate(root: Node, table: Table, peaks: Peaks, gpu: bool) -> dict[str, int]:
    """Fill the counters of work of every node below `root`. `gpu`: its times are the device's. Returns why the work of
    some ranges is not known, with how much time of theirs."""
    why: dict[str, int] = {}
    timed = gpu or table.devices <= {"cpu", ""}  # the host's time says nothing about a device's
    # node, in a backward pass, the nearest module around, calls of the nearest range that has some
    todo: list[tuple[Node, bool, str, int]] = [(kid, False, "", 0) for kid in root.kids.values()]
    while todo:
        node, backward, under, calls = todo.pop()
        backward = backward or node.name.text == "backward"
        calls = node.calls or calls  # a replay of a CUDA graph runs no Python: the layers ran as often as it did
        _rate(node, table.of(node.name, under, backward), calls, peaks, gpu, timed, why)
        below = node.name.text.partition(" in=")[0] if node.name.category == MODULE else under
        todo.extend((kid, backward, below, calls) for kid in node.kids.values())
    return why


def _rate(
    node: Node, known: Known | str | None, calls: int, peaks: Peaks, gpu: bool, timed: bool, why: dict[str, int]
) -> None:
    node.flops = node.moved = node.roof = node.roof_compute = node.rated = node.unrated = node.roofless = 0
    if gpu:
        now, busy = node.gpu_self, node.kernels > 0
    else:
        now, busy = node.cpu_self, node.name.category in _QUIET and node.name.text != "backward"
    if known is None:
        known = "nobody told it" if busy else Known((), Fraction(0))
    if isinstance(known, str):
        node.unrated = now
        if now:
            why[known] = why.get(known, 0) + now
        return
    node.flops = round(sum(count for _, count in known.flops) * calls)
    node.moved = round(known.moved * calls)
    if not timed:
        return
    node.rated = now
    compute = memory = Fraction(0)
    for kind, count in known.flops:
        if not peaks.flops.get(kind):
            node.roofless = now
            return
        compute += count * calls * 10**9 / Fraction(peaks.flops[kind])
    if known.moved:
        if not peaks.memory:
            node.roofless = now
            return
        memory = known.moved * calls * 10**9 / Fraction(peaks.memory)
    node.roof = round(max(compute, memory))
    if compute >= memory:
        node.roof_compute = node.roof
