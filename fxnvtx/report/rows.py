"""One line of a view; lines in the order that was asked for, and those worth a look (pure)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import ConfigError
from .tree import Calls, Spread, spread_of

__all__ = ["FLAT", "ORDERS", "Left", "Row", "Spread", "check_paths", "ordered", "significant"]


FLAT = frozenset({"request", "stage", "step", "component"})  # no row lies inside another one


MOST_TEXT = 64 << 20  # characters of all paths together that a format with paths in every row writes


@dataclass
class Row:
    """One line of a view. Times in ns, see tree.Node for their definitions.

    kind: "range", "kernel" (device operations of one name), "unknown" (not attributable; `name` holds the reason),
    "outside" (what no other row of the view counts), "summary" or "side". above: in the tree, the row of the enclosing
    range. each: of single calls, GPU time (CPU time in captures without device work).
    flops, moved, rated, unrated, roof: see Node, here of all that is inside, and the properties made of them.
    weight: the larger one of its parts of the whole device time and of the whole CPU time, for judging its importance.
    ranks: the same measure per process; skew: (highest - lowest) / highest of those. estimate: shares, not measured.
    """

    name: str
    depth: int
    kind: str
    category: str
    above: Row | None = field(default=None, compare=False, repr=False)
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
    queued: int = 0
    launching: int = 0
    waited: int = 0
    communication: int = 0
    communication_hidden: int = 0
    copying: int = 0
    copying_hidden: int = 0
    allocated: int = 0
    released: int = 0
    peak: int | None = None
    open: int = 0
    flops: int = 0
    moved: int = 0
    roof: int = 0
    roof_compute: int = 0
    rated: int = 0
    unrated: int = 0
    roofless: int = 0
    share: float = 0.0
    part: float = field(default=0.0, repr=False)  # the same, adding up over all rows (in the tree over siblings)
    weight: float = field(default=0.0, repr=False)
    distribution: Calls = field(default=None, repr=False)
    shared: int = field(default=0, repr=False)  # of gpu: what counts for other rows' operations, too
    twice: int = field(default=0, repr=False)  # of the measure: ranges inside others of the same row
    gpu_each: bool = False  # whether the distribution is one of GPU time
    ranks: dict[str, int] = field(default_factory=dict)
    fused: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def path(self) -> tuple[str, ...]:
        """The names from the outermost range to this one. Made anew: a deep tree's paths together are much text."""
        names = [self.name]
        row = self.above
        while row is not None:
            names.append(row.name)
            row = row.above
        return tuple(reversed(names))

    @property
    def exposed(self) -> int:
        """Communication that no other kernel hides."""
        return self.communication - self.communication_hidden

    @property
    def each(self) -> Spread | None:
        """Of two or more calls."""
        if self.distribution is None or type(self.distribution) is int:
            return None
        if self.gpu_each:
            return spread_of(self.distribution)
        return spread_of(self.distribution, self.cpu_min, self.cpu_max)

    @property
    def skew(self) -> float | None:
        if len(self.ranks) < 2:
            return None
        high = max(self.ranks.values())
        return (high - min(self.ranks.values())) / high if high else 0.0

    @property
    def measured(self) -> bool:
        """Whether the work of any of the row's time is known."""
        return self.rated > 0 or self.flops > 0 or self.moved > 0

    @property
    def tflops(self) -> float | None:
        """10^12 operations a second, in the time whose work is known."""
        return self.flops / self.rated / 1000 if self.rated else None

    @property
    def gbs(self) -> float | None:
        """10^9 bytes a second, in the time whose work is known."""
        return self.moved / self.rated if self.rated else None

    @property
    def roof_share(self) -> float | None:
        """How near the work comes to its roof: 1 is as fast as the device can. None where a peak is not known."""
        return self.roof / self.rated if self.rated and self.roof and not self.roofless else None

    @property
    def headroom(self) -> int | None:
        """Time now minus time at the roof, of what is known."""
        return self.rated - self.roof if self.rated and not self.roofless else None

    @property
    def bound(self) -> str | None:
        """launch: the device waits for launches longer than it works. Else what makes the roof: compute or memory."""
        if self.roof_share is None:
            return None
        if self.gap > self.gpu > 0:
            return "launch"
        return "compute" if 2 * self.roof_compute > self.roof else "memory"

    @property
    def suspect(self) -> bool:
        """Faster than the device can be: a wrong peak, wrong work, or data that came out of a cache."""
        return not self.roofless and self.roof > self.rated > 0

    @property
    def estimate(self) -> bool:
        return "estimate" in self.flags


def check_paths(rows: list[Row]) -> None:
    """Raise ConfigError where the paths of all rows together are more text than anybody could use."""
    lengths: dict[int, int] = {}
    total = 0
    for row in rows:
        length = lengths.get(id(row.above), 0) + len(row.name) + 1
        lengths[id(row)] = length
        total += length
    if total > MOST_TEXT:
        deep = max(row.depth for row in rows) + 1
        raise ConfigError(
            f"{len(rows):,} rows up to {deep:,} levels deep have {total >> 20:,} MiB of paths: use --depth or text"
        )


ORDERS: dict[str, Callable[[Row], int]] = {
    "calls": lambda row: row.calls,
    "total": lambda row: row.cpu,
    "self": lambda row: row.cpu_self,
    "gpu": lambda row: row.gpu,
    "gpu-self": lambda row: row.gpu_self,
    "kernels": lambda row: row.kernels + row.copies,
    "gap": lambda row: row.gap,
    "exposed": lambda row: row.exposed,
    "wait": lambda row: row.waited,
    "queue": lambda row: row.queued // row.launches if row.launches else 0,
    "memory": lambda row: row.peak or 0,
    "median": lambda row: row.each.middle if row.each is not None else row.gpu or row.cpu,
    "flops": lambda row: row.flops,
    "headroom": lambda row: row.headroom or 0,
    "max": lambda row: row.each.high if row.each is not None else row.gpu or row.cpu,
}


def ordered(rows: list[Row], by: str | None) -> list[Row]:
    """Largest first; in a tree the siblings of each row. What cannot be attributed, and sums, stay last."""
    if by is None:
        return rows
    measure = ORDERS[by]
    below: dict[int | None, list[Row]] = {}
    shown = {id(row) for row in rows}
    for row in rows:
        above = row.above
        below.setdefault(id(above) if above is not None and id(above) in shown else None, []).append(row)
    for siblings in below.values():
        siblings.sort(key=lambda row: (row.kind in ("unknown", "outside", "summary", "side"), -measure(row)))
    found: list[Row] = []
    todo = list(reversed(below.get(None, [])))
    while todo:
        row = todo.pop()
        found.append(row)
        todo.extend(reversed(below.get(id(row), [])))
    return found


# A row is worth a look from the first part of the whole on, or where it is one of the first number of largest rows;
# of rows that would fill more than a screen, from the second part on.
_FEW, _SMALL = 20, 0.01
_SCREEN, _LARGE = 40, 0.05


@dataclass(frozen=True)
class Left:
    """What `significant` left out: how many rows, each below `under` of the whole; their time in ns (of the device
    where the capture has any) and its part of the whole, nothing twice."""

    rows: int
    under: float
    ns: int
    share: float


def significant(rows: list[Row], by: str, sort: str | None, gpu: bool) -> tuple[list[Row], Left | None]:
    """The rows worth a look with the ones around them, in the same order, and what was left out.

    Sums, what is outside of all rows, and what cannot be attributed to any range stay. sort: an order of ORDERS whose
    largest rows stay, too.
    """
    measure = ORDERS[sort] if sort is not None else _weight
    first = {id(row) for row in sorted(rows, key=measure, reverse=True)[:_FEW]}
    screen = {id(row) for row in sorted(rows, key=_weight, reverse=True)[:_SCREEN]}
    kept: set[int] = set()
    for row in rows:
        least = _SMALL if id(row) in screen else _LARGE
        if (
            row.weight >= least
            or id(row) in first
            or row.kind in ("summary", "outside")
            or (row.kind == "unknown" and row.above is None)
        ):
            above: Row | None = row
            while above is not None and id(above) not in kept:
                kept.add(id(above))
                above = above.above
    left = [row for row in rows if id(row) not in kept]
    if len(left) < 2:  # the line that says so would take as much room
        return rows, None
    ns, part = 0, 0.0
    for row in left:
        if row.kind == "side":
            continue
        if by != "tree":
            ns += row.gpu_self if gpu else row.cpu_self
        elif row.above is None or id(row.above) in kept:
            ns += row.gpu - row.shared if gpu else row.cpu
        else:
            continue
        part += row.part
    shown = [row for row in rows if id(row) in kept]
    return shown, Left(len(left), max(row.weight for row in left), ns, part)


def _weight(row: Row) -> float:
    return row.weight
