"""A comparison as a table, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .diff import CHANGE, NOISE, Change, Comparison
from .units import middle, readable_ns

__all__ = ["diff_csv", "diff_json", "diff_text"]

COLUMNS = ("name", "a_ns", "b_ns", "delta_ns", "relative", "total_a_ns", "total_b_ns", "count_a", "count_b", "verdict")


def diff_text(found: Comparison, width: int | None = None, limit: int | None = None, color: bool = False) -> str:
    """The table, as wide as the terminal unless told."""
    columns = width or shutil.get_terminal_size((120, 24)).columns
    out = io.StringIO()
    console = Console(
        file=out, width=columns, force_terminal=color, color_system="standard" if color else None, highlight=False
    )
    shown = found.rows if limit is None else found.rows[:limit]
    if not shown:
        console.print(Text("no modules to compare", style="yellow"))
    else:
        lines = [_line(row) for row in shown]
        titles = (f"A {found.measure}", f"B {found.measure}", "change", "relative", "verdict")
        widths = [max(len(title), *(len(line[i]) for line in lines)) + 2 for i, title in enumerate(titles)]
        names = max(12, columns - sum(widths) - 1)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("range", no_wrap=True, overflow="crop", max_width=names)
        for title in titles:
            table.add_column(title, justify="left" if title == "verdict" else "right", no_wrap=True)
        for row, line in zip(shown, lines, strict=True):
            table.add_row(Text(middle(row.name, names)), *line[:-1], Text(line[-1], style=_style(row)))
        console.print(table)
        console.print(Text("times are medians per step (per request or capture outside of steps)", style="dim"))
    if limit is not None and len(found.rows) > limit:
        console.print(Text(f"... and {len(found.rows) - limit:,} more rows", style="dim"))
    for note in found.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    return out.getvalue()


def _line(row: Change) -> tuple[str, ...]:
    sign = "+" if row.delta > 0 else ""
    return (
        "-" if row.a is None else readable_ns(row.a),
        "-" if row.b is None else readable_ns(row.b),
        f"{sign}{readable_ns(row.delta)}",
        "" if row.relative is None else f"{row.relative * 100:+.1f}%",
        row.verdict,
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
        "notes": found.notes,
        "rows": rows,
    }
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def diff_csv(found: Comparison) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for row in found.rows:
        relative = "" if row.relative is None else f"{row.relative:.6f}"
        one, two = ("" if row.a is None else row.a), ("" if row.b is None else row.b)
        writer.writerow(
            (row.name, one, two, row.delta, relative, row.total_a, row.total_b, row.count_a, row.count_b, row.verdict)
        )
    return out.getvalue()
