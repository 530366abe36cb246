"""Classifier-free guidance: which steps pay for an unconditional pass, and what is made of the two."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Guidance"]


@dataclass(frozen=True)
class Guidance:
    """`scale` 1 means none. `interval`: first and last step, from 0, that are guided; None means all."""

    scale: float
    interval: tuple[int, int] | None = None

    def applies(self, step: int) -> bool:
        """Whether this step needs the unconditional pass."""
        if self.scale == 1.0:
            return False
        return self.interval is None or self.interval[0] <= step <= self.interval[1]

    def combine(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        return unconditional + self.scale * (conditional - unconditional)
