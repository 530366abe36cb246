"""One line of a view, and what a view may be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from ..errors import ConfigError

__all__ = ["VIEWS", "Row", "Selection", "Spread"]

VIEWS = ("tree", "request", "stage", "step", "component", "module", "class", "kernel", "range")


@dataclass(frozen=True)
class Selection:
    by: str = "tree"
    depth: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    fold: bool = False
    kernels: bool = False
    split_fused: bool = False

    def __post_init__(self) -> None:
        if self.by not in VIEWS:
            raise ConfigError(f"there is no view by {self.by!r}: choose one of {', '.join(VIEWS)}")
        if self.depth is not None and self.depth < 1:
            raise ConfigError(f"depth is {self.depth}: it counts levels, so 1 or more")


@dataclass
class Spread:
    """Minimum, median and maximum over repetitions (steps, requests, folded blocks), in ns."""

    count: int
    low: int
    middle: int
    high: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        return cls(len(values), min(values), int(median(values)), max(values))


@dataclass
class Row:
    """One line of a view. Times in ns, see tree.Node for their definitions.

    kind: "range", "kernel" (device operations of one name) or "unknown" (not attributable; `name` holds the reason).
    each: spread of GPU time (CPU time in captures without device work) over what was put together in this row.
    ranks: the same measure per process; skew: (highest - lowest) / highest of those. estimate: shares, not measured.
    """

    name: str
    path: tuple[str, ...]
    depth: int
    kind: str
    category: str
    calls: int = 0
    cpu: int = 0
    cpu_self: int = 0
    cpu_min: int | None = None
    cpu_max: int | None = None
    gpu: int = 0
    gpu_self: int = 0
    gpu_sum: int = 0
    kernels: int = 0
    copies: int = 0
    copied_bytes: int = 0
    launches: int = 0
    gap: int = 0
    proj: int = 0
    proj_calls: int = 0
    resident: int = 0
    overlap: int = 0
    payload: int = 0
    open: int = 0
    share: float = 0.0
    each: Spread | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    fused: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def skew(self) -> float | None:
        if len(self.ranks) < 2:
            return None
        high = max(self.ranks.values())
        return (high - min(self.ranks.values())) / high if high else 0.0

    @property
    def estimate(self) -> bool:
        return "estimate" in self.flags
