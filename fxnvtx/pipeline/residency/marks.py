"""Ranges of their own for weights that move: nothing else in a capture tells a load from a layer."""

from __future__ import annotations

from collections.abc import Callable

from ... import ranges

__all__ = ["ResidencyRanges"]


class ResidencyRanges:
    """Makes `residency.load <name>`, `.wait`, `.prefetch` and `.offload`, with the bytes as payload.

    `wanted` is asked at every move: it depends on the request for which the weights move, a warm-up shows nothing.
    """

    def __init__(self, wanted: Callable[[], bool] = bool) -> None:
        self.wanted = wanted

    def __call__(self, what: str, name: str, nbytes: int) -> ranges.range:
        return ranges.range(f"residency.{what} {name}", category="residency", payload=nbytes, enabled=self.wanted())
