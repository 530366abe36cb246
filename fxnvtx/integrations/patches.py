"""Wrapping a method that other people's objects inherit, and giving it back.

Patched is the class that defines the method, for as long as somebody holds the patch; the wrapper looks at the object
to see whether it is meant. So the objects themselves keep their class and their dict: they pickle, copy and compare
as ever, and copies (LTX2 steps a copy of its scheduler) behave like what they are copies of.
"""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["Held", "Patches", "Wrap", "definer", "instance_override"]

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
