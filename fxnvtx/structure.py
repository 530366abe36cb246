"""Which modules a model is made of, remembered so that a change is seen at a cost that does not show.

Children come and go by `setattr`, `del`, ModuleList edits, or a plain write into `_modules`, and torch tells of the
first only. So the outermost call compares: per module with children one hash over their names and identities, per
module without any whether that still holds. About 50 ns a module, a few per cent of an instrumented call that does
nothing. Nothing here keeps a module alive, and a recycled id() cannot pass for its predecessor: deaths are noted.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

__all__ = ["Structure"]

# Where the parts of one module's subtree lie: first and last branch, first and last leaf
Span = tuple[int, int, int, int]


class Structure:
    """The modules of a model, containers and wrappers included, as they were when it was made."""

    __slots__ = ("_alive", "_branches", "_leaves", "_spans", "news")

    def __init__(self, model: nn.Module | None) -> None:
        self.news: list[Any] = []  # a module died; anybody may put more in
        self._alive: list[weakref.ref[nn.Module]] = []
        self._branches: list[tuple[weakref.ref[nn.Module], int]] = []
        self._leaves: list[dict[str, Any]] = []  # empty dicts, so they keep nothing
        self._spans: dict[int, Span] = {}
        if model is not None:
            self._read(model)

    def _read(self, model: nn.Module) -> None:
        forget = self.news.append  # bound: it works at interpreter exit, when globals are gone
        # (module, None) to enter, (module, where it began) to leave
        todo: list[tuple[nn.Module, tuple[int, int] | None]] = [(model, None)]
        seen: set[int] = set()
        while todo:
            module, began = todo.pop()
            if began is not None:
                self._spans[id(module)] = (began[0], len(self._branches), began[1], len(self._leaves))
                continue
            if id(module) in seen:
                continue
            seen.add(id(module))
            todo.append((module, (len(self._branches), len(self._leaves))))
            self._alive.append(weakref.ref(module, forget))
            children = module._modules
            if children:
                self._branches.append((weakref.ref(module), _mark(children)))
                todo.extend((child, None) for child in reversed(list(children.values())) if child is not None)
            else:
                self._leaves.append(children)

    @property
    def size(self) -> int:
        return len(self._alive)

    def changed(self, key: int | None = None) -> bool:
        """Whether a module was added, removed, replaced or renamed: anywhere, or below the one whose id() is `key`."""
        if self.news:
            return True
        branches, leaves = self._branches, self._leaves
        if key is not None:
            span = self._spans.get(key)
            if span is None:
                return True
            if span[1] - span[0] < len(branches):
                branches, leaves = branches[span[0] : span[1]], leaves[span[2] : span[3]]
        try:
            for ref, mark in branches:
                module = ref()
                if module is None:
                    return True
                children = module._modules
                if hash((*children, *children.values())) != mark:
                    return True
        except TypeError:  # a module that will not be hashed
            return any((module := ref()) is None or _mark(module._modules) != mark for ref, mark in branches)
        return any(leaves)


def _mark(children: dict[str, Any]) -> int:
    try:
        return hash((*children, *children.values()))
    except TypeError:
        return hash((*children, *map(id, children.values())))
