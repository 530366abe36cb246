"""One range as readers give it, and one call."""

from __future__ import annotations

from typing import Any

from .labels import Name

__all__ = ["PIECE", "Point", "Span"]


class _Piece(str):
    """A payload that no other range has."""

    __slots__ = ()


PIECE = _Piece("one more piece of a call")  # the payload of a range that goes on with a call seen before

# thread, start, end, name, payload, is still open. Sorted by thread, start, and end downwards.
Span = tuple[int, int, int, Name, Any, bool]

# thread, start, end of a call that launched device work, and what it launched. Sorted by thread and start.
Point = tuple[int, int, int, Any]
