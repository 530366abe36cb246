"""What all that is for people is written with: numbers, names and tables as text, columns that fit, colours (pure).

Here labels become text for people: what is not printable in them is shown as an escape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...output import cut, pad, printable, width_of

__all__ = [
    "Column",
    "Line",
    "middle",
    "painted",
    "readable_bytes",
    "readable_count",
    "readable_ns",
    "readable_share",
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
