"""Which models are instrumented, and what follows for each of their modules' slots. The registry of the eager path.

Slots are in place only while somebody listens, so an instrumented model that nobody watches runs exactly as before.
Who names a module is kept per module (`_claims`), so whatever changes is brought in line for the modules it concerns,
and for no other model.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from types import MethodType, ModuleType, TracebackType
from typing import cast

from torch import nn

from ..compile.torch_private import hide_from_torchscript, hide_module, undisturbed
from ..ranges import emit, on_listeners_changed
from .call_slot import SLOT, lock, slot_of, tracing
from .instrumented import Control, Entry

__all__ = [
    "Control",
    "Entry",
    "before_slots",
    "controls",
    "controls_of",
    "entry_of",
    "lock",
    "register",
    "rename",
    "sync",
    "unregister",
    "update",
]


def _before_fork() -> None:
    # In this order everywhere: a change of listeners holds its lock while it calls sync().
    emit.listener_lock.acquire()
    lock.acquire()


def _after_fork() -> None:
    lock.release()
    emit.listener_lock.release()


# A child must not inherit a lock whose owner it does not have.
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)

Claim = tuple[Control, Entry]

_registered: dict[int, Control] = {}  # by id(root)
_claims: dict[int, list[Claim]] = {}  # by id(module): all who name it
_placed: dict[int, _Placed] = {}  # by id(module): what was put into it
_orphaned: deque[tuple[int, int]] = deque()  # (id(root), age) of controls whose model died
lost = 0  # how many modules of instrumented models have died, for the report at exit


# ------------------------------------------------------------------------------------------------ asking


def controls() -> list[Control]:
    """All instrumented models still alive, the oldest first."""
    with lock:
        found = [c for c in list(_registered.values()) if c.model() is not None]  # a model may die meanwhile
    return sorted(found, key=lambda c: c.age)


def controls_of(model: nn.Module) -> Control | None:
    found = _registered.get(id(model))
    return found if found is not None and found.model() is model else None


def entry_of(module: nn.Module) -> Claim | None:
    """The control and entry that name this module now: of the newest instrument() call that is switched on, else of
    the newest."""
    found = _winner(id(module))
    return found if found is not None and found[1].module() is module else None


def current(key: int) -> nn.Module | None:
    """The named module whose id() is `key`."""
    found = _winner(key)
    module = found[1].module() if found is not None else None
    return module if module is not None and id(module) == key else None


def _winner(key: int) -> Claim | None:
    claims = _claims.get(key)
    if claims is None:
        return None
    if len(claims) == 1:
        return claims[0]
    living = [c for c in claims if c[1].module() is not None]
    return max(living, key=lambda c: (c[0].enabled, c[0].age), default=None)


# ------------------------------------------------------------------------------------------------ changing


class _Changing:
    """Held while anything here changes, by one thread. What died meanwhile is forgotten first."""

    depth = 0

    def __enter__(self) -> None:
        lock.acquire()
        self.depth += 1
        if self.depth == 1:
            _reap()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.depth -= 1
        lock.release()

    def idle(self) -> bool:
        """Take the lock if nobody, this thread included, is in the middle of a change. For callbacks of weak
        references: they run anywhere, and must not wait."""
        if not lock.acquire(blocking=False):
            return False
        if self.depth:
            lock.release()
            return False
        return True


_changing = _Changing()


# Where a compiled model's root has a slot, functions of these packages run with Dynamo watching.
_OURS = ("modules", "ranges", "recording")
_hidden: set[str] = set()

# called before a slot is placed: whoever has to keep slots out of a compiler's sight
before_slots: list[Callable[[], None]] = []


def _keep_out_of_sight() -> None:
    """Compilers look at everything a module has and everything that runs. The slot and our functions are not theirs.

    Called before the first slot is placed, and again later for what has been imported since.
    """
    for package in (sys.modules[f"fxnvtx.{name}"] for name in _OURS):
        for module in (package, *vars(package).values()):
            name = getattr(module, "__name__", "")
            if isinstance(module, ModuleType) and name.startswith(package.__name__) and name not in _hidden:
                _hidden.add(name)
                hide_module(vars(module))
    hide_from_torchscript(SLOT)
    for call in before_slots:
        call()


def register(model: nn.Module, control: Control) -> None:
    """Let `control` name the modules of `model` from now on, in place of an earlier one."""
    _keep_out_of_sight()
    with _changing:
        previous = _registered.pop(id(model), None)
        leaving = _release(previous) if previous is not None else []
        control.registers(_reread, sync)
        control.model = weakref.ref(model, _forgetting((id(model), control.age)))
        _registered[id(model)] = control
        _claim(control)
        sync([*leaving, *control.modules()])


def update(previous: Control, control: Control) -> None:
    """Let `previous` go on with what `control`, which has the same options, has read of the model."""
    with _changing:
        leaving = _release(previous, for_good=False)
        previous.takes_over(control)
        _claim(previous)
        sync([*leaving, *previous.modules()])


def rename(control: Control, name: str | None) -> None:
    """What instrument() with another name and the same options does, without reading the model again."""
    with _changing:
        control.takes_name(name)
        sync(control.modules())


def unregister(model: nn.Module) -> Control | None:
    """Let nobody name the modules of `model`, other than who does so besides; takes their slots out."""
    with _changing:
        control = controls_of(model)
        if control is not None:
            del _registered[id(model)]
            sync(_release(control))
        return control


def _reread(control: Control) -> None:
    """The model is not what it was: read it again, and bring names, slots and generated forwards in line."""
    if tracing():
        return  # the next ordinary call will do
    with _changing:
        if not control.registered or not control.structure.changed():
            return  # another thread was faster
        try:
            with undisturbed():
                leaving = _release(control, for_good=False)
                try:
                    control.scan(check=False)
                    control.choose_paths(strict=False)
                finally:
                    _claim(control)
                sync([*leaving, *control.modules()])
        except Exception as error:  # the user's call goes on, whatever became of the model
            emit.log.warning("the ranges of %s may be out of date: %r", control.text(""), error)


def _claim(control: Control) -> None:
    for entry in control.entries:
        claims = [c for c in _claims.get(entry.key, ()) if c[1].module() is not None]
        claims.append((control, entry))
        _claims[entry.key] = claims
        if len(claims) > 1:
            for other, _ in claims:
                other.shared.add(entry.key)


def _release(control: Control, for_good: bool = True) -> list[nn.Module]:
    """Take back what a control claims; returns those of its modules that are alive."""
    if for_good:
        control.unregisters()
    control.shared.clear()
    for entry in control.entries:
        claims = [c for c in _claims.get(entry.key, ()) if c[0] is not control]
        if claims:
            _claims[entry.key] = claims
            if len(claims) == 1:
                claims[0][0].shared.discard(entry.key)
        else:
            _claims.pop(entry.key, None)
    return control.modules()


def _reap() -> None:
    """Forget models that have died. Children of them may live on with slots in place."""
    global lost
    while _orphaned:
        key, age = _orphaned.popleft()
        control = _registered.get(key)
        if control is not None and control.age == age:
            del _registered[key]
            lost += len(control.entries)
            sync(_release(control))


def _forgetting(what: tuple[int, int]) -> Callable[[object], None]:
    # What it needs is bound: it may run at interpreter exit, when globals are gone.
    def forget(
        _: object,
        tell: Callable[[tuple[int, int]], None] = _orphaned.append,
        finalizing: Callable[[], bool] = sys.is_finalizing,
    ) -> None:
        if finalizing():
            return
        tell(what)
        if _changing.idle():
            try:
                _reap()
            finally:
                lock.release()

    return forget


# ------------------------------------------------------------------------------------------------ slots


def sync(modules: Iterable[nn.Module] | None = None) -> None:
    """Put the slots of these modules, None for all, in the state that follows from who names them and who listens."""
    with _changing:
        if modules is None:
            for control in controls():
                control.refresh()
                if emit.active and control.structure.changed():
                    _reread(control)
            modules = [m for control in controls() for m in control.modules()]
        for module in _with_callers(modules):
            found = entry_of(module)
            if found is None or not emit.active:
                _remove(module)
            else:
                _place(module, *found)


def _with_callers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """These, and those that call them in a generated forward: whether that is right depends on who else names them."""
    found = {id(m): m for m in modules}
    for module in list(found.values()):
        for control, entry in _claims.get(id(module), ()):
            for above in control.callers(entry):
                found.setdefault(id(above), above)
    return list(found.values())


def _place(module: nn.Module, control: Control, entry: Entry) -> None:
    present = slot_of(module)
    inner = module.__dict__.get(SLOT) if present is None else present.inner
    occupied = SLOT in module.__dict__ if present is None else present.occupied
    level = entry.level if entry.level is not None and _names_its_children(control, entry) else None
    slot = control.slot(entry, module, level, inner, occupied)
    wanted = slot.call_root if entry.parent is None else slot.entry_point
    if present is None or module.__dict__[SLOT] != wanted:  # bound methods are equal by what they bind
        _placed.pop(id(module), None)
        module.__dict__[SLOT] = wanted
        _placed[id(module)] = _Placed(cast(MethodType, wanted), id(module))


def _names_its_children(control: Control, entry: Entry) -> bool:
    """A generated forward names its children itself: right only where nobody else does."""
    if not control.shared:
        return True
    return all(c.key not in control.shared or _winner(c.key) == (control, c) for c in entry.children.values())


def _remove(module: nn.Module) -> None:
    slot = slot_of(module)
    if slot is None:
        return
    _placed.pop(id(module), None)
    if not slot.occupied:
        del module.__dict__[SLOT]
    else:
        module.__dict__[SLOT] = slot.inner


def _overwritten(
    placed: _Placed,
    finalizing: Callable[[], bool] = sys.is_finalizing,
    known: dict[int, _Placed] = _placed,
) -> None:
    """What was put into a module is gone from there: the module died, or Module.compile() has put its own callable in
    the place. That one gets a slot around it at once: where the module is a root, nothing of ours would be called."""
    if finalizing() or known.get(placed.key) is not placed:
        return
    del known[placed.key]
    found = _winner(placed.key)
    module = found[1].module() if found is not None else None
    if found is None or module is None:
        return
    if _changing.idle():
        try:
            sync([module])
        finally:
            lock.release()
    else:
        found[0].structure.news.append(placed)


class _Placed(weakref.ref[MethodType]):
    """The bound method that was put into a module. Nothing else holds it, so it dies with its place."""

    __slots__ = ("key",)

    def __new__(cls, bound: MethodType, key: int) -> _Placed:
        return super().__new__(cls, bound, _overwritten)

    def __init__(self, bound: MethodType, key: int) -> None:
        super().__init__(bound, _overwritten)  # type: ignore[call-arg]
        self.key = key


on_listeners_changed(sync)
