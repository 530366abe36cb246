"""What a pipeline is made of, which of it is instrumented under which name, and which methods are wrapped.

Holds none of the objects alive.

A method that they inherit is patched on the class that defines it, for as long as somebody holds the patch; the wrapper
looks at the object to see whether it is meant. So the objects themselves keep their class and their dict: they pickle,
copy and compare as ever, and copies (LTX2 steps a copy of its scheduler) behave like what they are copies of.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import re
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...compile.torch_private import hide_module
from ...modules.selection import DEFAULT_EXCLUDE, unwrapped, walk_paths

__all__ = [
    "ROOT_METHODS",
    "TILED_METHODS",
    "Bound",
    "Held",
    "Options",
    "Patches",
    "Pipe",
    "Wrap",
    "applicable",
    "bind",
    "blocks_of",
    "definer",
    "instance_override",
    "is_denoiser",
    "is_pipeline",
    "known",
    "lock",
    "methods",
    "named_modules",
    "parts_of",
    "pipes",
    "stages_of",
    "unbind",
    "unmatched",
]


# -------------------------------------------------------------------------------------------------------------- patches


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class Held:
    """One wrapped method of one class (or, where `owner` is no class, of one object)."""

    def __init__(self, owner: Any, name: str, original: Any, wrapper: Any) -> None:
        # an object must not stay alive for being wrapped; a class may
        self._owner = weakref.ref(owner)
        self.key = (id(owner), name)
        self.name = name
        self.original = original
        self.wrapper = wrapper
        self.users = 0

    @property
    def owner(self) -> Any:
        return self._owner()

    def restore(self) -> None:
        owner = self.owner
        # Whoever wrapped our wrapper keeps it; without users it only passes calls on.
        if owner is None or vars(owner).get(self.name) is not self.wrapper:
            return
        if isinstance(owner, type):
            setattr(owner, self.name, self.original)
        else:
            vars(owner)[self.name] = self.original


class Patches:
    """Counts who needs which method wrapped."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, str], Held] = {}
        self._lock = threading.RLock()

    def hold(self, owner: Any, name: str, wrap: Wrap) -> Held | None:
        """Wrap `owner`'s own attribute `name`; None where it is not a method that can be wrapped."""
        key = (id(owner), name)
        with self._lock:
            held = self._held.get(key)
            if held is None or vars(owner).get(name) is not held.wrapper:
                original = vars(owner).get(name)
                if not _wrappable(original, isinstance(owner, type)):
                    return None
                wrapper = wrap(original) if isinstance(owner, type) else _for_object(owner, original, wrap)
                functools.update_wrapper(wrapper, original)
                held = self._held[key] = Held(owner, name, original, wrapper)
                if isinstance(owner, type):
                    setattr(owner, name, wrapper)
                else:
                    vars(owner)[name] = wrapper
            held.users += 1
            return held

    def release(self, held: Held) -> None:
        with self._lock:
            held.users -= 1
            if held.users:
                return
            held.restore()
            if self._held.get(held.key) is held:
                del self._held[held.key]

    def __len__(self) -> int:
        return len(self._held)


def _for_object(owner: Any, original: Callable[..., Any], wrap: Wrap) -> Callable[..., Any]:
    """What lies in an object's own dict is called without the object."""
    wrapper = wrap(lambda _, *args, **kwargs: original(*args, **kwargs))
    me = weakref.ref(owner)

    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(me(), *args, **kwargs)

    return call


def _wrappable(found: Any, of_class: bool) -> bool:
    return isinstance(found, types.FunctionType) if of_class else callable(found)


def definer(kind: type, name: str) -> type | None:
    """The class whose `name` objects of `kind` get; None where it is no plain method."""
    for base in kind.__mro__:
        if name in base.__dict__:
            return base if isinstance(base.__dict__[name], types.FunctionType) else None
    return None


def instance_override(thing: Any, name: str) -> bool:
    """Whether this object has a method of its own under that name (a compiled decode, a replaced progress bar)."""
    return callable(getattr(thing, "__dict__", {}).get(name))


# -------------------------------------------------------------------------------------------- pipelines and their parts


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


known: dict[int, list[Bound]] = {}


def pipes() -> list[Pipe]:
    """All instrumented pipelines still alive, nested ones included."""
    with lock:
        return [b.pipe for bounds in known.values() for b in bounds if b.role == "pipeline" and b.ref() is not None]


def bind(thing: Any, name: str, pipe: Pipe, role: str) -> Bound:
    """Make `thing` known as part of `pipe`."""
    bound = Bound(weakref.ref(thing), name, pipe, role)
    with lock:
        known.setdefault(id(thing), []).append(bound)
        pipe.parts[id(thing)] = bound
    return bound


def unbind(key: int, bound: Bound) -> bool:
    """Forget it and let go of its methods; whether no other pipeline knows the same object."""
    with lock:
        bound.pipe.parts.pop(key, None)
        for held in bound.held:
            methods.release(held)
        bound.held = []
        left = [b for b in known.get(key, ()) if b is not bound]
        if left:
            known[key] = left
        else:
            known.pop(key, None)
        thing = bound.ref()
        return not any(b.ref() is thing for b in left)


# --------------------------------------------------------------------------------------- what a pipeline is made of


# Methods by which pipelines reach a component without calling it, so that its own range never opens.
ROOT_METHODS = ("encode", "decode", "generate", "get_text_features", "get_image_features", "predict_num_frames")
TILED_METHODS = tuple(f"{prefix}tiled_{what}" for prefix in ("", "_", "_temporal_") for what in ("encode", "decode"))
_STAGE = re.compile(r"(encode|enhance|prepare|decode)_\w+$|run_safety_checker$|upsample_latents$")
_NO_STAGE = {"prepare_extra_step_kwargs"}
_DENOISER = re.compile(r"(transformer|unet|denoiser|prior|dit)(_\w+)?$")


def is_denoiser(name: str) -> bool:
    """Whether a component of this name predicts the noise."""
    return _DENOISER.match(name) is not None


def is_pipeline(thing: Any) -> bool:
    """A DiffusionPipeline or ModularPipeline, told without importing diffusers."""
    return any(
        base.__name__ in ("DiffusionPipeline", "ModularPipeline") and base.__module__.startswith("diffusers.")
        for base in type(thing).__mro__
    )


def is_scheduler(thing: Any) -> bool:
    return callable(getattr(type(thing), "step", None)) and callable(getattr(type(thing), "set_timesteps", None))


def parts_of(pipe: Any) -> Iterator[tuple[str, str, Any]]:
    """(role, name, object) of every component of a pipeline, each object once, under its first name."""
    seen: set[int] = set()
    for name, part in list(vars(pipe).items()):
        part = unwrapped(part)
        if name.startswith("_") or part is None or id(part) in seen:
            continue
        if isinstance(part, nn.Module):
            role = "module"
        elif is_pipeline(part):
            role = "pipeline"
        elif is_scheduler(part):
            role = "scheduler"
        else:
            continue
        seen.add(id(part))
        yield role, name, part


def stages_of(pipe: Any) -> list[str]:
    """Names of the pipeline's methods that are stages."""
    found = []
    for base in type(pipe).__mro__:
        for name, member in vars(base).items():
            if isinstance(member, types.FunctionType) and _STAGE.match(name) and name not in _NO_STAGE:
                found.append(name)
    return sorted(set(found))


def blocks_of(pipe: Any) -> Iterator[tuple[str, Any]]:
    """(name, block) of everything that a ModularPipeline runs, outermost first; nothing for other pipelines."""
    todo = [("", getattr(pipe, "_blocks", None))]
    seen: set[int] = set()
    while todo:
        name, block = todo.pop(0)
        if block is None or id(block) in seen:
            continue
        seen.add(id(block))
        if name:
            yield name, block
        children = getattr(block, "sub_blocks", None)
        if isinstance(children, dict):
            todo.extend((str(key), child) for key, child in children.items())


def named_modules(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the components that are models."""
    return ((name, part) for role, name, part in parts_of(pipe) if role == "module")


def applicable(patterns: Any, name: str, component: nn.Module) -> Any:
    """`include` or `exclude` for one component: types, and the globs that match in it. A glob is an FQN below the
    component, with or without the component's name in front."""
    if patterns is None or isinstance(patterns, type):
        return patterns
    fqns = [".".join(path) for path, _, _ in walk_paths(component)]
    found = []
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns):
        if not isinstance(pattern, str):
            found.append(pattern)
            continue
        for glob in (pattern, pattern.removeprefix(f"{name}.")):
            if any(fnmatch.fnmatchcase(fqn, glob) for fqn in fqns):
                found.append(glob)
                break
    return found


def unmatched(patterns: Any, named: list[tuple[str, nn.Module]]) -> list[str]:
    """The globs that match in no component."""
    globs = [p for p in ([patterns] if isinstance(patterns, (str, type)) else patterns or ()) if isinstance(p, str)]
    return [g for g in globs if not any(applicable(g, name, component) for name, component in named)]


hide_module(globals(), nested=True)  # some of this runs while a compiled component is being called
