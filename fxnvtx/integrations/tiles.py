"""Which tile of a latent (or of a picture) a part of a VAE works on. A tile is a view, so its place is its offset."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ranges import Label, label
from .scene import here

__all__ = ["Tiling", "place_of", "tile_around"]

AXES = "tyx"


def place_of(tile: Tensor, whole: Tensor) -> tuple[int, ...] | None:
    """Where `tile`, a view of `whole`, begins along its last axes (height and width, before them time), in its points.

    None where it is no view of it. Both are [batch, channels, *sizes].
    """
    try:
        if tile.dim() != whole.dim() or whole.dim() < 3 or tile is whole:
            return None
        if tile.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return None
        offset = int(tile.storage_offset() - whole.storage_offset())
    except (RuntimeError, NotImplementedError):  # tensors without a storage of their own
        return None
    places, strides = [0] * whole.dim(), whole.stride()
    for axis in sorted(range(whole.dim()), key=lambda a: -strides[a]):
        if whole.size(axis) > 1 and strides[axis] > 0:
            places[axis], offset = divmod(offset, strides[axis])
    fits = offset == 0 and all(p >= 0 and p + tile.size(a) <= whole.size(a) for a, p in enumerate(places))
    return tuple(places[2:]) if fits else None


class Tiling:
    """One call of tiled_decode or tiled_encode on one thread."""

    def __init__(self, component: str, whole: Any, outer: Tiling | None = None) -> None:
        self.component = component
        self.whole: Tensor | None = whole if isinstance(whole, Tensor) else None
        if self.whole is not None and outer is not None and outer.whole is not None:
            # tiles in space of a piece of time: their place is that in the whole
            self.whole = outer.whole if place_of(self.whole, outer.whole) is not None else self.whole
        self.now: Label | None = None
        self.leader = ""  # the part that is called with the tile itself; the others get what it made of it
        self.numbers: dict[str, int] = {}

    def label(self, part: str, args: tuple[Any, ...]) -> Label:
        """The label of the tile that this call of a part of the VAE works on."""
        tile = args[0] if args and isinstance(args[0], Tensor) else None
        place = place_of(tile, self.whole) if tile is not None and self.whole is not None else None
        if place is not None:
            axes = AXES[-len(place) :]
            text = "_".join(f"{axis}{start}" for axis, start in zip(axes, place, strict=False))
            self.now = label(f"{self.component}_tile_{text}", "op")
            self.leader = part
        elif part == self.leader:
            self.now = None
        if self.now is None:  # not a view: only the order of the calls is known
            number = self.numbers[part] = self.numbers.get(part, -1) + 1
            return label(f"{self.component}_tile call {number}", "op")
        return self.now


def tile_around(part: str) -> Any:
    """What to show around a call of `part`, a direct child of a VAE."""

    def around(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Label, object] | None:
        tiling = here.tiling
        return None if tiling is None else (tiling.label(part, args), None)

    return around
