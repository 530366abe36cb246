"""Captures written row by row into the empty tables of a real export."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "data"
VERSIONS = ("2022_4", "2023_4", "2026_2")
# what 2022.4 did not have yet
_NEWER = {"greenContextId", "jsonTextId", "jsonText", "binaryData", "launchType", "virtualAddress", "copyCount"}
GRAPH_TRACE = (
    "CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER,"
    " contextId INTEGER, streamId INTEGER, correlationId INTEGER, globalPid INTEGER, graphId INTEGER,"
    " graphExecId INTEGER)"
)
GRAPH_NODES = (
    "CREATE TABLE CUDA_GRAPH_NODE_EVENTS (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,"
    " globalTid INTEGER, nameId INTEGER NOT NULL, graphNodeId INTEGER NOT NULL, originalGraphNodeId INTEGER)"
)

MEMORY = (
    "CREATE TABLE CUDA_GPU_MEMORY_USAGE_EVENTS (start INTEGER NOT NULL, globalPid INTEGER NOT NULL, deviceId INTEGER"
    " NOT NULL, contextId INTEGER NOT NULL, address INTEGER NOT NULL, pc INTEGER NOT NULL, bytes INTEGER NOT NULL,"
    " memKind INTEGER NOT NULL, memoryOperationType INTEGER NOT NULL, name TEXT, correlationId INTEGER)"
)


def process(pid: int) -> int:
    """An nsys global process id."""
    return (1 << 48) | (pid << 24)


class Capture:
    """A capture being written. Times are ns; threads are told by their number within process `pid`."""

    def __init__(self, path: Path, version: str = "2023_4", domain: str | None = "fxnvtx") -> None:
        self.path = path
        self.version = version
        self.database = sqlite3.connect(path)
        self.database.executescript("PRAGMA journal_mode = DELETE; PRAGMA synchronous = OFF;")
        source = "2023_4" if version == "2022_4" else version
        for statement in (DATA / f"schema_nsys_{source}.sql").read_text().splitlines():
            self.database.execute(statement.rstrip(";"))
        if version == "2022_4":
            self._make_older()
        if version == "2026_2":
            self.database.execute(GRAPH_NODES)
            # from 2024 on the old name means something else
            self.database.execute("CREATE TABLE CUDA_GRAPH_EVENTS (start INTEGER, end INTEGER, graphId INTEGER)")
        self.domain = domain
        self._texts: dict[str, int] = {}
        self._categories: dict[tuple[int, str], int] = {}
        self._domains: set[int] = set()
        self._correlation = 0

    def _make_older(self) -> None:
        for table in (
            "NVTX_EVENTS",
            "CUPTI_ACTIVITY_KIND_KERNEL",
            "CUPTI_ACTIVITY_KIND_MEMCPY",
            "CUPTI_ACTIVITY_KIND_MEMSET",
        ):
            for row in self.database.execute(f"PRAGMA table_info({table})").fetchall():
                if row[1] in _NEWER:
                    self.database.execute(f"ALTER TABLE {table} DROP COLUMN {row[1]}")

    def insert(self, table: str, **values: Any) -> None:
        described = self.database.execute(f"PRAGMA table_info({table})").fetchall()
        known = {row[1] for row in described}
        for name in [name for name in values if name not in known]:
            del values[name]
        for row in described:
            if row[3] and row[1] not in values and not row[5]:
                values[row[1]] = 0
        columns = ", ".join(f'"{name}"' for name in values)
        self.database.execute(
            f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' * len(values))})", [*values.values()]
        )

    def text(self, value: str) -> int:
        if value not in self._texts:
            self._texts[value] = len(self._texts) + 100
            self.insert("StringIds", id=self._texts[value], value=value)
        return self._texts[value]

    def _domain(self, pid: int) -> int:
        if self.domain is None:
            return 0
        if pid not in self._domains:
            self._domains.add(pid)
            self.insert("NVTX_EVENTS", start=0, eventType=75, text=self.domain, globalTid=process(pid) | 1, domainId=1)
        return 1

    def _category(self, pid: int, name: str | None) -> int | None:
        if name is None:
            return None
        if (pid, name) not in self._categories:
            self._categories[pid, name] = len(self._categories) + 1
            self.insert(
                "NVTX_EVENTS", start=0, eventType=33, text=name, globalTid=process(pid) | 1,
                domainId=self._domain(pid), category=self._categories[pid, name],
            )  # fmt: skip
        return self._categories[pid, name]

    def range(
        self,
        start: int,
        end: int | None,
        label: str,
        category: str | None = "module",
        pid: int = 7,
        tid: int = 1,
        payload: int | None = None,
        registered: bool = True,
        kind: int = 59,
        number: int | None = None,
    ) -> None:
        self.insert(
            "NVTX_EVENTS",
            start=start,
            end=end,
            eventType=kind,
            rangeId=number,
            globalTid=process(pid) | tid,
            domainId=self._domain(pid),
            category=self._category(pid, category),
            int64Value=payload,
            **({"textId": self.text(label)} if registered else {"text": label}),
        )

    def call(self, start: int, end: int, pid: int = 7, tid: int = 1, name: str = "cudaLaunchKernel_v7000") -> int:
        """An API call; returns its correlation id."""
        self._correlation += 1
        self.insert(
            "CUPTI_ACTIVITY_KIND_RUNTIME", start=start, end=end, globalTid=process(pid) | tid,
            correlationId=self._correlation, nameId=self.text(name),
        )  # fmt: skip
        return self._correlation

    def kernel(
        self,
        start: int,
        end: int,
        correlation: int,
        name: str = "kernel",
        pid: int = 7,
        device: int = 0,
        stream: int = 7,
        node: int | None = None,
    ) -> None:
        self.insert(
            "CUPTI_ACTIVITY_KIND_KERNEL", start=start, end=end, deviceId=device, streamId=stream,
            correlationId=correlation, globalPid=process(pid), demangledName=self.text(name), shortName=self.text(name),
            graphNodeId=node,
        )  # fmt: skip

    def copy(self, start: int, end: int, correlation: int, size: int, pid: int = 7, kind: int = 1) -> None:
        self.insert(
            "CUPTI_ACTIVITY_KIND_MEMCPY", start=start, end=end, deviceId=0, streamId=9, correlationId=correlation,
            globalPid=process(pid), bytes=size, copyKind=kind,
        )  # fmt: skip

    def graph_node(self, start: int, node: int, original: int | None = None, pid: int = 7, tid: int = 1) -> None:
        self.insert(
            "CUDA_GRAPH_NODE_EVENTS" if self.version == "2026_2" else "CUDA_GRAPH_EVENTS",
            start=start, end=start, eventClass=77, globalTid=process(pid) | tid,
            nameId=self.text("Graph Node Creation"), graphNodeId=node, originalGraphNodeId=original,
        )  # fmt: skip

    def graph_run(self, start: int, end: int, correlation: int, graph: int, pid: int = 7) -> None:
        self.database.execute(GRAPH_TRACE.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"))
        self.insert(
            "CUPTI_ACTIVITY_KIND_GRAPH_TRACE", start=start, end=end, deviceId=0, streamId=7, correlationId=correlation,
            globalPid=process(pid), graphId=graph,
        )  # fmt: skip

    def memory(self, start: int, correlation: int, size: int, pid: int = 7, kind: int = 2) -> None:
        """An allocation; of a size below zero: a release."""
        self.database.execute(MEMORY.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"))
        self.insert(
            "CUDA_GPU_MEMORY_USAGE_EVENTS", start=start, globalPid=process(pid), bytes=abs(size), memKind=kind,
            memoryOperationType=int(size < 0), correlationId=correlation,
        )  # fmt: skip

    def close(self) -> Path:
        self.database.commit()
        self.database.close()
        return self.path
