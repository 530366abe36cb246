"""What runs on this thread: the request, its loops and steps, the tile of a VAE that a component is called for.

A pipeline's progress bar says where its steps are: the loop is the bar's life, a step ends at update().

    with self.progress_bar(total=n) as bar: ... bar.update()        for t in self.progress_bar(timesteps): ...

The bar keeps being the bar (a subclass of its own class, made once per class): what pipelines and users do with it
works as before.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from threading import get_ident
from typing import Any

from torch import Tensor

from ...compile.torch_private import hide_module
from ...ranges import Entry, Label, label, pop, push
from .registry import Bound, Pipe, known

__all__ = [
    "Loop",
    "Request",
    "Scene",
    "Tiling",
    "find",
    "follow",
    "in_step",
    "note_timesteps",
    "number",
    "place_of",
    "state",
    "step_text",
    "timesteps_of",
]


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


class Request:
    """One call of a pipeline."""

    def __init__(self, pipe: Pipe, outer: Request | None) -> None:
        self.pipe = pipe
        self.outer = outer
        self.open: list[Loop] = []  # loops under way, the innermost last

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


# ------------------------------------------------------------------------------------------------------------ timesteps


def number(item: Any) -> float | None:
    """A number that can be read without waiting for a device."""
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        return float(item)
    if isinstance(item, Tensor) and item.device.type == "cpu" and item.numel() == 1 and not item.is_complex():
        return float(item)
    return None


def note_timesteps(scheduler: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """After `method`, a scheduler's set_timesteps, ran with these arguments: remember what it left, if on a device."""
    state.timesteps = None
    found = getattr(scheduler, "timesteps", None)
    if isinstance(found, Tensor) and found.device.type != "cpu":
        numbers = computed(scheduler, method, args, kwargs)
        if numbers is not None and len(numbers) == len(found):
            state.timesteps = (found, numbers)


def computed(
    scheduler: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[float] | None:
    """What set_timesteps gives with device="cpu"; None where that cannot be told without touching the scheduler."""
    try:
        given = inspect.signature(method).bind(scheduler, *args, **kwargs)
        if "device" not in inspect.signature(method).parameters or any(
            isinstance(value, Tensor) and value.device.type != "cpu" for value in given.arguments.values()
        ):
            return None
        given.arguments["device"] = "cpu"
        twin = copy.copy(scheduler)
        method(twin, *given.args[1:], **given.kwargs)
        return in_step(list(twin.timesteps))
    except Exception:  # somebody else's code, run for a label only
        return None


def in_step(found: Sequence[Any]) -> list[float] | None:
    """All of them as numbers, or nothing."""
    numbers = [number(item) for item in found]
    return [n for n in numbers if n is not None] if None not in numbers else None


def timesteps_of(found: Any) -> list[float] | None:
    """The numbers in what a pipeline loops over; None where they cannot be read without waiting."""
    if isinstance(found, Tensor) and found.device.type != "cpu":
        if state.timesteps is None:
            return None
        whole, numbers = state.timesteps
        start = _start(found, whole)
        return None if start is None else numbers[start : start + len(found)]
    return in_step(found)


def _start(part: Tensor, whole: Tensor) -> int | None:
    """Where `part`, the tensor itself or a slice of it, begins."""
    if part is whole:
        return 0
    if part.dim() != 1 or whole.dim() != 1 or part.stride() != whole.stride() or part.device != whole.device:
        return None
    shared = part._base is whole or (part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() != 0)
    start, rest = divmod(int(part.storage_offset() - whole.storage_offset()), whole.stride(0))
    return start if shared and not rest and start >= 0 and start + len(part) <= len(whole) else None


# ----------------------------------------------------------------------------------------------------------------- bars


STATE = "_fxnvtx_loop"


def step_text(kind: str, index: int, timestep: float | None) -> str:
    """`denoising_step_3_t750`; without the timestep where it is not known when the step begins."""
    if timestep is None:
        return f"{kind}_{index}"
    shown = str(int(timestep)) if float(timestep).is_integer() else f"{timestep:.4g}"
    return f"{kind}_{index}_t{shown}"


class Loop:
    """The ranges of one loop: itself and the step under way."""

    def __init__(self, name: str | None) -> None:
        self.loop = name or "denoising_loop"
        self.step = "step" if name else "denoising_step"
        self.by_items = False
        self.index = 0
        self.total: int | None = None
        self.timesteps: Sequence[float] | None = None
        self.request: Request | None = None
        self.passes: dict[str, int] | None = None
        self.opened: Entry | None = None
        self.entry: Entry | None = None
        self.running = False
        self.thread = get_ident()

    def begin(self, total: Any, known: Sequence[float] | None) -> None:
        self.total = total if type(total) is int else None
        self.timesteps = known
        self.passes, self.request = state.passes, state.request
        self.opened = push(label(self.loop, "loop"), self.total)
        self.running = True
        if self.request is not None:
            self.request.open.append(self)

    def begin_step(self, timestep: float | None = None) -> None:
        self.end_step()
        state.passes = {}
        self.entry = push(self._label(timestep), self.index)

    def _label(self, timestep: float | None) -> Label:
        if timestep is None and self.timesteps is not None and self.index < len(self.timesteps):
            timestep = self.timesteps[self.index]
        return label(step_text(self.step, self.index, timestep), "step")

    def end_step(self) -> None:
        if self.entry is not None:
            pop(self.entry)
            self.entry = None
            if self.thread == get_ident():  # not where an abandoned generator is collected on another thread
                state.passes = self.passes

    def advance(self, steps: int) -> None:
        """`steps` more are done; the next one begins unless that was the last."""
        self.end_step()
        self.index += steps
        if self.total is None or self.index < self.total:
            self.begin_step()

    def close(self) -> None:
        if not self.running:
            return
        self.running = False
        self.end_step()
        pop(self.opened)
        if self.request is not None and self in self.request.open:
            self.request.open.remove(self)


_followed: dict[type, type] = {}


def follow(bar: Any, iterable: Any, name: Any) -> Any:
    """The same bar, with ranges around its loop and steps. A bar of an unknown kind is left alone."""
    kind = type(bar)
    if STATE in getattr(bar, "__dict__", {}):
        return bar
    try:
        made = _followed.get(kind)
        if made is None:
            made = _followed[kind] = _followed_class(kind)
        bar.__class__ = made
    except TypeError:  # a class that does not let its objects change
        return bar
    loop = Loop(name if isinstance(name, str) and name else None)
    loop.by_items = iterable is not None
    bar.__dict__[STATE] = loop
    return bar


def _followed_class(kind: type) -> type:
    members: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    for name, make in (("__enter__", _enter), ("__exit__", _exit), ("update", _update), ("__iter__", _iter)):
        original = getattr(kind, name, None)
        if callable(original):
            members[name] = make(original)
    return type(kind.__name__, (kind,), members)


def _enter(original: Any) -> Any:
    def __enter__(self: Any) -> Any:  # noqa: N807
        entered = original(self)
        loop = self.__dict__[STATE]
        if not loop.running:
            total = getattr(self, "total", None)
            loop.begin(total, None if loop.by_items else _known_timesteps(sys._getframe(1), total))
            if not loop.by_items:
                loop.begin_step()
        return entered

    return __enter__


def _exit(original: Any) -> Any:
    def __exit__(self: Any, *error: Any) -> Any:  # noqa: N807
        self.__dict__[STATE].close()
        return original(self, *error)

    return __exit__


def _update(original: Any) -> Any:
    def update(self: Any, n: Any = 1) -> Any:
        loop = self.__dict__[STATE]
        if loop.running and not loop.by_items and type(n) is int and n > 0:
            loop.end_step()
            try:
                return original(self, n)
            finally:
                loop.advance(n)
        return original(self, n)

    return update


def _iter(original: Any) -> Any:
    def __iter__(self: Any) -> Iterator[Any]:  # noqa: N807
        loop = self.__dict__[STATE]
        items = iter(original(self))
        if not loop.running:
            loop.begin(getattr(self, "total", None), None)
        loop.by_items = True
        loop.end_step()
        try:
            for index, item in enumerate(items):
                loop.index = index
                loop.begin_step(number(item))
                yield item
                loop.end_step()
        finally:
            loop.close()

    return __iter__


def _known_timesteps(frame: Any, total: Any) -> list[float] | None:
    """The timesteps that the loop around this bar goes through: the pipeline's own variable of that name, if it has one
    per step. Anything else stays unknown."""
    variables = frame.f_locals
    found = variables.get("timesteps")
    if found is None:
        found = getattr(variables.get("block_state"), "timesteps", None)
    if type(variables) is dict:
        variables.clear()  # a snapshot up to Python 3.12; kept, it would hold every tensor of the pipeline's frame
    try:
        return timesteps_of(found) if found is not None and len(found) == total else None
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None


hide_module(globals(), nested=True)  # some of this runs while a compiled component is being called
