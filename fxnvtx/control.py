"""Which models are instrumented, and what follows for each of their modules' slots. The rim of the eager path.

A `Control` is one call of `instrument()`. It holds the model's modules weakly; the slots live in the modules. Slots are
in place only while somebody listens, so an instrumented model that nobody watches runs exactly as before.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from . import ranges as _ranges
from .levels import Level
from .names import Named, Selection, label_text, name_modules
from .ranges import Label, label
from .sight import keep_out_of_sight
from .slot import SLOT, Around, OuterSlot, Slot, calls_plainly, slot_of

__all__ = ["Control", "Entry", "controls", "controls_of", "entry_of", "lock", "sync"]

lock = threading.RLock()


def _before_fork() -> None:
    # In this order everywhere: a change of listeners holds its lock while it calls sync().
    _ranges._listener_lock.acquire()
    lock.acquire()


def _after_fork() -> None:
    lock.release()
    _ranges._listener_lock.release()


# A child must not inherit a lock whose owner it does not have.
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
_registered: dict[int, Control] = {}  # by id(root), in the order of instrument() calls; a later one wins a module
lost = 0  # how many modules of instrumented models have died, for the report at exit
_orphaned: list[Control] = []  # their model died, children of it may live on with slots in place
_current: dict[int, tuple[Control, Entry]] = {}  # by id(module): who names it, as of the last sync


@dataclass
class Entry:
    """One module of a model: what it is called and how its range gets emitted."""

    module: weakref.ref[nn.Module]
    kind: type
    fqn: str
    parent: str | None
    by_parent: dict[str, str]
    also: list[str]
    path: str = "hooks"
    reason: str = ""
    level: Level | None = None


class Control:
    """One instrumented model."""

    def __init__(self, model: nn.Module, name: str | None, selection: Selection, path: str, shapes: bool) -> None:
        self.model = weakref.ref(model)
        self.kind = type(model)
        self.name = name
        self.selection = selection
        self.path = path
        self.shapes = shapes
        self.enabled = True
        self.fast = False
        self.entries: list[Entry] = []
        self.arounds: dict[str, Around] = {}  # by FQN: what to show around a module's own range, call by call
        self._silent_calls = 0

    @classmethod
    def off(cls) -> Control:
        """A control that is switched off for good."""
        control = cls(nn.Module(), None, Selection(), "hooks", False)
        control.enabled = False
        return control

    def scan(self) -> list[Named]:
        """Read the model's modules as they are now."""
        model = self.model()
        named = [] if model is None else name_modules(model, self.selection)
        self.entries = [
            Entry(weakref.ref(n.module), type(n.module), n.fqn, n.parent, n.by_parent, n.also) for n in named
        ]
        return named

    def modules(self) -> list[nn.Module]:
        """The modules that have a range and are still alive."""
        return [m for e in self.entries if (m := e.module()) is not None]

    def text(self, fqn: str) -> str:
        return label_text(self.name, self.kind, fqn)

    def prefix(self, fqn: str) -> str:
        """How the labels of the children of `fqn` begin."""
        text = self.text(fqn) if fqn else self.name
        return f"{text}." if text else ""

    def label(self, fqn: str) -> Label:
        return label(self.text(fqn), "module")

    def note_kind(self, entry: Entry) -> None:
        """Leave the module's class where recordings look for it."""
        for fqn in {entry.fqn, *entry.by_parent.values()}:
            _ranges.kinds[self.text(fqn)] = entry.kind.__name__

    def labels_by_parent(self, entry: Entry) -> dict[str, Label] | None:
        if len(entry.by_parent) < 2:
            return None
        return {self.text(parent): self.label(fqn) for parent, fqn in entry.by_parent.items()}

    def runs_on(self, stack: list[Any]) -> bool:
        """Whether a call of this model that emits is under way on the thread that owns `stack`."""
        for entry in reversed(stack):
            if type(entry) is tuple:
                if entry[-1] is self:
                    return True
            elif entry.owner is self:
                return True
        return False

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Around an outermost call that began switched off."""
        silent = _ranges.local.silent
        silent.add(self)
        with lock:
            self._silent_calls += 1
            self.refresh()
        try:
            yield
        finally:
            silent.discard(self)
            with lock:
                self._silent_calls -= 1
                self.refresh()

    def set_enabled(self, enabled: bool) -> None:
        with lock:
            self.enabled = enabled
            self.refresh()

        if len(_registered) > 1:  # another instrument() call may name the same modules
            sync()

    def mend(self) -> None:
        """Module.compile() puts its own callable where a slot was: wrap it. Called at every call of the root."""
        if "torch._dynamo" not in sys.modules:
            return
        for entry in self.entries:
            module = entry.module()
            if module is not None and type(module.__dict__.get(SLOT)) is not MethodType:
                sync()
                return

    def refresh(self) -> None:
        """The cheap path is for the settled case: switched on everywhere, NVTX the only listener."""
        self.fast = (
            self.enabled and not self._silent_calls and not self.shapes and _ranges.nvtx_on and not _ranges.sinks
        )


def controls() -> list[Control]:
    """All instrumented models still alive, the oldest first."""
    with lock:
        return [c for c in list(_registered.values()) if c.model() is not None]  # a model may die meanwhile


def controls_of(model: nn.Module) -> Control | None:
    with lock:
        found = _registered.get(id(model))
    return found if found is not None and found.model() is model else None


def register(model: nn.Module, control: Control) -> None:
    key = id(model)

    def forget(_: object, key: int = key, control: Control = control) -> None:
        if _registered.get(key) is control:
            del _registered[key]
            global lost
            lost += len(control.entries)
            _orphaned.append(control)  # any thread may be in sync() just now, so no more than this

    keep_out_of_sight()
    control.model = weakref.ref(model, forget)
    with lock:
        _registered.pop(key, None)
        _registered[key] = control


def unregister(model: nn.Module) -> Control | None:
    with lock:
        control = controls_of(model)
        if control is not None:
            del _registered[id(model)]
        return control


def _who_names_what() -> dict[int, tuple[nn.Module, Control, Entry]]:
    """Who names each module: the newest instrument() call that is switched on, else the newest."""
    wanted: dict[int, tuple[nn.Module, Control, Entry]] = {}
    for control in sorted(controls(), key=lambda c: c.enabled):  # stable: age decides among equals
        for entry in control.entries:
            module = entry.module()
            if module is not None:
                wanted[id(module)] = (module, control, entry)
    return wanted


def entry_of(module: nn.Module) -> tuple[Control, Entry] | None:
    """The control and entry that name this module now."""
    found = _current.get(id(module))
    return found if found is not None and found[1].module() is module else None


def current(key: int) -> nn.Module | None:
    """The named module whose id() is `key`."""
    found = _current.get(key)
    module = found[1].module() if found is not None else None
    return module if module is not None and id(module) == key else None


def sync(leaving: list[nn.Module] | None = None) -> None:
    """Put every slot in the state that follows from who is registered and who listens."""
    with lock:
        global _current
        wanted = _who_names_what()
        _current = {key: (control, entry) for key, (_, control, entry) in wanted.items()}
        several = len(_registered) > 1
        for control in controls():
            control.refresh()
        while _orphaned:
            leaving = [*(leaving or ()), *_orphaned.pop().modules()]
        for module in leaving or ():
            if id(module) not in wanted:
                _remove(module)
        for module, control, entry in wanted.values():
            if not _ranges.active:
                _remove(module)
                continue
            level = entry.level
            if level is not None and several and not _children_agree(module, control, wanted):
                level = None
            _place(module, control, entry, level)


def _children_agree(module: nn.Module, control: Control, wanted: dict[int, tuple[nn.Module, Control, Entry]]) -> bool:
    """A generated forward names its children itself: right only where they all belong to the same control."""
    for child in module.modules():
        found = wanted.get(id(child))
        if found is not None and found[1] is not control:
            return False
    return True


def _place(module: nn.Module, control: Control, entry: Entry, level: Level | None) -> None:
    slot = slot_of(module)
    if slot is None or slot.control is not control or slot.module is not module:
        occupied = slot.occupied if slot is not None else SLOT in module.__dict__
        inner = slot.inner if slot is not None else module.__dict__.get(SLOT)
        slot = (Slot if calls_plainly(module) else OuterSlot)(module, control, inner)
        slot.occupied = occupied
    slot.around = control.arounds.get(entry.fqn)
    slot.name(
        control.label(entry.fqn), control.prefix(entry.fqn), control.labels_by_parent(entry), control.shapes, level
    )
    entry_point = slot.entry_point
    if entry.parent is None:
        entry_point = slot.call_root
    module.__dict__[SLOT] = entry_point
    control.note_kind(entry)


def _remove(module: nn.Module) -> None:
    slot = slot_of(module)
    if slot is None:
        return
    if not slot.occupied:
        del module.__dict__[SLOT]
    else:
        module.__dict__[SLOT] = slot.inner


_ranges.on_listeners_changed(sync)
