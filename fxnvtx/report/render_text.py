"""A report as a table on the terminal."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .report import Report
from .units import readable_bytes, readable_ns, readable_share, shortened
from .views import Row

__all__ = ["render_text", "table_of"]

Cell = Callable[[Row], str]
LEAST_NAME, NAME_SHARE = 24, 0.38  # columns give way to names up to this part of the width


def render_text(
    report: Report,
    by: str = "tree",
    depth: int | None = None,
    width: int | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    fold: bool = False,
    kernels: bool = False,
    split_fused: bool = False,
    color: bool = False,
    limit: int | None = None,
) -> str:
    """The table as text that fits `width` characters (default: the terminal). limit: at most so many rows, the
    number of rows left out is said."""
    rows = report.rows(by, depth, include, exclude, fold, kernels, split_fused)
    columns = width or shutil.get_terminal_size((120, 24)).columns
    out = io.StringIO()
    console = Console(
        file=out,
        width=columns,
        force_jupyter=False,
        force_terminal=color,
        color_system="standard" if color else None,
        highlight=False,
    )
    if rows:
        console.print(table_of(report, rows, by, columns, limit))
    else:
        console.print(Text("no ranges to show", style="yellow"))
    if limit is not None and len(rows) > limit:
        console.print(Text(f"... and {len(rows) - limit:,} more rows", style="dim"))
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    return out.getvalue()


def table_of(report: Report, rows: list[Row], by: str, width: int, limit: int | None = None) -> Table:
    """A rich table of these rows."""
    shown = rows if limit is None else rows[:limit]
    columns = _columns(report, shown, by)
    texts = [[cell(row) for _title, cell in columns] for row in shown]
    widths = [max([len(title), *(len(line[i]) for line in texts)]) for i, (title, _cell) in enumerate(columns)]
    # the least important columns go first where the terminal is narrow; the name keeps what is left
    order = sorted(range(len(columns)), key=lambda i: _PRIORITY.index(columns[i][0]))
    chosen: list[int] = []
    longest = max([len(row.name) + (2 * row.depth if by == "tree" else 0) for row in shown], default=0)
    room = width - max(LEAST_NAME, min(longest, int(width * NAME_SHARE)))
    for index in order:
        if widths[index] + 2 <= room:
            chosen.append(index)
            room -= widths[index] + 2
    chosen.sort()
    names = width - sum(widths[i] + 2 for i in chosen) - 1
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    table.add_column(by if by != "tree" else "range", no_wrap=True, overflow="crop", max_width=names)
    for index in chosen:
        table.add_column(columns[index][0], justify="right", no_wrap=True)
    for row, line in zip(shown, texts, strict=True):
        indent = "  " * row.depth if by == "tree" else ""
        if len(indent) > names // 2:
            indent = " " * (names // 2 - 3) + f"{row.depth}: "
        above = row.path[-2] if by == "tree" and len(row.path) > 1 else ""
        label = Text(indent + shortened(row.name, above, max(8, names - len(indent))), style=_STYLE.get(row.kind, ""))
        table.add_row(label, *(line[i] for i in chosen))
    return table


_STYLE = {"unknown": "yellow", "kernel": "dim", "summary": "bold", "side": "cyan"}
# from the one to keep longest
_PRIORITY = (
    "total",
    "calls",
    "gpu",
    "self",
    "share",
    "gpu self",
    "kernels",
    "skew",
    "median",
    "max",
    "min",
    "gap",
    "hidden",
    "bytes",
    "sum",
)


def _columns(report: Report, rows: list[Row], by: str) -> list[tuple[str, Cell]]:
    """Columns that say something about these rows."""
    columns: list[tuple[str, Cell]] = [("calls", lambda row: f"{row.calls:,}" if row.calls else "-")]
    if by != "kernel":
        columns.append(("total", lambda row: readable_ns(row.cpu) if row.calls else "-"))
        columns.append(("self", lambda row: readable_ns(row.cpu_self) if row.calls else "-"))
    if report.has_gpu:
        columns.append(("gpu", lambda row: _estimated(row, row.gpu)))
        if by == "kernel":
            columns.append(("sum", lambda row: readable_ns(row.gpu_sum)))
        else:
            columns.append(("gpu self", lambda row: _estimated(row, row.gpu_self)))
            columns.append(("kernels", lambda row: f"{row.kernels + row.copies:,}"))
            columns.append(("gap", lambda row: readable_ns(row.gap)))
    if any(row.each for row in rows):
        columns.append(("min", lambda row: readable_ns(row.each.low) if row.each else ""))
        columns.append(("median", lambda row: readable_ns(row.each.middle) if row.each else ""))
        columns.append(("max", lambda row: readable_ns(row.each.high) if row.each else ""))
    if any(row.resident for row in rows):
        columns.append(("hidden", lambda row: readable_share(row.overlap / row.resident) if row.resident else ""))
        columns.append(("bytes", lambda row: readable_bytes(row.payload) if row.payload else ""))
    if any(row.skew is not None for row in rows):
        columns.append(("skew", lambda row: readable_share(row.skew) if row.skew is not None else ""))
    columns.append(("share", lambda row: readable_share(row.share) if row.kind != "side" else ""))
    return columns


def _estimated(row: Row, value: int) -> str:
    return ("~" if row.estimate and value else "") + readable_ns(value)
