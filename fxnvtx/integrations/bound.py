"""Which objects belong to an instrumented pipeline, and under which name. Holds none of them alive."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..names import DEFAULT_EXCLUDE
from .patches import Held, Patches
from .scene import here

__all__ = ["Bound", "Options", "Pipe", "bind", "find", "lock", "methods", "pipes", "unbind"]

lock = threading.RLock()
methods = Patches()


@dataclass(frozen=True)
class Options:
    """What `instrument(pipe, ...)` was given."""

    depth: int | None = None
    include: Any = None
    exclude: Any = DEFAULT_EXCLUDE
    path: str = "auto"
    shapes: bool = False
    layers: bool = True


@dataclass(eq=False)
class Pipe:
    """One instrumented pipeline."""

    ref: weakref.ref[Any]
    options: Options
    name: str
    outer: Pipe | None = None  # the pipeline whose component this one is
    enabled: bool = True
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    parts: dict[int, Bound] = field(default_factory=dict)  # by id
    nested: list[weakref.ref[Any]] = field(default_factory=list)  # pipelines instrumented as parts of this one
    finalizer: Any = None

    @property
    def shown(self) -> bool:
        return self.enabled and (self.outer is None or self.outer.shown)


@dataclass(eq=False)
class Bound:
    """One object of a pipeline: the pipeline itself, a component, a scheduler, a block."""

    ref: weakref.ref[Any]
    name: str
    pipe: Pipe
    role: str  # pipeline, module, scheduler, block
    held: list[Held] = field(default_factory=list)
    layers: bool = False  # instrumented by us
    # of a component: id -> (module, its path), as of when it was instrumented
    paths: dict[int, tuple[weakref.ref[Any], str]] = field(default_factory=dict)


_known: dict[int, list[Bound]] = {}


def find(thing: Any) -> Bound | None:
    """What is known about this object; where it is part of several pipelines, as part of the one that runs here."""
    found = _known.get(id(thing))
    if not found:
        return None
    request = here.request
    chosen = None
    for bound in found:
        if bound.ref() is thing:
            chosen = bound
            if request is not None and bound.pipe is request.pipe:
                return bound
    return chosen


def pipes() -> list[Pipe]:
    """All instrumented pipelines still alive, nested ones included."""
    with lock:
        return [b.pipe for bounds in _known.values() for b in bounds if b.role == "pipeline" and b.ref() is not None]


def bind(thing: Any, name: str, pipe: Pipe, role: str) -> Bound:
    """Make `thing` known as part of `pipe`."""
    bound = Bound(weakref.ref(thing), name, pipe, role)
    with lock:
        _known.setdefault(id(thing), []).append(bound)
        pipe.parts[id(thing)] = bound
    return bound


def unbind(key: int, bound: Bound) -> bool:
    """Forget it and let go of its methods; whether no other pipeline knows the same object."""
    with lock:
        bound.pipe.parts.pop(key, None)
        for held in bound.held:
            methods.release(held)
        bound.held = []
        left = [b for b in _known.get(key, ()) if b is not bound]
        if left:
            _known[key] = left
        else:
            _known.pop(key, None)
        thing = bound.ref()
        return not any(b.ref() is thing for b in left)
