"""Ranges of their own for weights that move: nothing else in a capture tells a load from a layer."""

from __future__ import annotations

from ... import ranges

__all__ = ["ResidencyRanges"]


class ResidencyRanges:
    """Makes `residency.load <name>`, `.wait`, `.prefetch` and `.offload`, with the bytes as payload.

    The manager switches it per request: a warm-up shows nothing.
    """

    def __init__(self) -> None:
        self.enabled = False

    def __call__(self, what: str, name: str, nbytes: int) -> ranges.range:
        return ranges.range(f"residency.{what} {name}", category="residency", payload=nbytes, enabled=self.enabled)
