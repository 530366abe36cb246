"""What runs on this thread: the request, its loops, the step in which a component is called, and its tile."""

from __future__ import annotations

import threading
from typing import Any, Protocol

from torch import Tensor

from ...compile.torch_private import hide_module
from ...ranges import Label, label
from .registry import Bound, Pipe, known

__all__ = ["Closing", "Request", "Scene", "Tiling", "find", "place_of", "state"]


# ---------------------------------------------------------------------------------------------------------------- tiles


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


# ----------------------------------------------------------------------------------------------------------- the thread


class Closing(Protocol):
    def close(self) -> None: ...


class Request:
    """One call of a pipeline."""

    def __init__(self, pipe: Pipe, outer: Request | None) -> None:
        self.pipe = pipe
        self.outer = outer
        self.open: list[Closing] = []  # loops under way, the innermost last

    def close(self) -> None:
        """End what the pipeline left open: a loop that an exception left is closed before its request is."""
        while self.open:
            self.open.pop().close()


class Scene(threading.local):
    def __init__(self) -> None:
        self.request: Request | None = None
        self.passes: dict[str, int] | None = None  # component -> its calls since the step or the scheduler's last one
        self.stages = 0  # stages open: what would be one inside of another is an op
        self.named_pass = 0  # cache contexts open: they name the pass
        self.inside: set[tuple[int, str]] = set()  # (object, method) under way: a method that calls super()'s
        self.tiling: Tiling | None = None
        self.timesteps: tuple[Tensor, list[float]] | None = None  # on a device, and what they are


state = Scene()


def find(thing: Any) -> Bound | None:
    """What is known about this object; where it is part of several pipelines, as part of the one that runs state."""
    found = known.get(id(thing))
    if not found:
        return None
    request = state.request
    chosen = None
    for bound in found:
        if bound.ref() is thing:
            chosen = bound
            if request is not None and bound.pipe is request.pipe:
                return bound
    return chosen


hide_module(globals(), nested=True)  # some of this runs while a compiled component is being called
