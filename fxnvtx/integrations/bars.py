"""A pipeline's progress bar says where its steps are: the loop is the bar's life, a step ends at update().

    with self.progress_bar(total=n) as bar: ... bar.update()        for t in self.progress_bar(timesteps): ...

The bar keeps being the bar (a subclass of its own class, made once per class): what pipelines and users do with it
works as before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from threading import get_ident
from typing import Any

from ..ranges import Entry, Label, label, pop, push
from . import timesteps
from .scene import Request, here

__all__ = ["Loop", "follow", "step_text"]

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
        self.passes, self.request = here.passes, here.request
        self.opened = push(label(self.loop, "loop"), self.total)
        self.running = True
        if self.request is not None:
            self.request.open.append(self)

    def begin_step(self, timestep: float | None = None) -> None:
        self.end_step()
        here.passes = {}
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
                here.passes = self.passes

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
                loop.begin_step(timesteps.number(item))
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
        return timesteps.known(found) if found is not None and len(found) == total else None
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
