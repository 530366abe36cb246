"""Imports: without a complaint of torch that concerns nobody here, and something to be done once a module is there."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import threading
import types
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

__all__ = ["import_quietly", "no_longer_when_imported", "when_imported"]


def import_quietly(name: str) -> Any:
    """The module `name`, as importlib.import_module() gives it, though torch finds no numpy: nothing here needs it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        return import_module(name)


Then = Callable[[types.ModuleType], None]
_lock = threading.Lock()


def when_imported(name: str, then: Then) -> None:
    """Call `then(module)` right after the module has run: now, where that has happened, else during its import."""
    with _lock:
        module = sys.modules.get(name)
        if module is None:
            _finder.waiting.setdefault(name, []).append(then)
            if _finder not in sys.meta_path:
                sys.meta_path.insert(0, _finder)
            return
    then(module)


def no_longer_when_imported(name: str, then: Then) -> None:
    """Take `when_imported(name, then)` back, where the module has not been imported yet."""
    with _lock:
        waiting = _finder.waiting.get(name, [])
        if then in waiting:
            waiting.remove(then)
            if not waiting:
                _finder.leave(name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: asks the others and adds to what they found."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Then]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        for other in sys.meta_path:
            spec = other.find_spec(fullname, path, target) if other is not self else None
            if spec is not None:
                self._watch(spec)
                return spec
        return None

    def _watch(self, spec: importlib.machinery.ModuleSpec) -> None:
        loader = spec.loader
        if loader is None or not hasattr(loader, "__dict__"):
            return

        def exec_module(module: types.ModuleType) -> None:
            loader.__dict__.pop("exec_module", None)
            loader.exec_module(module)
            for then in self._done(spec.name):
                then(module)

        loader.__dict__["exec_module"] = exec_module

    def _done(self, name: str) -> list[Then]:
        with _lock:
            return self.leave(name)

    def leave(self, name: str) -> list[Then]:
        """Wait for this module no longer; returns what was to be done. Called with the lock held."""
        found = self.waiting.pop(name, [])
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        return found


_finder = _Finder()
