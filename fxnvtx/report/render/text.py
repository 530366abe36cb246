"""A report as a table on the terminal. Its time and size grow with what is printed, not with what was captured."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...output import printable, width_of
from ..rows import Row, significant
from ..selection import Options, Selection, Shown, selected
from . import GAP, Column, Line, painted, readable_bytes, readable_count, readable_ns, readable_share, shortened, table

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["render_text"]


Cell = Callable[[Row], str]
LEAST_NAME, NAME_SHARE = 24, 0.38  # columns give way to names up to this part of the width


def render_text(
    report: Shown,
    by: str | Selection = "tree",
    depth: int | None = None,
    width: int | None = None,
    *,
    color: bool = False,
    limit: int | None = None,
    everything: bool = False,
    **options: Unpack[Options],
) -> str:
    """The table as text that fits `width` characters (default: the terminal). by, depth, options: as `Report.rows` has
    them; or all of it as a Selection. limit: at most so many rows. everything: small rows, too (see
    `rows.significant`). What is left out is said, with its time."""
    chosen = selected(by, depth, options)
    rows, left = report.select(chosen), None
    if not everything:
        rows, left = significant(rows, chosen.by, chosen.sort, report.has_gpu)
    columns = width_of_terminal(width)
    shown = rows if limit is None else rows[:limit]
    lines = _table(report, shown, chosen, columns, color) if rows else [painted("no ranges to show", "yellow", color)]
    if len(rows) > len(shown):
        lines.append(painted(f"... and {len(rows) - len(shown):,} more rows", "dim", color))
    if left is not None:
        most = f"{100 * left.under:.2g}%" if left.under else "0%"
        said = (
            f"... left out: {left.rows:,} rows of at most {most} each, {readable_ns(left.ns)} together"
            f" ({readable_share(left.share)}): --all shows them"
        )
        lines.append(wrapped(said, columns, color, "dim"))
    lines.extend(wrapped(f"note: {note}", columns, color) for note in report.notes)
    return "\n".join(lines) + "\n"


def width_of_terminal(given: int | None) -> int:
    return given or shutil.get_terminal_size((120, 24)).columns


def wrapped(note: str, width: int, color: bool, style: str = "yellow") -> str:
    """A sentence broken at its spaces into lines that fit."""
    lines, line = [], ""
    for word in printable(note).split(" "):
        longer = f"{line} {word}" if line else word
        if line and width_of(longer) > width:
            lines.append(line)
            longer = word
        while width_of(longer) > width:
            lines.append(longer[:width])
            longer = longer[width:]
        line = longer
    return "\n".join(painted(each, style, color) for each in [*lines, line])


def _table(report: Shown, rows: list[Row], chosen: Selection, width: int, color: bool) -> list[str]:
    by, sort = chosen.by, chosen.sort
    columns = _columns(report, rows, by)
    texts = [[cell(row) for row in rows] for _title, cell in columns]
    widths = [max(len(title), *map(len, cells)) for (title, _cell), cells in zip(columns, texts, strict=True)]
    # the least important columns go first where the terminal is narrow; the name keeps what is left
    # what rows are sorted by is worth its width
    first = None if sort is None else sort.replace("-", " ")
    order = sorted(range(len(columns)), key=lambda i: (columns[i][0] != first, _PRIORITY.index(columns[i][0])))
    kept: list[int] = []
    tree = by == "tree"
    longest = max(len(row.name) + (2 * row.depth if tree else 0) for row in rows)
    room = width - max(LEAST_NAME, min(longest, int(width * NAME_SHARE)))
    for index in order:
        if widths[index] + GAP <= room:
            kept.append(index)
            room -= widths[index] + GAP
    kept.sort()
    names = width - sum(widths[i] + GAP for i in kept) - 1
    lines = []
    for place, row in enumerate(rows):
        indent, above = "", ""
        if tree:
            # a tree deeper than the terminal is wide shows its depth as a number
            indent = "  " * row.depth if 2 * row.depth <= names // 2 else f"{row.depth}: ".rjust(names // 2)
            above = row.above.name if row.above is not None else ""
        name = indent + shortened(printable(row.name), printable(above), max(8, names - len(indent)))
        lines.append(Line(name, tuple(texts[i][place] for i in kept), _STYLE.get(row.kind, "")))
    titles = [Column(columns[i][0]) for i in kept]
    return table(by if not tree else "range", names, titles, lines, color)


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
    "p99",
    "min",
    "gap",
    "headroom",
    "roof",
    "bound",
    "TFLOP/s",
    "GB/s",
    "flops",
    "moved",
    "hidden",
    "bytes",
    "exposed",
    "wait",
    "memory",
    "queue",
    "sum",
)


def _columns(report: Shown, rows: list[Row], by: str) -> list[tuple[str, Cell]]:
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
    if any(row.distribution is not None and type(row.distribution) is not int for row in rows):
        columns.append(("min", lambda row: readable_ns(row.each.low) if row.each else ""))
        columns.append(("median", lambda row: readable_ns(row.each.middle) if row.each else ""))
        columns.append(("p99", lambda row: readable_ns(row.each.most) if row.each and row.each.count > 9 else ""))
        columns.append(("max", lambda row: readable_ns(row.each.high) if row.each else ""))
    if any(row.resident for row in rows):
        columns.append(("hidden", lambda row: readable_share(row.overlap / row.resident) if row.resident else ""))
        columns.append(("bytes", lambda row: readable_bytes(row.payload) if row.payload else ""))
    if any(row.communication for row in rows):
        columns.append(("exposed", lambda row: readable_ns(row.exposed) if row.communication else ""))
    if any(row.waited for row in rows):
        columns.append(("wait", lambda row: readable_ns(row.waited) if row.waited else ""))
    if any(row.launches and row.queued for row in rows):
        columns.append(("queue", lambda row: readable_ns(row.queued / row.launches) if row.launches else ""))
    if any(row.peak is not None for row in rows):
        columns.append(("memory", lambda row: readable_bytes(row.peak) if row.peak is not None else ""))
    columns.extend(_work_columns(rows))
    if any(row.skew is not None for row in rows):
        columns.append(("skew", lambda row: readable_share(row.skew) if row.skew is not None else ""))
    columns.append(("share", lambda row: readable_share(row.share) if row.kind != "side" else ""))
    return columns


def _work_columns(rows: list[Row]) -> list[tuple[str, Cell]]:
    """What is known of the rows' work; what hangs on peaks only where there are any."""
    if not any(row.measured for row in rows):
        return []
    columns: list[tuple[str, Cell]] = [
        ("flops", lambda row: _worked(row, row.flops or row.moved or None, lambda _: readable_count(row.flops))),
        ("moved", lambda row: _worked(row, row.flops or row.moved or None, lambda _: readable_bytes(row.moved))),
    ]
    if any(row.rated for row in rows):
        columns.append(("TFLOP/s", lambda row: _worked(row, row.tflops, lambda rate: f"{rate:.3g}")))
        columns.append(("GB/s", lambda row: _worked(row, row.gbs, lambda rate: f"{rate:.3g}")))
    if any(row.roof for row in rows):
        columns.append(("roof", lambda row: _worked(row, row.roof_share, readable_share) + "!" * row.suspect))
        columns.append(("bound", lambda row: row.bound or ""))
        columns.append(("headroom", lambda row: _worked(row, row.headroom, readable_ns)))
    return columns


def _worked(row: Row, value: float | None, shown: Callable[[float], str]) -> str:
    """A figure made of a row's work: `?` where the work is not known, `+?` behind it where that of a part is not."""
    if not row.rated and row.unrated:
        return "?"
    if value is None:
        return ""
    return shown(value) + ("+?" if row.unrated else "")


def _estimated(row: Row, value: int) -> str:
    return ("~" if row.estimate and value else "") + readable_ns(value)
