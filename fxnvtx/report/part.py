"""What one process contributed to a report."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..work import Entry
from .labels import Name
from .peaks import Gpu
from .tree import Tree

__all__ = ["Part", "Timeline"]


@dataclass
class Timeline:
    """Every range of one step, and what was launched in it. spans: thread, level, start, end, name. work: device,
    stream, start, end, name. Times in ns from the step's start. cut: whether there were more."""

    title: str
    length: int
    spans: list[tuple[int, int, int, int, Name]]
    work: list[tuple[int, int, int, int, str]]
    cut: bool = False


@dataclass
class Part:
    """One process of one capture. `side` holds start/end ranges, which no total counts."""

    source: str
    pid: int
    rank: int | None = None
    index: int = 0
    tree: Tree = field(default_factory=Tree)
    side: Tree = field(default_factory=Tree)
    notes: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    classes: dict[str, str] = field(default_factory=dict)  # label -> class of the module
    has_gpu: bool = False
    device_calls: bool = False  # whether the distributions over calls are of device time
    timeline: Timeline | None = None
    has_memory: bool = False  # whether allocations on the device were recorded
    operations: int = 0
    work: list[Entry] = field(default_factory=list)  # what ranges stand for
    gpus: list[Gpu] = field(default_factory=list)
    # the longest times the device was idle: length, end, the range around both launches, what ended it
    gaps: list[tuple[int, int, str, str]] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"rank {self.rank}" if self.rank is not None else f"process {self.pid}"
