"""One instrumented model: what it is made of, what each of its modules is called, and by which path its range gets
emitted.

A `Control` is one call of `instrument()`. It holds the model's modules weakly; the slots that it makes for them hold
them weakly too.

Children come and go by `setattr`, `del`, ModuleList edits, or a plain write into `_modules`, and torch tells of the
first only. So the outermost call compares (`Structure`): per module with children one hash over their names and
identities, per module without any whether that still holds. About 50 ns a module, a few per cent of an instrumented
call that does nothing. Nothing here keeps a module alive, and a recycled id() cannot pass for its predecessor: deaths
are noted.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import TraceError
from ..ranges import Label, label
from ..ranges.crossing import begins_only
from .call_slot import Around, Gate, Inside, Naming, OuterSlot, Slot, calls_plainly, lock
from .selection import Named, Selection, label_text, name_modules
from .traced_forward import Level, Refused, trace_level

__all__ = ["Control", "Entry", "Structure"]

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


_ages = itertools.count(1)


@dataclass(eq=False)
class Entry:
    """One module of a model: what it is called and how its range gets emitted."""

    module: weakref.ref[nn.Module]
    key: int  # id() of the module; another one may have it once this one is dead
    kind: type
    fqn: str
    parent: str | None
    by_parent: dict[str, str]
    also: list[str]
    path: str = "hooks"
    reason: str = ""
    level: Level | None = None
    children: dict[str, Entry] = field(default_factory=dict)  # by name below this one: those it calls itself
    naming: Naming | None = None
    slot: Slot | None = None
    settled: bool = False  # whether the slot says what this entry says


class Control(Gate):
    """One instrumented model."""

    def __init__(self, model: nn.Module, name: str | None, selection: Selection, path: str, shapes: bool) -> None:
        super().__init__(shapes)
        self.model = weakref.ref(model)
        self.kind = type(model)
        self.name = name
        self.selection = selection
        self.path = path
        self.compiles = False  # whether "inductor" is to mean our backend for this model
        self.age = 0  # the later instrument() call wins a module that two name; 0: not registered
        self.shared: set[int] = set()  # ids of modules that other controls name as well
        self.entries: list[Entry] = []
        self.arounds: dict[str, Around] = {}  # by FQN: what to show around a module's own range, call by call
        self.structure = Structure(None)
        self._by_fqn: dict[str, Entry] = {}
        # Of the registry, while registered: bring this control up to date with its model; bring slots up to date
        self._reread: Callable[[Control], None] | None = None
        self._sync: Callable[[list[nn.Module]], None] | None = None

    @property
    def registered(self) -> bool:
        """Whether this is what the model is instrumented as now."""
        return self._reread is not None

    def registers(self, reread: Callable[[Control], None], sync: Callable[[list[nn.Module]], None]) -> None:
        self.age = next(_ages)
        self._reread, self._sync = reread, sync
        self.refresh()

    def unregisters(self) -> None:
        self._reread = self._sync = None
        self.enabled = False  # a shallow copy may still have a slot of ours
        self.refresh()
        for entry in self.entries:
            entry.slot = None  # it refers to us

    def set_enabled(self, enabled: bool) -> None:
        """Switch the model. Its modules are not touched, other than those that somebody else names as well."""
        with lock:
            self.enabled = enabled
            self.refresh()
            if self.shared and self._sync is not None:
                self._sync([m for e in self.entries if e.key in self.shared and (m := e.module()) is not None])

    def scan(self, check: bool = True) -> list[Named]:
        """Read the model's modules as they are now. `check`: raise SelectionError for a glob that names nothing."""
        model = self.model()
        known = {entry.key: entry for entry in self.entries}
        self.structure = Structure(model)
        named = [] if model is None else name_modules(model, self.selection, check)
        self._set_entries([_entry(n, known.get(id(n.module))) for n in named])
        return named

    def takes_over(self, other: Control) -> None:
        """Go on with what `other` has read of the same model."""
        self.structure = other.structure
        self._set_entries(other.entries)

    def takes_name(self, name: str | None) -> None:
        """Call the same modules otherwise. The list of entries is another one: that is what labels are kept by."""
        self.name = name
        self.age = next(_ages)
        for entry in self.entries:
            entry.naming, entry.settled = None, False
        self.entries = list(self.entries)

    def _set_entries(self, entries: list[Entry]) -> None:
        self.entries = entries
        self._by_fqn = {entry.fqn: entry for entry in entries}

    def modules(self) -> list[nn.Module]:
        """The modules that have a range and are still alive."""
        return [m for e in self.entries if (m := e.module()) is not None]

    def callers(self, entry: Entry) -> list[nn.Module]:
        """The modules that call this one by the names we know."""
        above = (self._by_fqn.get(parent) for parent in entry.by_parent)
        return [m for e in above if e is not None and (m := e.module()) is not None]

    def look(self, key: int) -> None:
        if self.enabled and self._reread is not None and self.structure.changed(key):
            self._reread(self)

    def look_everywhere(self) -> None:
        """See that the whole model is as it was, where no call of the root does so."""
        if self._reread is not None and self.structure.changed():
            self._reread(self)

    def text(self, fqn: str) -> str:
        return label_text(self.name, self.kind, fqn)

    def prefix(self, fqn: str) -> str:
        """How the labels of the children of `fqn` begin."""
        text = self.text(fqn) if fqn else self.name
        return f"{text}." if text else ""

    # -------------------------------------------------------------------------------------------- slots
    def naming(self, entry: Entry) -> Naming:
        if entry.naming is None:
            by_parent: dict[str, Label] | None = None
            if len(entry.by_parent) > 1:
                by_parent = {self.text(p): self._label(fqn, entry.kind) for p, fqn in entry.by_parent.items()}
            entry.naming = Naming(self._label(entry.fqn, entry.kind), by_parent)
        return entry.naming

    def _label(self, fqn: str, kind: type) -> Label:
        return label(self.text(fqn), "module", kind=kind.__name__)

    def slot(self, entry: Entry, module: nn.Module, level: Level | None, inner: object, occupied: bool) -> Slot:
        """The slot that says all this of `module`. `inner`: what else claims the place; `level`: what runs inside."""
        naming, slot = self.naming(entry), entry.slot
        if slot is None:
            slot = entry.slot = (Slot if calls_plainly(module) else OuterSlot)(module, self, naming)
        if not entry.settled:
            slot.name(naming)
            slot.holds_open = begins_only(module.forward)
        slot.cover(module, inner, occupied)
        slot.around = self.arounds.get(entry.fqn)
        level = level if inner is None else None
        if level is None and not self.shapes:
            slot.fill(None)
        elif not entry.settled or slot.inside is None or slot.inside.level is not level:
            kinds = {name: child.kind.__name__ for name, child in entry.children.items()}
            slot.fill(Inside(self, naming, slot.plain, level, self.prefix(entry.fqn), kinds))
        entry.settled = True
        return slot

    # -------------------------------------------------------------------------------------------- paths
    def choose_paths(self, strict: bool = True) -> None:
        """Decide for every level whether its forward may be replaced. Raises TraceError under path="fx" where one may
        not; with `strict` False such a level is left to the hooks path."""
        by_fqn = self._by_fqn
        for entry in self.entries:
            for parent, fqn in entry.by_parent.items():
                if parent in by_fqn:
                    by_fqn[parent].children[fqn[len(parent) + 1 :] if parent else fqn] = entry
        for entry in self.entries:
            module = entry.module()
            if not entry.children or module is None:
                continue
            if self.path == "hooks":
                entry.reason = 'path="hooks"'
                continue
            try:
                entry.level = trace_level(module, list(entry.children))
            except Refused as refused:
                entry.reason = str(refused)
                if self.path == "fx" and strict:
                    raise TraceError(
                        f"the level {self.text(entry.fqn)} ({entry.kind.__name__}) cannot be traced soundly: "
                        f'{refused}; use path="auto" to let the hooks path take it'
                    ) from None
        for entry in self.entries:
            entry.path = _path_of(entry, by_fqn)


def _entry(named: Named, known: Entry | None) -> Entry:
    """The entry of a module as it is named now. It keeps its slot, which may be in use, and labels that fit."""
    made = Entry(
        weakref.ref(named.module),
        id(named.module),
        type(named.module),
        named.fqn,
        named.parent,
        named.by_parent,
        named.also,
    )
    if known is not None and known.module() is named.module:
        made.slot = known.slot
        if (known.kind, known.fqn, known.by_parent) == (made.kind, made.fqn, made.by_parent):
            made.naming = known.naming
    return made


def _path_of(entry: Entry, by_fqn: dict[str, Entry]) -> str:
    """Who emits a module's own range: the generated forward of the level above, or its slot."""
    if entry.parent is None:
        return "fx" if entry.level is not None else "hooks"
    above = by_fqn.get(entry.parent)
    relative = entry.fqn[len(entry.parent) + 1 :] if entry.parent else entry.fqn
    inline = above is not None and above.level is not None and relative in above.level.children
    return "fx" if inline else "hooks"
