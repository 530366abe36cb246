"""One thread after another, a window of its ranges and calls at a time; open ranges are carried over."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..labels import PIECE, Span
from ..part import inside
from ..tree import Tree
from . import NONE, TOP, Nest, Placed, Walk, nested, placed, within
from .batches import Ints, Limits, Spool, windows
from .device import check_times
from .forest import EARLIEST, LATEST, ROOT, Forest
from .names import Numbered
from .overlaps import Moves

__all__ = ["HAS_PAYLOAD", "OPEN", "SPAN", "Calls", "Spans", "Threads", "fill"]


# what is kept of a range, and its flags
SPAN = {"start": np.int64, "neg_end": np.int64, "name": np.int64, "payload": np.int64, "flags": np.int8}
SPAN_TIES = ("neg_end",)
OPEN, HAS_PAYLOAD = 1, 2
SHALLOW = 64  # so many levels are always worth a loop over levels
_NO_ROWS = np.empty(0, np.int64)


@dataclass
class Spans:
    """Some ranges of one thread, sorted by start, and end downwards."""

    start: Ints
    end: Ints
    name: Ints
    payload: Ints
    is_open: NDArray[np.bool_]
    piece: NDArray[np.bool_]


@dataclass
class Calls:
    """Some calls of one thread by start; first, last and time: when the earliest of their operations starts and the
    last one ends, and the device time of all. `what` is handed on to whoever counts them."""

    start: Ints
    end: Ints
    first: Ints
    last: Ints
    time: Ints
    what: Any = None


@dataclass
class _Stack:
    """The open ranges. parent: the place of each one's parent among them. clean: each lies in the one before it."""

    start: Ints
    end: Ints
    node: Ints
    covered: Ints
    first: Ints
    last: Ints
    launches: Ints
    time: Ints
    piece: NDArray[np.bool_]
    parent: Ints
    low: int = -1
    modules: int = 0
    clean: bool = True

    @classmethod
    def empty(cls) -> _Stack:
        none = _NO_ROWS
        return cls(none, none, none, none, none, none, none, none, np.empty(0, np.bool_), none)


@dataclass
class _Launched:
    """Per range: first start and last end of what was launched in it, how many calls did, and its device time."""

    first: Ints
    last: Ints
    launches: Ints
    time: Ints


# (calls, the node of the range around each, that of the range that holds the call before, too, or NONE)
Launch = Callable[[Calls, Ints, Ints], None]
# rows with at least "start" and "end", by start, that lie in ranges but launch nothing, and the range around each
Event = Callable[[dict[str, NDArray[Any]], Ints], None]
Events = Callable[[int | None, int | None], dict[str, NDArray[Any]]]
# (thread, start, end, node) of some ranges
Watch = Callable[[int, Ints, Ints, Ints], None]


class Threads:
    """Feeds ranges and calls into a forest.

    outside: gives the node for calls that lie in no range. launch: told of all calls. residency, modules: told of
    residency ranges, and of modules that lie in no other one. event: told of what else happened on a thread.
    """

    def __init__(
        self,
        forest: Forest,
        outside: Callable[[], int],
        launch: Launch,
        residency: Watch | None = None,
        modules: Watch | None = None,
        event: Event | None = None,
    ) -> None:
        self.forest = forest
        self.outside = outside
        self.launch = launch
        self.residency = residency
        self.modules = modules
        self.event = event
        self.crossing = 0

    def run(
        self,
        thread: int,
        spools: Sequence[Spool],
        rows: int,
        spans_of: Callable[[int | None, int | None], Spans],
        calls_of: Callable[[int | None, int | None], Calls],
        events_of: Events | None = None,
    ) -> None:
        """One thread. spools: what the two functions read from, each given the bounds of a window's starts."""
        stack = _Stack.empty()
        for low, high in windows(spools, thread, rows):
            spans, calls = spans_of(low, high), calls_of(low, high)
            events = events_of(low, high) if events_of is not None and self.event is not None else {}
            some = len(spans.start) or len(calls.start) or len(events.get("start", ()))
            if some or (high is None and len(stack.start)):
                stack = self._window(thread, stack, spans, calls, events, final=high is None)

    # ------------------------------------------------------------------------------------------ one window

    def _window(
        self, thread: int, stack: _Stack, spans: Spans, calls: Calls, events: dict[str, NDArray[Any]], final: bool
    ) -> _Stack:
        held = len(stack.start)
        start = np.concatenate([stack.start, spans.start])
        end = np.concatenate([stack.end, spans.end])
        nest = nested(start, end) if stack.clean else None
        if nest is None:
            walk = self._walk(stack, spans, start, end)
            nest, where = walk.run(calls.start.tolist(), calls.end.tolist())
            still = np.array(walk.stack, np.int64)
            covered = np.array(walk.covered, np.int64)
            cover = np.array(walk.cover, np.int64)
            low, modules, clean = walk.low, walk.modules, not walk.crossed
            self.crossing += walk.crossing
        else:
            where, low = placed(nest, start, end, held, calls.start, calls.end, stack.low)
            still = _line(nest, len(start) - 1 if len(spans.start) else held - 1)
            covered = np.concatenate([stack.covered, spans.start])
            children = np.flatnonzero(nest.parent[held:] >= 0) + held
            lasting = np.zeros(len(start), np.bool_)
            lasting[still] = True
            children = children[lasting[nest.parent[children]]]
            np.maximum.at(covered, nest.parent[children], end[children])
            cover = end - start
            modules, clean = -1, True
        node = self._nodes(stack, spans, nest)
        self._count(spans, nest, node, cover, held)
        found = self._launched(stack, spans, calls, nest, where, node)
        piece = np.concatenate([stack.piece, spans.piece])
        self._close(nest, still, node, piece, found, final)
        if final:
            still = _NO_ROWS
        self._watched(thread, spans, nest, node, held)
        if events and self.event is not None:
            around = within(nest, start, end, events["start"], events["end"])[0]
            self.event(events, np.append(node, ROOT)[around])  # TOP is the last place
        place = np.full(len(start) + 1, TOP)
        place[still] = np.arange(len(still))
        new = _Stack(
            start[still], end[still], node[still], covered[still],
            found.first[still], found.last[still], found.launches[still], found.time[still], piece[still],
            parent=place[nest.parent[still]], low=low,
        )  # fmt: skip
        outermost = self._outermost(new.node)
        new.modules = outermost if modules < 0 else modules
        new.clean = clean or (bool((new.parent == np.arange(len(still)) - 1).all()) and new.modules == outermost)
        return new

    def _walk(self, stack: _Stack, spans: Spans, start: Ints, end: Ints) -> Walk:
        held = len(stack.start)
        kinds = [0] * held + np.array(self.forest.names.kinds, np.int64)[spans.name].tolist()
        return Walk(
            start.tolist(), end.tolist(), kinds, held, stack.parent.tolist(), stack.covered.tolist(),
            stack.low, stack.modules, crossed=not stack.clean,
        )  # fmt: skip

    def _outermost(self, nodes: Ints) -> int:
        """How deep the outermost module's range lies among these open ones; 0 for none."""
        for place, node in enumerate(nodes.tolist(), 1):
            if self.forest.in_module[node]:
                return place
        return 0

    def _nodes(self, stack: _Stack, spans: Spans, nest: Nest) -> Ints:
        """The paths of all rows."""
        forest, held = self.forest, len(stack.start)
        count = held + len(spans.start)
        # one place more, for the parents of those that have none
        node = np.full(count + 1, ROOT)
        node[:held] = stack.node
        name = np.concatenate([np.zeros(held, np.int64), spans.name])
        if len(nest.cuts) - 1 <= max(SHALLOW, count // 32) and forest.has_room(len(spans.start)):
            for rows in nest.levels():
                rows = rows[np.searchsorted(rows, held) :]
                if len(rows):
                    node[rows] = forest.paths(node[nest.parent[rows]], name[rows])
            return node[:count]
        numbers, parents, names = node.tolist(), nest.parent.tolist(), forest.names.names
        for row, number in enumerate(name[held:].tolist(), held):
            numbers[row] = forest.below(numbers[parents[row]], names[number])
        return np.array(numbers[:count], np.int64)

    def _count(self, spans: Spans, nest: Nest, node: Ints, cover: Ints, held: int) -> None:
        forest, new = self.forest, node[held:]
        forest.count_ranges(new, spans.start, spans.end, spans.is_open, spans.piece)
        if spans.payload.any():
            forest.sums["payload"].add(new, spans.payload)
        inner = np.flatnonzero(nest.parent[held:] >= 0) + held
        forest.sums["cpu_self"].add(node[nest.parent[inner]], cover[inner], -1)

    def _launched(self, stack: _Stack, spans: Spans, calls: Calls, nest: Nest, where: Placed, node: Ints) -> _Launched:
        """Per row: what its own calls launched, those before this window included."""
        new = len(spans.start)
        first = np.concatenate([stack.first, np.full(new, LATEST)])
        last = np.concatenate([stack.last, np.full(new, EARLIEST)])
        launches = np.concatenate([stack.launches, np.zeros(new, np.int64)])
        time = np.concatenate([stack.time, np.zeros(new, np.int64)])
        found = _Launched(first, last, launches, time)
        if not len(calls.start):
            return found
        whole = np.append(node, ROOT)
        around = whole[where.inner]
        nowhere = where.inner < 0
        if nowhere.any():
            around[nowhere] = self.outside()
        self.launch(calls, around, np.where(where.both == NONE, NONE, whole[np.maximum(where.both, TOP)]))
        inside = np.flatnonzero(~nowhere)
        rows = where.inner[inside]
        np.minimum.at(first, rows, calls.first[inside])
        np.maximum.at(last, rows, calls.last[inside])
        launches += np.bincount(rows, minlength=len(launches))
        np.add.at(time, rows, calls.time[inside])
        if nest.others is not None:
            # only these: whatever encloses one of them and the call hears of the call from the row that holds it
            rows, which = nest.others
            self.forest.sums["launches"].count(node[rows])
            np.minimum.at(first, rows, calls.first[which])
            np.maximum.at(last, rows, calls.last[which])
        return found

    def _close(
        self, nest: Nest, still: Ints, node: Ints, piece: NDArray[np.bool_], found: _Launched, final: bool
    ) -> None:
        """Add up what was launched in ranges that ended, innermost first, and in what is around them."""
        ended = np.ones(len(node), np.bool_)
        if not final:
            ended[still] = False
        if (found.first < LATEST).any():
            self._bubble(nest, ended, node, found)
        rows = np.flatnonzero(ended)
        if nest.closed is not None:
            rows = np.append(nest.closed, still[::-1]) if final else nest.closed
        self.forest.count_device_time(node[rows], found.time[rows], piece[rows])

    def _bubble(self, nest: Nest, ended: NDArray[np.bool_], node: Ints, found: _Launched) -> None:
        first, last, launches, time = found.first, found.last, found.launches, found.time
        if len(nest.cuts) - 1 <= max(SHALLOW, len(node) // 32):
            for rows in reversed(nest.levels()[1:]):
                rows = rows[ended[rows] & (first[rows] < LATEST)]
                above = nest.parent[rows]
                np.minimum.at(first, above, first[rows])
                np.maximum.at(last, above, last[rows])
                np.add.at(launches, above, launches[rows])
                np.add.at(time, above, time[rows])
        else:
            for row in np.flatnonzero(ended & (nest.parent >= 0))[::-1].tolist():
                above = nest.parent[row]
                if first[row] < LATEST:
                    first[above] = min(first[above], first[row])
                    last[above] = max(last[above], last[row])
                    launches[above] += launches[row]
                    time[above] += time[row]
        rows = np.flatnonzero(ended & (first < LATEST))
        sums = self.forest.sums
        sums["launches"].add(node[rows], launches[rows])
        sums["proj"].add(node[rows], last[rows] - first[rows])
        sums["proj_calls"].count(node[rows])

    def _watched(self, thread: int, spans: Spans, nest: Nest, node: Ints, held: int) -> None:
        forest = self.forest
        if self.residency is None and self.modules is None:
            return
        new = node[held:]
        if self.residency is not None and forest.has_residency:
            rows = np.flatnonzero(np.array(forest.residency)[new] == new)
            if len(rows):
                self.residency(thread, spans.start[rows], spans.end[rows], new[rows])
        if self.modules is not None:
            if nest.outer is not None:
                rows = nest.outer - held
            else:
                inside = np.array(forest.in_module)
                above = inside[np.append(node, ROOT)[nest.parent[held:]]]
                rows = np.flatnonzero(inside[new] & ~above)
            if len(rows):
                self.modules(thread, spans.start[rows], spans.end[rows], new[rows])


def _line(nest: Nest, row: int) -> Ints:
    """The rows above a row, outermost first, and the row."""
    line = []
    while row >= 0:
        line.append(row)
        row = int(nest.parent[row])
    return np.array(line[::-1], np.int64)


def calls_of(rows: dict[str, NDArray[Any]]) -> Calls:
    """Launched operations, by call, as calls."""
    call, corr = rows["call"], rows["corr"]
    if not len(call):
        return Calls(call, call, call, call, call, (rows, np.empty(0, np.int64)))
    begins = np.flatnonzero(np.append(True, (call[1:] != call[:-1]) | (corr[1:] != corr[:-1])))
    first = np.minimum.reduceat(rows["start"], begins)
    last = np.maximum.reduceat(rows["end"], begins)
    time = np.add.reduceat(rows["credit"], begins)
    return Calls(call[begins], rows["call_end"][begins], first, last, time, (rows, begins))


def cut(spans: Spans, clip: tuple[int, int] | None) -> Spans:
    """The ranges cut to a time, without those that have no part in it."""
    if clip is None or not len(spans.start):
        return spans
    low, high = clip
    rows = np.flatnonzero(inside(spans.start, spans.end, low, high))
    start, end = np.maximum(spans.start[rows], low), np.minimum(spans.end[rows], high)
    order = np.lexsort([-end, start])  # stable: ranges that were cut alike stay in their order
    rows = rows[order]
    return Spans(
        start[order], end[order], spans.name[rows], spans.payload[rows], spans.is_open[rows], spans.piece[rows]
    )  # fmt: skip


def without(
    rows: dict[str, NDArray[Any]], start: str, times: list[tuple[int, int]], clip: tuple[int, int] | None = None
) -> dict[str, NDArray[Any]]:
    """The rows that do not start within any of these times, which are sorted; and within `clip`."""
    if clip is not None:
        kept = (rows[start] >= clip[0]) & (rows[start] < clip[1])
        rows = {name: column[kept] for name, column in rows.items()}
    if not times or not len(rows[start]):
        return rows
    bounds = np.array(times, np.int64)
    place = np.searchsorted(bounds[:, 0], rows[start], "right") - 1
    kept = (place < 0) | (rows[start] >= bounds[place, 1])
    return {name: column[kept] for name, column in rows.items()}


# -------------------------------------------------------------------------------------------- ranges in memory


_NONE = np.empty(0, np.int64)
_NO_CALLS = Calls(_NONE, _NONE, _NONE, _NONE, _NONE)
_COLUMNS = {
    "start": np.int64,
    "order": np.int64,
    "end": np.int64,
    "name": np.int64,
    "payload": np.int64,
    "open": np.bool_,
    "piece": np.bool_,
}


def fill(tree: Tree, spans: Iterable[Span], limits: Limits | None = None) -> None:
    """Put ranges (thread, start, end, name, payload, is still open) into a tree.

    They come by thread, then by start, and of those that start together the outer one first. Raises TypeError,
    ValueError or OverflowError for what is no time.
    """
    limits = limits or Limits()
    names = Numbered()
    names.has_pieces = True  # as far as is known yet
    forest = Forest(tree, names)
    moves = Moves(forest, limits)
    threads = Threads(forest, lambda: 0, lambda calls, around, both: None, moves.residency, moves.modules)
    for thread, rows in groupby(spans, key=lambda span: span[0]):
        starts, ends, numbers, payloads = array("q"), array("q"), array("q"), array("q")
        opens, pieces = array("b"), array("b")
        for _thread, start, end, name, payload, is_open in rows:
            starts.append(start)
            ends.append(end)
            numbers.append(names.number(name))
            # what is no 64-bit integer is no payload of NVTX either
            payloads.append(payload if type(payload) is int and -(1 << 63) <= payload < 1 << 63 else 0)
            opens.append(is_open)
            pieces.append(payload is PIECE)
        columns = [_array(column) for column in (starts, ends, numbers, payloads)]
        check_times(columns[0], columns[1])
        spool = Spool(_COLUMNS, ("order",), limits)
        spool.append(thread, (columns[0], np.arange(len(starts)), *columns[1:], _mask(opens), _mask(pieces)))
        spool.seal()

        def read(low: int | None, high: int | None, spool: Spool = spool, thread: int = thread) -> Spans:
            got = spool.read(thread, low, high)
            return Spans(got["start"], got["end"], got["name"], got["payload"], got["open"], got["piece"])

        threads.run(thread, [spool], limits.window, read, lambda low, high: _NO_CALLS)
    moves.settle(None)
    forest.fill(str)


def _mask(column: array[int]) -> NDArray[np.bool_]:
    return np.frombuffer(column, np.bool_)


def _array(column: array[int]) -> Ints:
    return np.frombuffer(column, np.int64)
