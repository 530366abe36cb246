"""The ranges of a capture, read into sorted runs by thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..capture.nsys import CROSS_THREAD, Reader
from ..capture.schema import PUSH_POP, START_END, Table
from .batches import Batch, Ints, Limits, Source, Spool
from .device import PROCESS, both, check_times, distinct
from .names import Names
from .threads import HAS_PAYLOAD, OPEN, SPAN, SPAN_TIES

Tick = Callable[[int], None]
_OPEN_END = np.iinfo(np.int64).max


class Ranges:
    """All ranges of a capture, by thread: `spans` those that nest, `aside` start/end ranges beside them."""

    def __init__(self, reader: Reader, names: Names, source: Source, limits: Limits, tick: Tick) -> None:
        self._reader = reader
        self._names = names
        self.spans = Spool(SPAN, SPAN_TIES, limits)
        self.aside = Spool(SPAN, SPAN_TIES, limits)
        self._limits = limits
        self.last = 0  # the last moment of any range
        self.notes: list[str] = []
        self.pids: set[int] = set()
        if reader.has_ranges:
            self._read(source, tick)

    def _read(self, source: Source, tick: Any) -> None:
        nvtx = self._reader.nvtx
        payload = nvtx.pick("int64Value", "uint64Value", "int32Value", "uint32Value")
        # most captures have none of these, and a look is cheaper than a column
        text, elsewhere, value = _present(source, nvtx, ("text", nvtx.pick("endGlobalTid"), payload))
        columns = [
            "eventType", "globalTid", "start", "end", elsewhere, nvtx.pick("textId"), nvtx.pick("domainId"),
            nvtx.pick("category"), value,
        ]  # fmt: skip
        backwards: dict[int, int] = {}
        lost, nobody = 0, False
        texts = text and "coalesce(text, '')"
        for batch in source.batches(columns, f"FROM {nvtx.sql}", texts):
            lost += self._ranges(batch, backwards)
            valid = batch.ints[1][1]
            nobody = nobody or valid is not None
            tick(batch.rows)
        if self.aside.rows and (nesting := self._reader.nesting(source)):
            self._nest(source, [*columns, "rowid"], texts, np.array(nesting, np.int64))
        self.spans.seal()
        self.aside.seal()
        if nobody:
            self.notes.append("some ranges do not say which thread they are from and were left out")
        for _pid, count in sorted(backwards.items()):
            self.notes.append(f"{count:,} ranges end before they begin and were left out")
        if lost:
            self.notes.append(f"{lost:,} {CROSS_THREAD}")

    def _nest(self, source: Source, columns: list[str | None], texts: str | None, nesting: Ints) -> None:
        """Take the start/end ranges in again, those that nest as if they were push/pop."""
        self.aside.close()
        self.aside = Spool(SPAN, SPAN_TIES, self._limits)
        kinds = ", ".join(map(str, START_END))
        for batch in source.batches(columns, f"FROM {self._reader.nvtx.sql} WHERE eventType IN ({kinds})", texts):
            row, (kind, valid) = batch.ints.pop()[0], batch.ints[0]
            batch.ints[0] = np.where(np.isin(row, nesting), PUSH_POP[0], kind), valid
            self._ranges(batch, {})

    def _ranges(self, batch: Batch, backwards: dict[int, int]) -> int:
        """Take in the ranges of a batch; returns how many of them end on another thread."""
        kind, tid, start, end, end_tid, strings, domain, category, payload = batch.ints
        whole = both(start[1], end[1])
        wrong = end[0] < start[0] if whole is None else whole & (end[0] < start[0])
        self._moments(start, end)
        pids = tid[0] & PROCESS
        if wrong.any():
            for pid in pids[wrong if tid[1] is None else wrong & tid[1]].tolist():
                backwards[pid] = backwards.get(pid, 0) + 1
        self.pids.update(distinct(pids if tid[1] is None else pids[tid[1]]))
        elsewhere = np.zeros(batch.rows, np.bool_)
        if end_tid[1] is None or end_tid[1].any():
            told = both(end_tid[1], tid[1])
            elsewhere = end_tid[0] != tid[0] if told is None else told & (end_tid[0] != tid[0])
        lost = 0
        for spool, kinds in ((self.spans, PUSH_POP), (self.aside, START_END)):
            mine = (kind[0] == kinds[0]) | (kind[0] == kinds[1])
            lost += int((mine & elsewhere).sum())
            keep = mine & ~wrong & ~elsewhere
            for valid in (tid[1], start[1]):
                if valid is not None:
                    keep &= valid
            if keep.any():
                rows: Any = slice(None) if keep.all() else np.flatnonzero(keep)
                texts = batch.texts
                if texts is not None and not isinstance(rows, slice):
                    texts = [texts[row] for row in rows.tolist()]  # type: ignore[assignment]
                name = self._names.raw(
                    pids[rows], _some(strings, rows), texts, _some(domain, rows), _some(category, rows)
                )
                self._append(spool, tid[0][rows], start[0][rows], _some(end, rows), _some(payload, rows), name)
        return lost

    def _moments(self, start: tuple[Ints, Any], end: tuple[Ints, Any]) -> None:
        for values, valid in (start, end):
            some = values if valid is None else values[valid]
            if len(some):
                self.last = max(self.last, int(some.max()))

    def _append(
        self, spool: Spool, tid: Ints, start: Ints, end: tuple[Ints, Any], payload: tuple[Ints, Any], name: Ints
    ) -> None:
        flags = np.zeros(len(name), np.int8)
        ends = end[0]
        check_times(start, ends)
        if end[1] is not None:
            ends = np.where(end[1], ends, _OPEN_END)
            flags[~end[1]] |= OPEN
        flags[slice(None) if payload[1] is None else payload[1]] |= HAS_PAYLOAD
        spool.append(tid, (start, -ends, name, payload[0], flags))


def _present(source: Source, nvtx: Table, columns: tuple[str, ...]) -> list[str | None]:
    """The columns of ranges that are not NULL in all of them, None for the others."""
    kinds = ", ".join(map(str, PUSH_POP + START_END))
    asked = [f"{column} IS NOT NULL" for column in columns]
    if not source.exists(f"FROM {nvtx.sql} WHERE eventType IN ({kinds}) AND ({' OR '.join(asked)})"):
        return [None] * len(columns)
    return [
        column if source.exists(f"FROM {nvtx.sql} WHERE eventType IN ({kinds}) AND {test}") else None
        for column, test in zip(columns, asked, strict=True)
    ]


def _some(column: tuple[Ints, Any], rows: Any) -> tuple[Ints, Any]:
    return column[0][rows], None if column[1] is None else column[1][rows]
