"""What kinds of ranges and of device work there are."""

from __future__ import annotations

__all__ = ["COPY", "GRAPH", "KERNEL", "PROCESS", "PUSH_POP", "SET", "START_END"]

KERNEL, COPY, SET, GRAPH = 0, 1, 2, 3
PUSH_POP, START_END = (59, 70), (60, 71)  # NVTX event types: with a text, and with a registered one of older exports
PROCESS = "~16777215"  # globalTid & this = globalPid: the low 24 bits are the thread
