"""Steps and requests by number, as every command takes them: `3-5` or `3:6`, `0,3`, `2:`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import ConfigError

__all__ = ["EXAMPLES", "Numbers"]

EXAMPLES = "5, or 3-5 (both ends), or 3:6 (without its end), or 2:, or 0,9"  # for the help of every command

_PART = re.compile(r"(?P<first>\d*)(?:(?P<sign>[:-])(?P<last>\d*))?")
_MOST = 1_000_000_000


@dataclass(frozen=True)
class Numbers:
    """Numbers from 0 and ranges of them. `3-5` holds both its ends; `3:6` is Python's, without its end; `3-` and `3:`
    go on for ever."""

    parts: tuple[tuple[int, int], ...]  # first, and the one after the last

    @classmethod
    def read(cls, text: str) -> Numbers:
        """Raises ConfigError where the text names no numbers, or an empty range of them."""
        found = []
        for part in text.replace(" ", "").split(","):
            match = _PART.fullmatch(part)
            if match is None or part in ("", "-") or part.startswith("-") or len(part) > 22:
                raise ConfigError(f"{text[:40]!r} names no requests or steps: write them like 0,3-5 or 2:")
            first, sign, last = match["first"], match["sign"], match["last"]
            start = min(int(first or 0), _MOST)
            end = start + 1
            if sign:
                end = min(int(last) + (sign == "-"), _MOST) if last else _MOST
            if end <= start:
                raise ConfigError(f"{part!r} is an empty range: the second number must be larger")
            found.append((start, end))
        return cls(tuple(found))

    def __contains__(self, number: int) -> bool:
        return any(start <= number < end for start, end in self.parts)
