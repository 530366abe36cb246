"""Two captures compared module by module, with noise told apart from change where there are repetitions; and
that as a table, Markdown, JSON, CSV, or a page.
"""

from __future__ import annotations

import csv
import io
import math
import re
import shutil
from dataclasses import asdict, dataclass
from statistics import median

from ..categories import REQUEST, RESIDENCY, STAGE, STEP
from ..output import csv_cell, json_text, printable
from .labels import category_of, fold, fused_owners, is_module
from .render import GAP, Column, Line, middle, painted, readable_ns, table, wrapped
from .render.data import filled
from .report import Report
from .selection import split_fused
from .tree import Calls, Node, merged, spread_of, total

__all__ = [
    "Change",
    "Comparison",
    "Unit",
    "diff",
    "diff_csv",
    "diff_html",
    "diff_json",
    "diff_markdown",
    "diff_text",
    "verdict",
]


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
    moved: tuple[str, ...] = ()  # fused kernels on one side only that do work of this module

    @property
    def delta(self) -> int:
        return (self.b or 0) - (self.a or 0)

    @property
    def relative(self) -> float | None:
        return self.delta / self.a if self.a and self.b is not None else None


@dataclass
class Unit:
    """All requests (steps, components) of both sides. `a`, `b`: ns of a typical one, the median where it is known."""

    kind: str
    a: int
    b: int
    count_a: int
    count_b: int

    @property
    def slower(self) -> float:
        """By which part B is slower than A; below zero: faster."""
        return self.b / self.a - 1.0 if self.a else 0.0

    def __str__(self) -> str:
        if min(self.a, self.b) <= 0 or abs(self.slower) < 0.005:
            change = "as fast"
        else:
            ratio = max(self.a, self.b) / min(self.a, self.b)
            change = f"{ratio:.2f}x {'slower' if self.b > self.a else 'faster'}"
        few = ", too few to be sure" if min(self.count_a, self.count_b) < FEWEST else ""
        times = f"{readable_ns(self.a)} -> {readable_ns(self.b)}"
        return f"{self.kind}s {change} ({times}; {self.count_a:,} and {self.count_b:,} of them{few})"


@dataclass
class Comparison:
    """measure: "gpu" where both sides recorded device work, else "cpu" (and `notes` says so). units: what the headline
    tells of."""

    measure: str
    rows: list[Change]
    notes: list[str]
    units: list[Unit]

    @property
    def headline(self) -> str:
        return "; ".join(map(str, self.units))


def diff(a: Report, b: Report, depth: int | None = None, split: bool = False, by: str = "module") -> Comparison:
    """Compare by module path (by="kernel": by the names of device operations); biggest change first, what is on one
    side only after what is on both.

    Requests, stages, steps and residency work are compared as well: offloading shows there. depth: only names with at
    most so many dotted parts. split: fused kernels are shared out over their modules (an estimate); otherwise a module
    whose work went into fused kernels, as compiling does, says which (`Change.moved`).
    """
    measure = "gpu" if a.has_gpu and b.has_gpu else "cpu"
    notes = []
    if a.has_gpu != b.has_gpu:
        notes.append(f"only {'A' if a.has_gpu else 'B'} recorded device work, so CPU time is compared")
    kernels = by == "kernel"
    one, two = _samples(a, measure, depth, split, kernels), _samples(b, measure, depth, split, kernels)
    if not one or not two:
        notes.append(f"{'A' if not one else 'B'} holds no {'work of a device' if kernels else 'module ranges'}")
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
    _note_moves(rows, notes)
    for note in dict.fromkeys([*a.notes, *b.notes]):
        sides = " and ".join(side for side, report in (("A", a), ("B", b)) if note in report.notes)
        notes.append(f"{sides}: {note}")
    rows.sort(key=lambda row: (row.verdict in (ONLY_A, ONLY_B), row.verdict == NOISE, -abs(row.delta), row.name))
    return Comparison(measure, rows, notes, _units(a, b, measure))


def _units(a: Report, b: Report, measure: str) -> list[Unit]:
    """Requests and steps, as far as both sides have any; where neither is there, components."""
    found: list[Unit] = []
    for kind in ("request", "step", "component"):
        one, two = _typical(a, kind, measure), _typical(b, kind, measure)
        if one and two and not (kind == "component" and found):
            found.append(Unit(kind, one[0], two[0], one[1], two[1]))
    return found


def _typical(report: Report, kind: str, measure: str) -> tuple[int, int] | None:
    """The time of one request (step, component), and how many there were."""
    rows = [row for row in report.rows(kind) if row.kind == "range" and row.calls]
    count = sum(row.calls for row in rows)
    if not count:
        return None
    if (measure == "gpu") == report.has_gpu:
        calls: Calls = None
        for row in rows:
            calls = merged(calls, row.distribution)
        spread = spread_of(calls)
        if spread is not None and spread.count == count:
            return spread.middle, count
    return sum(row.gpu_self if measure == "gpu" else row.cpu for row in rows) // count, count


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


def _samples(
    report: Report, measure: str, depth: int | None, split: bool, kernels: bool = False
) -> dict[str, list[int]]:
    """Per module (or operation) its time in every repetition, in order of first appearance."""
    found: dict[str, dict[int, int]] = {}
    for part in report.parts:
        unit = id(part)
        root = part.tree.root
        if split:
            root = split_fused(root)
            total(root)
        inside: dict[str, int] = {}  # name -> how many of its ranges are around here
        # a range, the repetition it is in, and whether that is a step; a name whose range ends here
        todo: list[tuple[Node, int, bool] | str] = [(root, unit, False)]
        while todo:
            item = todo.pop()
            if isinstance(item, str):
                inside[item] -= 1
                continue
            node, unit, in_step = item
            kind = category_of(node.name)
            if not in_step and kind in (STEP, REQUEST):
                unit, in_step = id(node), kind == STEP
            if kernels:
                for operation, (_count, _duration, credit) in (node.ops or {}).items():
                    values = found.setdefault(operation, {})
                    values[unit] = values.get(unit, 0) + credit
                todo.extend((child, unit, in_step) for child in reversed(node.ordered()))
                continue
            name = _key(node)
            if name is not None:
                if not inside.get(name, 0) and (depth is None or name.count(".") < depth):
                    values = found.setdefault(name, {})
                    values[unit] = values.get(unit, 0) + (node.gpu if measure == "gpu" else node.cpu)
                inside[name] = inside.get(name, 0) + 1
                todo.append(name)
            todo.extend((child, unit, in_step) for child in reversed(node.ordered()))
    return {name: list(values.values()) for name, values in found.items()}


def _note_moves(rows: list[Change], notes: list[str]) -> None:
    """Tell of each module in which fused kernels, that only one side has, its work is found there."""
    kernels: dict[str, list[str]] = {}  # module -> names of rows
    gone = 0
    for row in rows:
        around, space, text = row.name.rpartition(" fused(")
        if not space or row.verdict not in (ONLY_A, ONLY_B):
            continue
        gone += abs(row.delta)
        for owner in fused_owners(f"fused({text}"):
            parts = (f"{around}.{owner}" if around else owner).split(".")
            for end in range(len(around.split(".")) + 1 if around else 1, len(parts) + 1):
                kernels.setdefault(".".join(parts[:end]), []).append(row.name)
            kernels.setdefault(owner, []).append(row.name)
    for row in rows:
        row.moved = tuple(dict.fromkeys(kernels.get(row.name, ())))
    moved = sum(1 for row in rows if row.moved)
    if moved:
        notes.append(
            f"work of {moved:,} modules is in fused kernels that only one side has ({readable_ns(gone)} a repetition):"
            " rows marked `fused` are not faster or slower by all of their change; --split-fused shares it out"
        )


def _key(node: Node) -> str | None:
    if node.parent is None:
        return None
    if fused_owners(node.name.text):
        return f"{node.parent.name.text} {node.name.text}".strip()
    if node.is_unknown() or category_of(node.name) in (STAGE, RESIDENCY):
        return node.name.text
    if category_of(node.name) in (REQUEST, STEP):
        return fold(node.name.text, category_of(node.name))
    return node.name.text.partition(" in=")[0] if is_module(node.name) else None


# ---------------------------------------------------------------------------------------------------------------------


_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~>])")
COLUMNS = (
    "name",
    "a_ns",
    "b_ns",
    "delta_ns",
    "relative",
    "total_a_ns",
    "total_b_ns",
    "count_a",
    "count_b",
    "verdict",
    "moved",
)


def diff_text(found: Comparison, width: int | None = None, limit: int | None = None, color: bool = False) -> str:
    """The table, as wide as the terminal, or as `width` says."""
    columns = width or shutil.get_terminal_size((120, 24)).columns
    shown = found.rows if limit is None else found.rows[:limit]
    if shown:
        cells = [_line(row) for row in shown]
        titles = (f"A {found.measure}", f"B {found.measure}", "change", "relative", "verdict")
        widths = [max(len(title), *(len(line[i]) for line in cells)) + GAP for i, title in enumerate(titles)]
        names = max(12, columns - sum(widths) - 1)
        lines = table(
            "range",
            names,
            [Column(title, right=title != "verdict") for title in titles],
            [
                Line(middle(printable(row.name), names), line, last_style=_style(row))
                for row, line in zip(shown, cells, strict=True)
            ],
            color,
        )
        lines.append(painted("times are medians per step (per request or capture outside of steps)", "dim", color))
    else:
        lines = [painted("no modules to compare", "yellow", color)]
    if limit is not None and len(found.rows) > limit:
        lines.append(painted(f"... and {len(found.rows) - limit:,} more rows", "dim", color))
    if found.units:
        lines.insert(0, wrapped(found.headline, columns, color, "bold"))
    lines.extend(wrapped(f"note: {note}", columns, color) for note in found.notes)
    return "\n".join(lines) + "\n"


def diff_markdown(found: Comparison, limit: int | None = None) -> str:
    """For a pull request: the headline, the changes as a table, the notes."""
    shown = found.rows if limit is None else found.rows[:limit]
    lines = [f"**{_markdown(found.headline)}**", ""] if found.units else []
    if shown:
        lines += [
            f"| range | A {found.measure} | B {found.measure} | change | relative | verdict |",
            "|---|--:|--:|--:|--:|---|",
        ]
        lines += [f"| {' | '.join(map(_markdown, (row.name, *_line(row))))} |" for row in shown]
    else:
        lines.append("no modules to compare")
    if len(found.rows) > len(shown):
        lines += ["", f"... and {len(found.rows) - len(shown):,} more rows"]
    lines += ["", *(f"- {_markdown(note)}" for note in found.notes)] if found.notes else []
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    """The text with nothing in it that Markdown or HTML would take for its own."""
    return _MARKUP.sub(r"\\\1", printable(text)).replace("&", "&amp;").replace("<", "&lt;")


def _line(row: Change) -> tuple[str, ...]:
    sign = "+" if row.delta > 0 else ""
    return (
        "-" if row.a is None else readable_ns(row.a),
        "-" if row.b is None else readable_ns(row.b),
        f"{sign}{readable_ns(row.delta)}",
        "" if row.relative is None else f"{row.relative * 100:+.1f}%",
        f"{row.verdict}, fused" if row.moved else row.verdict,
    )


def _style(row: Change) -> str:
    if row.verdict == CHANGE:
        return "red" if row.delta > 0 else "green"
    return "dim" if row.verdict == NOISE else "yellow"


def diff_json(found: Comparison) -> str:
    rows = [{**asdict(row), "delta": row.delta, "relative": row.relative} for row in found.rows]
    document = {
        "format": "fxnvtx-diff",
        "version": 1,
        "unit": "ns",
        "measure": found.measure,
        "headline": found.headline,
        "units": [{**asdict(unit), "slower": unit.slower} for unit in found.units],
        "notes": found.notes,
        "rows": rows,
    }
    return json_text(document, indent=1) + "\n"


def diff_csv(found: Comparison) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for row in found.rows:
        relative = "" if row.relative is None else f"{row.relative:.6f}"
        one, two = ("" if row.a is None else row.a), ("" if row.b is None else row.b)
        writer.writerow(
            (
                csv_cell(row.name),
                one,
                two,
                row.delta,
                relative,
                row.total_a,
                row.total_b,
                row.count_a,
                row.count_b,
                row.verdict,
                csv_cell("; ".join(row.moved)),
            )
        )
    return out.getvalue()


# -------------------------------------------------------------------------------------------------------------- a page


MOST_CHANGES = 2_000  # rows of a comparison's table


def diff_html(found: Comparison, a: Report, b: Report) -> str:
    """A comparison as a page: both trees, folded, side by side, and the changes as a table."""
    names: dict[str, int] = {}
    shown = found.rows[:MOST_CHANGES]
    data = {
        "version": 1,
        "measure": found.measure,
        "headline": found.headline,
        "notes": found.notes,
        "titles": [", ".join(side.sources) for side in (a, b)],
        "names": names,
        "sides": [_side(side.tree(fold=True), found.measure, names) for side in (a, b)],
        "rows": [
            [row.name, row.a, row.b, row.relative, f"{row.verdict}, fused" if row.moved else row.verdict]
            for row in shown
        ],
        "left": len(found.rows) - len(shown),
    }
    data["names"] = list(names)
    return filled("diff.html", [*a.sources, *b.sources], ("diff.js",), data)


def _side(root: Node, measure: str, names: dict[str, int]) -> dict[str, list[int]]:
    """A tree as arrays, the children of a range by name order of their first start; parents before children."""
    tree: dict[str, list[int]] = {"parent": [], "name": [], "value": [], "calls": []}
    todo: list[tuple[Node, int]] = [(root, 0)]
    while todo:
        node, parent = todo.pop()
        index = len(tree["parent"])
        tree["parent"].append(parent)
        tree["name"].append(names.setdefault(node.name.text, len(names)))
        tree["value"].append(node.gpu if measure == "gpu" else node.cpu)
        tree["calls"].append(node.calls)
        todo.extend((child, index) for child in reversed(node.ordered()))
    return tree
