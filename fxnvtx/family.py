"""Which modules own which: modules know their children; who their parents are is noted as they are registered."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .compile.invisible import hide_module
from .names import is_callable_module

__all__ = ["Family"]


class Family:
    """The parents of every module that is put into another while `watch()` is on, or was there before.

    Modules are held weakly. A parent is believed only as long as it still holds the child.
    """

    def __init__(self, met: Callable[[nn.Module], None] | None = None) -> None:
        self._parents: dict[int, list[weakref.ref[nn.Module]]] = {}
        self._known: dict[int, weakref.ref[nn.Module]] = {}
        self._met = met  # called with every module that gets a child
        self._undo: list[Callable[[], None]] = []

    def watch(self) -> None:
        """Note every registration from now on, and what is there already."""
        self._undo.append(register_module_module_registration_hook(self._registered).remove)
        # copies and unpickled modules are put together without registration
        original = nn.Module.__setstate__
        family = self

        def set_state(self: nn.Module, state: dict[str, Any]) -> None:
            original(self, state)
            family.scan(self)

        nn.Module.__setstate__ = set_state  # type: ignore[method-assign]
        self._undo.append(lambda: setattr(nn.Module, "__setstate__", original))
        for found in gc.get_objects():
            if issubclass(type(found), nn.Module):  # isinstance() asks the object, and a lazy one would answer
                self.scan(found)

    def unwatch(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _registered(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if isinstance(child, nn.Module):
            self._note(parent, child)

    def scan(self, parent: nn.Module) -> None:
        for child in parent.__dict__.get("_modules", {}).values():
            if isinstance(child, nn.Module):
                self._note(parent, child)

    def _note(self, parent: nn.Module, child: nn.Module) -> None:
        key = id(child)
        parents = self._parents.get(key)
        if parents is None or self._known[key]() is not child:
            parents = self._parents[key] = []
            self._known[key] = weakref.ref(child, lambda ref: self._forget(key, ref))
        if all(known() is not parent for known in parents):
            parents.append(weakref.ref(parent))
        if self._met is not None:
            self._met(parent)

    def _forget(self, key: int, ref: weakref.ref[nn.Module]) -> None:
        if self._known.get(key) is ref:
            del self._known[key], self._parents[key]

    def parents(self, module: nn.Module) -> Iterator[nn.Module]:
        """Those that hold `module` as a child now, the one that got it first at the front."""
        known = self._known.get(id(module))
        if known is None or known() is not module:
            return
        for ref in list(self._parents[id(module)]):
            parent = ref()
            if parent is not None and any(child is module for child in parent._modules.values()):
                yield parent

    def owners(self, module: nn.Module) -> list[nn.Module]:
        """The outermost modules that `module` belongs to: itself where nobody owns it. A bare ModuleList or ModuleDict
        at the top is a collection of models, not one."""
        top: list[nn.Module] = []
        seen: set[int] = set()
        todo = [module]
        while todo:
            one = todo.pop()
            if id(one) in seen:
                continue
            seen.add(id(one))
            above = [p for p in self.parents(one) if p is not one and not self._collection(p)]
            todo.extend(reversed(above))
            if not above and (one is module or not _bare(one)):
                top.append(one)
        return top or [module]

    def _collection(self, module: nn.Module) -> bool:
        """A bare container that nobody owns."""
        return _bare(module) and not any(True for _ in self.parents(module))


def _bare(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and not is_callable_module(module)


hide_module(globals())
