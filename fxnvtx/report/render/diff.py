"""A comparison as a table, Markdown, JSON, CSV, or a page."""

from __future__ import annotations

import csv
import io
import re
import shutil
from dataclasses import asdict

from ...output import csv_cell, json_text, printable
from ..diff import CHANGE, NOISE, Change, Comparison
from ..report import Report
from ..tree import Node
from . import GAP, Column, Line, middle, painted, readable_ns, table
from .html import filled
from .text import wrapped

__all__ = ["diff_csv", "diff_html", "diff_json", "diff_markdown", "diff_text"]


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
