"""Text made safe for where it goes: a terminal, a spreadsheet, a JSON file (pure).

Labels and file names are other programs' text. Escape sequences in them would move the cursor or set the title,
bidirectional marks would turn lines around, a line end would begin a row of its own.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

__all__ = ["csv_cell", "cut", "json_text", "pad", "printable", "printable_lines", "width_of"]

# Unicode's categories Cc, Cf, Cs, Zl and Zp: controls, formats (bidirectional marks among them), line separators
_HIDDEN = (
    "\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890-\u0891\u08e2\u180e\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f"
)
_UNPRINTABLE = re.compile(f"[{_HIDDEN}]")
_UNPRINTABLE_IN_LINES = re.compile(f"(?!\n)[{_HIDDEN}]")
_FORMULA = ("=", "+", "-", "@")


def printable(text: str) -> str:
    """The text with every character that is not shown as a glyph written as its escape, line ends included."""
    return text if text.isascii() and text.isprintable() else _UNPRINTABLE.sub(_escape, text)


def printable_lines(text: str) -> str:
    """`printable` for a text of several lines, which stay lines."""
    return _UNPRINTABLE_IN_LINES.sub(_escape, text)


def csv_cell(text: str) -> str:
    """Text for a cell of a spreadsheet, which would compute what begins like a formula: that gets a `'` in front."""
    text = printable(text)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text


def json_text(document: Any, indent: int | None = None) -> str:
    """JSON with letters of every script as they are and everything unprintable as an escape."""
    text = json.dumps(document, ensure_ascii=False, indent=indent)
    if text.isascii() and text.isprintable():
        return text
    return _UNPRINTABLE_IN_LINES.sub(lambda match: json.dumps(match[0])[1:-1], text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


# ------------------------------------------------------------------------------------------------ columns


def width_of(text: str) -> int:
    """How many columns of a terminal a printable text takes."""
    return len(text) if text.isascii() else sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def pad(text: str, width: int, right: bool = False) -> str:
    """The text filled up to `width` columns, on its left where `right` is set."""
    space = " " * (width - width_of(text))
    return space + text if right else text + space


def cut(text: str, width: int) -> str:
    """As much of the text's beginning as fits in `width` columns."""
    if width_of(text) <= width:
        return text
    kept, room = [], width
    for character in text:
        room -= _columns(character)
        if room < 0:
            break
        kept.append(character)
    return "".join(kept)
