"""From a model to its labels. Pure: nothing here touches a module, it only reads."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

from torch import nn

from ..errors import InstrumentError, SelectionError

__all__ = [
    "DEFAULT_EXCLUDE",
    "Named",
    "Selection",
    "label_text",
    "name_modules",
    "unwrapped",
    "walk_paths",
]

# Modules that launch nothing at inference; a range for each would only be noise.
DEFAULT_EXCLUDE: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
MAX_PATHS = 100_000
Pattern = str | type
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Selection:
    """Which modules get a range: patterns are FQN globs (`blocks.*.attn`) or module types.

    `depth` counts ranges, not dots: 0 is the root alone, 1 the modules that the root calls, and so on.
    """

    include: tuple[Pattern, ...] | None = None
    exclude: tuple[Pattern, ...] = DEFAULT_EXCLUDE
    depth: int | None = None

    @classmethod
    def of(
        cls,
        include: Pattern | Iterable[Pattern] | None,
        exclude: Pattern | Iterable[Pattern] | None,
        depth: int | None,
    ) -> Selection:
        if depth is not None and (not isinstance(depth, int) or isinstance(depth, bool) or depth < 0):
            raise InstrumentError(f"depth must be a whole number from 0 on, or None for all levels, not {depth!r}")
        return cls(
            None if include is None else _patterns("include", include), _patterns("exclude", exclude or ()), depth
        )

    def check(self, fqns_and_types: Sequence[tuple[str, type]]) -> None:
        """Raise SelectionError for a glob that names nothing: a typing error would otherwise stay silent."""
        for what, patterns in (("include", self.include or ()), ("exclude", self.exclude)):
            for pattern in patterns:
                if isinstance(pattern, str) and not any(fnmatch.fnmatchcase(f, pattern) for f, _ in fqns_and_types):
                    some = ", ".join(f for f, _ in fqns_and_types[1:4]) or "(the model has no submodules)"
                    raise SelectionError(f"{what}={pattern!r} matches no module; names look like: {some}")

    def takes(self, fqn: str, kind: type) -> bool:
        if _matches(self.exclude, fqn, kind):
            return False
        return self.include is None or _matches(self.include, fqn, kind)


def _patterns(what: str, given: Pattern | Iterable[Pattern]) -> tuple[Pattern, ...]:
    if not isinstance(given, (str, type, Iterable)):
        raise InstrumentError(f"{what} takes names with wildcards and module types, not {given!r}")
    items = (given,) if isinstance(given, (str, type)) else tuple(given)
    for item in items:
        if not isinstance(item, (str, type)):
            raise InstrumentError(f"{what} takes names with wildcards and module types, not {item!r}")
    return items


def _matches(patterns: Iterable[Pattern], fqn: str, kind: type) -> bool:
    return any(fnmatch.fnmatchcase(fqn, p) if isinstance(p, str) else issubclass(kind, p) for p in patterns)


@dataclass
class Named:
    """One module object and every path by which the model reaches it."""

    module: nn.Module
    fqn: str  # the first path
    parent: str | None  # FQN of the nearest module with a range above that path; None for the root
    # nearest ranged ancestor -> FQN; several where the module is tied. Two names below the same ancestor cannot be
    # told apart at run time, the first one found stands for both (`also` keeps the other for explain).
    by_parent: dict[str, str] = field(default_factory=dict)
    also: list[str] = field(default_factory=list)


def unwrapped(model: M) -> M:
    """The module itself where torch.compile has wrapped it: a range around the wrapper would only double it."""
    if type(model).__name__ != "OptimizedModule":
        return model
    inner = model._modules.get("_orig_mod")
    return cast(M, inner) if isinstance(inner, nn.Module) else model


def is_callable_module(module: nn.Module) -> bool:
    """False for containers such as ModuleList that define no forward and so are never called."""
    return getattr(type(module), "forward", None) is not nn.Module.forward or "forward" in module.__dict__


def walk_paths(model: nn.Module) -> Iterator[tuple[tuple[str, ...], nn.Module, tuple[nn.Module, ...]]]:
    """Every (path, module, ancestors) of a model in registration order, tied modules once per path, cycles cut, what
    torch.compile has wrapped as if it had not."""
    todo: list[tuple[tuple[str, ...], nn.Module, tuple[nn.Module, ...]]] = [((), model, ())]
    for _ in range(MAX_PATHS):
        if not todo:
            return
        path, module, above = todo.pop()
        yield path, module, above
        below = (*above, module)
        found = [(n, unwrapped(c)) for n, c in module._modules.items() if c is not None]
        children = [(n, c) for n, c in found if not any(c is a for a in below)]
        todo.extend(((*path, name), child, below) for name, child in reversed(children))


def name_modules(model: nn.Module, selection: Selection, check: bool = True) -> list[Named]:
    """The modules of `model` that get a range, each once, in registration order; the root is always first. `check`:
    raise SelectionError for a glob that names nothing."""
    named: dict[int, Named] = {}
    seen: list[tuple[str, type]] = []
    ranged: dict[tuple[str, ...], int] = {}  # path -> its depth in ranges
    for path, module, _ in walk_paths(model):
        fqn = ".".join(path)
        seen.append((fqn, type(module)))
        above = next((path[:i] for i in range(len(path) - 1, -1, -1) if path[:i] in ranged), None)
        if above is None:  # the root
            ranged[path] = 0
            named[id(module)] = Named(module, "", None)
            continue
        depth = ranged[above] + 1
        if not is_callable_module(module) or not selection.takes(fqn, type(module)):
            continue
        if selection.depth is not None and depth > selection.depth:
            continue
        ranged[path] = depth
        parent = ".".join(above)
        entry = named.get(id(module))
        if entry is None:
            entry = named[id(module)] = Named(module, fqn, parent)
        elif parent in entry.by_parent or entry.parent is None:
            entry.also.append(fqn)
        entry.by_parent.setdefault(parent, fqn)
    if check:
        selection.check(seen)
    return list(named.values())


def label_text(name: str | None, kind: type, fqn: str) -> str:
    """The root is called by its name or else its class, a child by the whole path."""
    if not fqn:
        return name or kind.__name__ or "model"
    return f"{name}.{fqn}" if name else fqn
