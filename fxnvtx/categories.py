"""The categories of ranges, and steps by number: one vocabulary for whoever emits ranges and whoever reads them.

request    one call of a pipeline, or several that run together
stage      a part of a request: encoding a prompt, denoising, decoding. No two stages nest.
loop       all the steps of one denoising
step       one denoising step, and nothing inside it
module     a call of a module of the model
piece      goes on with a module's call that had a range before: compiled code does a call's work in several places
op         work inside any of these that is none of these: a guidance pass, a scheduler's step, a tile of a VAE, a
           kernel fused from several modules, a collective
residency  weights on their way
compile    compilation
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import ConfigError

__all__ = [
    "CATEGORIES",
    "COMPILE",
    "EXAMPLES",
    "LOOP",
    "MODULE",
    "OP",
    "PIECE",
    "REQUEST",
    "RESIDENCY",
    "STAGE",
    "STEP",
    "TASK_SWITCH",
    "Numbers",
]

REQUEST = "request"
STAGE = "stage"
LOOP = "loop"
STEP = "step"
MODULE = "module"
PIECE = "piece"
OP = "op"
RESIDENCY = "residency"
COMPILE = "compile"

# The text of a mark: what its thread begins from here on lies in the start/end range whose id is its payload, or in
# none (0). Without one it lies in what began last.
TASK_SWITCH = "task switch"

# ARGB. Fixed per category, so that the same colour means the same thing in every capture.
CATEGORIES: dict[str, int] = {
    REQUEST: 0xFF1F77B4,
    STAGE: 0xFF17A2B8,
    LOOP: 0xFF2CA02C,
    STEP: 0xFF98DF8A,
    MODULE: 0xFF9467BD,
    PIECE: 0xFF9467BD,
    OP: 0xFFC5B0D5,
    RESIDENCY: 0xFFFF7F0E,
    COMPILE: 0xFF7F7F7F,
}


# ---------------------------------------------------------------------------------------------------- steps by number


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
