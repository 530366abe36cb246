"""What the host did with the device besides launching: waits for it, allocations, and how much was in use by then."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..capture.schema import Schema
from .batches import Batch, Ints, Source
from .device import PROCESS, check_times, distinct
from .forest import Forest
from .spool import Limits, Spool

__all__ = ["Waits"]

WAIT, ALLOCATION, RELEASE = 0, 1, 2
_ON_HOST = (0, 1)  # kinds of memory: pageable and pinned
# `cudaStreamSynchronize_v3020`, `cuCtxSynchronize`, `hipDeviceSynchronize`
_WAITING = "value GLOB 'cu*Synchronize*' OR value GLOB 'hip*Synchronize*'"
_ROW = {"start": np.int64, "end": np.int64, "kind": np.int8, "size": np.int64, "used": np.int64}


class Waits:
    """Calls that wait, and (de)allocations, by thread. used: bytes of the process that are allocated after each, as
    far as the capture saw them being allocated. has_memory: whether the capture tells of allocations."""

    def __init__(self, source: Source, schema: Schema, limits: Limits, tick: Any) -> None:
        self.rows = Spool(_ROW, (), limits)
        self.has_memory = False
        self._used: dict[int, int] = {}
        runtime = schema.runtime
        if runtime is None:
            return
        if (
            schema.strings is not None
            and "nameId" in runtime.columns
            and source.exists(f"FROM {schema.strings.sql} WHERE {_WAITING}")
        ):
            named = f"nameId IN (SELECT id FROM {schema.strings.sql} WHERE {_WAITING})"
            for batch in source.batches(["globalTid", "start", "end"], f"FROM {runtime.sql} WHERE {named}"):
                self._waits(batch)
                tick(batch.rows)
        if schema.memory is not None:
            memory = schema.memory
            columns = [
                "r.globalTid",
                "r.start",
                "r.end",
                "m.memoryOperationType",
                "m.bytes",
                "m.globalPid",
                "m.memKind",
            ]
            join = (
                f"FROM {memory.sql} m LEFT JOIN {runtime.sql} r ON r.correlationId = m.correlationId"
                f" AND r.globalTid & {PROCESS} = m.globalPid ORDER BY m.start"
            )
            for batch in source.batches(columns, join):
                self._memory(batch)
                tick(batch.rows)
        self.rows.seal()

    def _waits(self, batch: Batch) -> None:
        tid, start, end = batch.ints
        keep = _whole(end[0] >= start[0], tid, start, end)
        check_times(start[0][keep], end[0][keep])
        length = end[0][keep] - start[0][keep]
        self.rows.append(tid[0][keep], (start[0][keep], end[0][keep], WAIT, length, 0))

    def _memory(self, batch: Batch) -> None:
        tid, start, end, kind, size, pid, where = batch.ints
        device = _whole((kind[0] <= 1) & ~np.isin(where[0], _ON_HOST), kind, size, pid)
        self.has_memory = self.has_memory or bool(device.any())
        change = np.where(device, np.where(kind[0] == 0, size[0], -size[0]), 0)
        used = np.zeros(batch.rows, np.int64)
        for process in distinct(pid[0]):
            mine = pid[0] == process
            upto = self._used.get(process, 0) + np.cumsum(change[mine])
            used[mine] = upto
            self._used[process] = int(upto[-1])
        keep = _whole(device & (end[0] >= start[0]), tid, start, end)
        check_times(start[0][keep], end[0][keep])
        which = np.where(kind[0] == 0, ALLOCATION, RELEASE)[keep]
        self.rows.append(tid[0][keep], (start[0][keep], end[0][keep], which, size[0][keep], used[keep]))


def count(forest: Forest, node: Ints, rows: dict[str, NDArray[Any]]) -> None:
    """Count rows for the ranges they lie in."""
    for kind, counter in ((WAIT, "waited"), (ALLOCATION, "allocated"), (RELEASE, "released")):
        some = rows["kind"] == kind
        if some.any():
            forest.sums[counter].add(node[some], rows["size"][some])
    some = rows["kind"] == ALLOCATION
    if some.any():
        forest.count_peaks(node[some], rows["used"][some])


def _whole(keep: NDArray[np.bool_], *columns: tuple[Ints, NDArray[np.bool_] | None]) -> NDArray[np.bool_]:
    for _values, valid in columns:
        if valid is not None:
            keep = keep & valid
    return keep
