"""Device work of a capture, staged by SQLite: each operation with how much of it counts and how idle the device was."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any

from fxnvtx.report.capture.schema import Schema, Table

__all__ = ["COPY", "GRAPH", "KERNEL", "SET", "Op", "launches", "stage", "strays"]

KERNEL, COPY, SET, GRAPH = 0, 1, 2, 3
PROCESS = "~16777215"  # globalTid & this = globalPid: the low 24 bits are the thread


# One operation: row, start, end, kind, name, device, CUDA graph node, size, credit (its time not covered by operations
# that started earlier on this device), idle (the device's idle time right before it), shared (it overlaps another
# one). All times in ns. A plain tuple, as SQLite gives it: there are millions.
Op = tuple[int, int, int, int, int, int, int | None, int, int, int, int]


def _source(schema: Schema, table: Table, kind: int, name: str, size: str) -> str:
    return (
        f"SELECT correlationId AS corr, {schema.process(table)} AS pid, deviceId AS device, start, end, {kind} AS kind,"
        f" {name} AS name, {table.pick('graphNodeId')} AS node, {size} AS size"
        # a graph whose times could not be collected has two zeros (CUPTI's CUpti_ActivityGraphTrace2)
        f" FROM {table.sql} WHERE end >= start AND end > 0"
    )


def stage(connection: sqlite3.Connection, schema: Schema) -> int:
    """Make temp.fx_op; returns how many operations it holds."""
    sources = []
    if schema.kernel:
        sources.append(_source(schema, schema.kernel, KERNEL, schema.kernel.pick("demangledName", "shortName"), "0"))
    if schema.memcpy:
        sources.append(_source(schema, schema.memcpy, COPY, "copyKind", schema.memcpy.pick("bytes", default="0")))
    if schema.memset:
        sources.append(_source(schema, schema.memset, SET, "0", schema.memset.pick("bytes", default="0")))
    if schema.graph_trace:
        sources.append(_source(schema, schema.graph_trace, GRAPH, "graphId", "0").replace("graphNodeId AS", "NULL AS"))
    # the types matter: without them SQLite would not use the index in the join with the calls
    columns = ("corr", "pid", "device", "start", "end", "kind", "name", "node", "size", "credit", "idle", "shared")
    connection.execute(f"CREATE TEMP TABLE fx_op ({', '.join(f'{column} INTEGER' for column in columns)})")
    if not sources:
        return 0
    # `before`: when everything that started earlier on this device had ended; `after`: when the next one starts
    connection.execute(
        f"""
        INSERT INTO temp.fx_op
        SELECT corr, pid, device, start, end, kind, name, node, size,
               max(0, end - max(start, coalesce(before, start))),
               max(0, start - coalesce(before, start)),
               coalesce(before > start, 0) OR coalesce(after < max(end, coalesce(before, end)), 0)
        FROM (SELECT *, max(end) OVER (PARTITION BY pid, device ORDER BY start, end
                                       ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before,
                     lead(start) OVER (PARTITION BY pid, device ORDER BY start, end) AS after
              FROM ({" UNION ALL ".join(sources)}))
        """
    )
    connection.execute("CREATE INDEX temp.fx_op_corr ON fx_op (corr)")
    return int(connection.execute("SELECT count(*) FROM temp.fx_op").fetchone()[0])


_OP = "o.rowid, o.start, o.end, o.kind, o.name, o.device, o.node, o.size, o.credit, o.idle, o.shared"


def launches(
    connection: sqlite3.Connection, schema: Schema, pid: int, seen: bytearray
) -> Iterator[tuple[int, int, int, list[Op]]]:
    """The calls of one process that launched operations, by thread and start, each with what it launched."""
    if schema.runtime is None:
        return
    # CROSS JOIN fixes the order: all calls, each looked up among the operations
    rows = connection.execute(
        f"""
        SELECT r.globalTid, r.start, r.end, r.correlationId, {_OP}
        FROM {schema.runtime.sql} AS r CROSS JOIN temp.fx_op AS o
        ON o.corr = r.correlationId AND o.pid = (r.globalTid & {PROCESS})
        WHERE r.globalTid BETWEEN ? AND ? AND r.end >= r.start
        ORDER BY r.globalTid, r.start, r.correlationId, o.start
        """,
        (pid, pid | 0xFFFFFF),
    )
    current: tuple[Any, ...] = ()
    group: list[Op] = []
    for row in rows:
        if seen[row[4]]:
            continue  # a second call with the same correlation: the first one launched it
        seen[row[4]] = 1
        if row[:4] != current:
            if group:
                yield current[0], current[1], current[2], group
            current, group = row[:4], []
        group.append(row[4:])
    if group:
        yield current[0], current[1], current[2], group


def strays(connection: sqlite3.Connection, pid: int, seen: bytearray) -> Iterator[Op]:
    """Operations of one process that no recorded call launched."""
    if sum(seen) == len(seen) - 1:
        return
    for row in connection.execute(f"SELECT {_OP} FROM temp.fx_op AS o WHERE pid = ?", (pid,)):
        if not seen[row[0]]:
            yield row
