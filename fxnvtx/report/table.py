"""A table as lines of text: columns that fit, names that stay readable, colours where they are wanted (pure).

The one place where labels become text for people: what is not printable in them is shown as an escape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..printable import cut, pad, printable, width_of

__all__ = ["Column", "Line", "painted", "table"]

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
