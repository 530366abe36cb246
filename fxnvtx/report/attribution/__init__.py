"""Which range launched what: the rows of a capture as numpy columns, joined and nested a window at a time.

Nothing of this is imported before a capture is read, because numpy is not needed for anything else. Data flows through
`batches` (rows out of SQLite; sorted runs, in memory or in a temporary file), `ranges`, `tasks`
(start/end ranges that nest), `names`, `device` (credit of
each operation, and its call), `nesting` (the range around each call), `threads` (one thread after another) and `forest`
(counters per path), which fills the `Tree` that every view reads. `captures` puts them together for the exports of
Nsight Systems, `fill` below for recordings, which are in memory already and know of no device.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from ..labels import PIECE, Span
from ..tree import Tree
from .batches import Ints, Limits, Spool
from .device import check_times
from .forest import Forest
from .names import Numbered
from .overlaps import Moves
from .threads import Calls, Spans, Threads

__all__ = ["fill"]


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
