"""What is for people to read: numbers, names and tables as text that fits, with colours; a report as such a table.

Here labels become text for people: what is not printable in them is shown as an escape. The time and size of a table
grow with what is printed, not with what was captured.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...output import cut, pad, printable, width_of
from ..rows import Row, significant
from ..selection import Options, Selection, Shown, selected

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Column",
    "Line",
    "middle",
    "painted",
    "readable_bytes",
    "readable_count",
    "readable_ns",
    "readable_share",
    "render_text",
    "shortened",
    "table",
]


# ---------------------------------------------------------------------------------------------------------------------


def readable_ns(value: float) -> str:
    """Nanoseconds with three or four significant digits and a unit."""
    size = abs(value)
    if size < 999.5:
        return f"{value:.0f} ns"
    # limits at which rounding would give 100.00 or 1000.0
    for divisor, unit in ((1e3, "us"), (1e6, "ms"), (1e9, "s")):
        if size < 999.95 * divisor or unit == "s":
            return f"{value / divisor:.2f} {unit}" if size < 99.995 * divisor else f"{value / divisor:.1f} {unit}"
    raise AssertionError("unreachable")


def readable_bytes(value: float) -> str:
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def readable_count(value: float) -> str:
    """A count with three significant digits and a decimal prefix: 1.50 T."""
    size = abs(value)
    if size < 999.5:
        return f"{value:.0f}"
    for divisor, unit in ((1e3, "K"), (1e6, "M"), (1e9, "G"), (1e12, "T"), (1e15, "P")):
        if size < 999.5 * divisor or unit == "P":
            digits = 2 if size < 9.995 * divisor else 1 if size < 99.95 * divisor else 0
            return f"{value / divisor:.{digits}f} {unit}"
    raise AssertionError("unreachable")


def readable_share(value: float) -> str:
    return f"{value * 100:.1f}%"


def shortened(text: str, above: str, width: int) -> str:
    """A range's name that fits: whole, or without what the range around it says already, or cut in its middle."""
    if len(text) > width and above and text.startswith(f"{above}."):
        text = "…" + text[len(above) :]
    return middle(text, width)


def middle(text: str, width: int) -> str:
    """The text cut in its middle, so that beginning and end stay readable."""
    if len(text) <= width:
        return text
    if width < 5:
        return text[: max(width, 1)]
    keep = width - 1
    head = keep // 3
    return text[:head] + "…" + text[len(text) - (keep - head) :]


# -------------------------------------------------------------------------------------------------------------- tables


GAP = 2
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


@dataclass(frozen=True)
class Column:
    """title: what stands above it. right: numbers stand at the right."""

    title: str
    right: bool = True


@dataclass(frozen=True)
class Line:
    """The first cell, cut to its column, and the others; styles are those of `painted`."""

    name: str
    cells: tuple[str, ...]
    style: str = ""
    last_style: str = ""


def painted(text: str, style: str, color: bool) -> str:
    """Printable text in a style (bold, dim, red, green, yellow, cyan), plain without `color`."""
    text = printable(text)
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if color and style else text


def table(name: str, names: int, columns: Sequence[Column], lines: Sequence[Line], color: bool) -> list[str]:
    """The lines of a table whose first column, called `name`, is at most `names` columns wide."""
    shown = [cut(printable(line.name), names) for line in lines]
    first = max([min(width_of(name), names), *map(width_of, shown)])
    widths = [
        max([width_of(column.title), *(width_of(line.cells[index]) for line in lines)])
        for index, column in enumerate(columns)
    ]
    head = [pad(cut(name, names), first)]
    head += [pad(column.title, width, column.right) for column, width in zip(columns, widths, strict=True)]
    space = " " * GAP
    found = [painted(space.join(head).rstrip(), "bold", color)]
    last = len(columns) - 1
    for text, line in zip(shown, lines, strict=True):
        cells = [painted(pad(text, first), line.style, color)]
        for index, column in enumerate(columns):
            cell = pad(line.cells[index], widths[index], column.right)
            cells.append(painted(cell, line.last_style, color) if index == last else cell)
        found.append(space.join(cells).rstrip())
    return found


# ---------------------------------------------------------------------------------------------------------------------


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
