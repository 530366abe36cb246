"""Two captures compared module by module, with noise told from change where there are repetitions (pure)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from .labels import fold, fused_owners, is_module
from .report import Report
from .tree import Node

__all__ = ["Change", "Comparison", "diff", "verdict"]

FEWEST = 3  # repetitions on each side below which nothing is said about noise
ERRORS = 4.0  # standard errors that a change must exceed
CHANGE, NOISE, UNSURE, ONLY_A, ONLY_B = "change", "noise", "too few repetitions", "only in A", "only in B"


@dataclass
class Change:
    """One module on both sides. `a`, `b`: median ns per repetition (None: not there), `total_a`, `total_b`: ns in all.

    A repetition is a step; for what runs outside of steps a request; else the whole capture.
    """

    name: str
    a: int | None
    b: int | None
    total_a: int
    total_b: int
    count_a: int
    count_b: int
    verdict: str

    @property
    def delta(self) -> int:
        return (self.b or 0) - (self.a or 0)

    @property
    def relative(self) -> float | None:
        return self.delta / self.a if self.a and self.b is not None else None


@dataclass
class Comparison:
    """measure: "gpu" where both sides recorded device work, else "cpu" (and `notes` says so)."""

    measure: str
    rows: list[Change]
    notes: list[str]


def diff(a: Report, b: Report, depth: int | None = None) -> Comparison:
    """Compare by module path; biggest change first, what is on one side only after what is on both.

    Requests, stages, steps and residency work are compared as well: offloading shows there. depth: only names with at
    most so many dotted parts.
    """
    measure = "gpu" if a.has_gpu and b.has_gpu else "cpu"
    notes = []
    if a.has_gpu != b.has_gpu:
        notes.append(f"only {'A' if a.has_gpu else 'B'} recorded device work, so CPU time is compared")
    one, two = _samples(a, measure, depth), _samples(b, measure, depth)
    if not one or not two:
        notes.append(f"{'A' if not one else 'B'} holds no module ranges")
    rows = []
    for name in [*one, *(name for name in two if name not in one)]:
        left, right = one.get(name), two.get(name)
        rows.append(
            Change(
                name,
                int(median(left)) if left else None,
                int(median(right)) if right else None,
                sum(left or ()),
                sum(right or ()),
                len(left or ()),
                len(right or ()),
                ONLY_B if not left else ONLY_A if not right else verdict(left, right),
            )
        )
    rows.sort(key=lambda row: (row.verdict in (ONLY_A, ONLY_B), row.verdict == NOISE, -abs(row.delta), row.name))
    return Comparison(measure, rows, notes)


def verdict(a: list[int], b: list[int]) -> str:
    """Whether two sets of repetitions differ by more than their own scatter explains.

    The medians are compared against their standard errors, estimated from the median absolute deviation, so that a
    slow first step does not count. What differs between two runs as a whole (clocks, temperature) cannot be seen from
    within them; reports of several runs each can show it.
    """
    if median(a) == median(b):
        return NOISE
    if len(a) < FEWEST or len(b) < FEWEST:
        return CHANGE if any(a) != any(b) else UNSURE
    distance = abs(median(a) - median(b))
    error = math.hypot(_error(a), _error(b))
    clock = 100  # ns; timestamps are no finer than that
    return CHANGE if distance > ERRORS * error + clock else NOISE


def _error(values: list[int]) -> float:
    middle = median(values)
    deviation = median(abs(value - middle) for value in values)
    return 1.2533 * 1.4826 * deviation / math.sqrt(len(values))


def _samples(report: Report, measure: str, depth: int | None) -> dict[str, list[int]]:
    """Per module its time in every repetition, in order of first appearance."""
    found: dict[str, dict[int, int]] = {}
    for part in report.parts:
        unit = id(part)
        todo: list[tuple[Node, int, frozenset[str]]] = [(part.tree.root, unit, frozenset())]
        while todo:
            node, unit, around = todo.pop()
            if node.name.category == "step" or (node.name.category == "request" and node.parent is not None):
                unit = id(node)
            name = _key(node)
            if name is not None and name not in around:
                around = around | {name}
                if depth is None or name.count(".") < depth:
                    values = found.setdefault(name, {})
                    values[unit] = values.get(unit, 0) + (node.gpu if measure == "gpu" else node.cpu)
            todo.extend((kid, unit, around) for kid in reversed(node.ordered()))
    return {name: list(values.values()) for name, values in found.items()}


def _key(node: Node) -> str | None:
    if node.parent is None:
        return None
    if fused_owners(node.name.text):
        return f"{node.parent.name.text} {node.name.text}".strip()
    if node.is_unknown() or node.name.category in ("stage", "residency"):
        return node.name.text
    if node.name.category in ("request", "step"):
        return fold(node.name.text, node.name.category)
    return node.name.text.partition(" in=")[0] if is_module(node.name) else None
