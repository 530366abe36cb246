"""instrument / uninstrument / set_enabled, the same as an object, and for the length of a component's use: choose a
path for every module of a model, and take it back.

A component may be used by a method: vae.decode(x), vae.encode(x), or forward(x) without a call. `nn.Module.__call__` is
where a module's own range begins; a plain method goes around it, and its layers would lie loose in the stage. While a
component is in use its methods are wrapped on the instance, and given back after. A wrapper is a bound method like any
other: copies and pickles of the component get their own, and whoever compiles `vae.decode` while it is wrapped (Dynamo
reads what it compiles) gets the component's code and nothing of ours.
"""

from __future__ import annotations

import atexit
import functools
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn

from .. import recording
from ..compile.torch_private import dynamo_active
from ..errors import InstrumentError
from ..ranges import Entry, emit, label, local, pop, push, why_silent
from . import registry as _registry
from .call_slot import SLOT, slot_of
from .fx_graph import insert_ranges, remove_ranges
from .registry import Control, controls, controls_of, entry_of, lock, register, rename, unregister, update
from .selection import DEFAULT_EXCLUDE, Pattern, Selection, unwrapped

__all__ = [
    "METHODS",
    "Attachments",
    "DiffusionNvtxHooks",
    "instrument",
    "is_enabled",
    "label_of",
    "module_by_id",
    "set_enabled",
    "uninstrument",
    "unwrap_methods",
    "unwrapped",
    "with_root",
    "wrap_methods",
]

M = TypeVar("M", bound=nn.Module)
PATHS = ("auto", "fx", "hooks")


def instrument(
    model: M,
    name: str | None = None,
    *,
    path: str = "auto",
    depth: int | None = None,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = DEFAULT_EXCLUDE,
    shapes: bool = False,
    compile: bool = False,
) -> M:
    """Give every module of `model` a range around its calls; returns the model itself.

    The root's range is called `name`, else by its class; a child's `<name>.<fqn>`, or the bare FQN without a name.

    path: "auto" takes the generated forward of the fx path where it is provably the same function and the hooks path
        elsewhere, "hooks" takes only hooks, "fx" raises TraceError for a level it cannot take.
    include, exclude: FQN globs or module types (`exclude` replaces the default, Identity and Dropout kinds).
    depth: levels of ranges below the root.
    shapes: add a marker with the input shapes to every call.
    compile: where this model is compiled with torch's default backend, by torch.compile() without a `backend` or by its
        own compile(), take backend="fxnvtx" instead; any other backend stays.

    Nothing is in the way of a call until somebody listens. A model whose children change later (an adapter, fused
    projections, another processor, a list that grows) is read again at its next outermost call, so its ranges stay
    true; what `include` and `exclude` name then may be gone, which is no error, and under path="fx" a level that cannot
    be traced any more goes to the hooks path. Calling it again takes another name or options, and is otherwise a no-op.
    A torch.fx.GraphModule is not changed: a copy with range nodes comes back.

    Errors: InstrumentError (not a module, unknown path), SelectionError (a glob matches nothing), TraceError.
    """
    if path not in PATHS:
        raise InstrumentError(f"path must be one of {', '.join(map(repr, PATHS))}, not {path!r}")
    if name is not None and not isinstance(name, str):
        raise InstrumentError(f"name must be a str or None, not {type(name).__name__}")
    if not isinstance(model, nn.Module):
        raise InstrumentError(f"instrument takes a torch.nn.Module, not {type(model).__name__}")
    selection = Selection.of(include, exclude, depth)
    if isinstance(model, fx.GraphModule):
        copy = insert_ranges(model, name, depth=depth, include=selection.include, exclude=selection.exclude)
        return cast(M, copy)
    inner = unwrapped(model)
    control = Control(inner, name, selection, path, bool(shapes))
    control.compiles = bool(compile)
    control.scan()
    control.choose_paths()
    previous = controls_of(inner)
    if previous is not None:
        control.enabled = previous.enabled
    attach(inner, control)
    return model


def attach(model: nn.Module, control: Control) -> None:
    """Register and bring the slots in line; those of modules that left the model are taken out."""
    with lock:
        previous = controls_of(model)
        if previous is not None and same(previous, control):
            update(previous, control)
        else:
            register(model, control)


def same(a: Control, b: Control) -> bool:
    if a.compiles != b.compiles:
        return False
    return (a.name, a.selection, a.path, a.shapes, a.enabled) == (b.name, b.selection, b.path, b.shapes, b.enabled)


def uninstrument(model: M) -> M:
    """Take everything out again; returns the model. A model that is not instrumented is left as it is."""
    if not isinstance(model, nn.Module):
        raise InstrumentError(f"uninstrument takes a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, fx.GraphModule):
        return remove_ranges(model)  # type: ignore[return-value]
    unregister(unwrapped(model))
    return model


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switch the ranges of an instrumented model. Takes effect at the next outermost call of each thread; one that is
    under way goes on as it began."""
    control = controls_of(unwrapped(model)) if isinstance(model, nn.Module) else None
    if control is None:
        raise InstrumentError(f"this {type(model).__name__} is not instrumented: call fxnvtx.instrument(model) first")
    control.set_enabled(bool(enabled))


def label_of(module: nn.Module) -> str | None:
    """What instrument() calls this module, None where it has no range (excluded, skipped, too deep, unknown)."""
    found = entry_of(module)
    return found[0].text(found[1].fqn) if found is not None else None


def is_enabled(module: nn.Module) -> bool:
    """Whether set_enabled left the model that this module belongs to switched on; True for unknown modules."""
    found = entry_of(module)
    return found is None or found[0].enabled


def module_by_id(key: int) -> nn.Module | None:
    """The instrumented module (or a child of one, ranged or not) whose id() is `key`."""
    found = _registry.current(key)
    if found is not None:
        return found
    for control in controls():
        model = control.model()
        for module in model.modules() if model is not None else ():
            if id(module) == key:
                return module
    return None


# ------------------------------------------------------------------------------------------------ silence


def _silence() -> str | None:
    """Why nothing was emitted although a model is instrumented; None where there is nothing to explain."""
    known = controls()
    if not known:
        return None
    if not any(c.enabled for c in known):
        return "every instrumented model is switched off (fxnvtx.set_enabled)"
    if emit.mode == "off":
        return "FXNVTX=off"
    others = sys.modules.get("fxnvtx.compile.dynamo")
    silent = others.silent_models() if others is not None else None
    if silent is not None:
        return f"compiled by other backends, no layer inside is shown: {silent}"
    return "no instrumented model was called while it ran"


def _at_exit() -> None:
    modules = sum(len(c.entries) for c in controls()) + _registry.lost
    if modules and not emit.emitted and not emit.silence_logged:
        emit.log.warning("%d modules were instrumented but no range was emitted: %s", modules, why_silent())


recording.explain_silence = _silence
atexit.register(_at_exit)


# ---------------------------------------------------------------------------------------------- the same as an object


class DiffusionNvtxHooks:
    """Ranges around the modules of any number of models, switched on and off together. Starts switched off.

    `skip_types`: module types that get no range (default: Identity and Dropout kinds). `shapes`: a marker
    `<label> in=[[2, 3], [4]]` with the input shapes at every call. `depth`: levels of ranges below each model.
    """

    def __init__(
        self,
        skip_types: Pattern | Iterable[Pattern] = DEFAULT_EXCLUDE,
        *,
        shapes: bool = False,
        depth: int | None = None,
    ) -> None:
        self._selection = Selection.of(None, skip_types, depth)
        self._shapes = bool(shapes)
        self._enabled = False
        self._models: list[Control] = []

    @property
    def enabled(self) -> bool:
        return self._enabled

    def register_hooks(self, model: nn.Module, prefix: str = "") -> int:
        """Instrument `model` under `prefix`; returns how many of its modules were not instrumented before.

        Registering a model again picks up replaced children and another prefix. Containers that are never called
        do not count.
        """
        if not isinstance(model, nn.Module):
            raise InstrumentError(f"register_hooks takes a torch.nn.Module, not {type(model).__name__}")
        model = unwrapped(model)
        with lock:
            control = Control(model, prefix or None, self._selection, "hooks", self._shapes)
            control.enabled = self._enabled
            fresh = sum(entry_of(n.module) is None for n in control.scan())
            register(model, control)
            self._models = [c for c in self._models if c.model() not in (None, model)] + [control]
            return fresh

    def set_enabled(self, enabled: bool) -> None:
        """Takes effect at the next outermost call; a forward under way goes on as it began."""
        self._enabled = bool(enabled)
        for control in self._models:
            control.set_enabled(self._enabled)

    def remove_hooks(self) -> None:
        """Take everything out again. Safe to call twice, and in the middle of a forward."""
        with lock:
            for control in self._models:
                model = control.model()
                if model is not None and controls_of(model) is control:
                    unregister(model)
            self._models = []


# ---------------------------------------------------------------------------------------------- methods of a component


METHODS = ("encode", "decode", "forward")
# By name and function that is wrapped: components of one class share it, and a compiled one meets it again.
_wrappers: weakref.WeakValueDictionary[tuple[str, FunctionType], FunctionType] = weakref.WeakValueDictionary()


def wrap_methods(module: nn.Module, forward: bool = True) -> None:
    """Wrap those of METHODS that the module's class has and nobody replaced on the instance.

    `forward`: whether that one too; not on a module that gets compiled, Dynamo has a shorter way for a plain one.
    """
    for name in METHODS if forward else METHODS[:-1]:
        method = getattr(type(module), name, None)
        if isinstance(method, FunctionType) and name not in module.__dict__ and method is not nn.Module.forward:
            module.__dict__[name] = MethodType(_wrapper(name, method), module)


def unwrap_methods(module: nn.Module, names: tuple[str, ...] = METHODS) -> None:
    """Take the wrappers out. A module without any is left as it is."""
    for name in names:
        found = getattr(module.__dict__.get(name), "__func__", None)
        if isinstance(found, FunctionType) and found in _wrappers.values():
            del module.__dict__[name]


def with_root(module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, a compiled method of `module`, with the module's own range around it."""

    def ranged(*args: Any, **kwargs: Any) -> Any:
        entry = _open(module)
        try:
            return call(*args, **kwargs)
        finally:
            pop(entry)

    return ranged


def _wrapper(name: str, method: FunctionType) -> FunctionType:
    """The method `name` with the module's own range around it, unless that range is the innermost one already."""
    known = _wrappers.get((name, method))
    if known is not None:
        return known

    @functools.wraps(method)
    def ranged(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a constant for Dynamo, which so reads past all that follows
            return method(self, *args, **kwargs)
        entry = _open(self)
        try:
            return method(self, *args, **kwargs)
        finally:
            pop(entry)

    assert isinstance(ranged, FunctionType)
    ranged.__name__ = name  # what a pickled method asks its object for; `method` may go by another one
    _wrappers[name, method] = ranged
    return ranged


def _open(module: nn.Module) -> Entry | None:
    known = controls_of(module)
    if known is not None and emit.active and not dynamo_active():
        known.look(id(module))  # its layers may be others by now, and its root's slot is not asked
    text = label_of(module)
    if text is None or not emit.active or dynamo_active() or not is_enabled(module) or _innermost(text):
        return None
    return push(label(text, "module"), None, controls_of(module))


def _innermost(text: str) -> bool:
    stack = local.stack
    return bool(stack) and bool(stack[-1][0].text == text)


# ---------------------------------------------------------------------------------------------------------------- a use


@dataclass
class _Attached:
    prefix: str
    options: tuple[int | None, bool, tuple[str, ...]]  # depth, shapes, and what is left out

    def fits(self, options: tuple[int | None, bool, tuple[str, ...]], module: nn.Module) -> bool:
        """Whether it is as we left it, but for the name. What became of its children every outermost call sees."""
        return self.options == options and label_of(module) == self.prefix


class Attachments:
    """Which modules carry instrumentation because of a use. Keeps no module alive."""

    def __init__(self) -> None:
        self._attached: weakref.WeakKeyDictionary[nn.Module, _Attached] = weakref.WeakKeyDictionary()

    def enable(
        self,
        module: nn.Module,
        prefix: str,
        depth: int | None,
        enabled: bool = True,
        *,
        shapes: bool = False,
        without: tuple[str, ...] = (),
    ) -> None:
        """Let `module` and its layers, but for those that `without` names, show as `prefix` and `<prefix>.<fqn>`.
        Idempotent; a new prefix renames."""
        whole = not _is_compiled(module, parts=False)
        module = unwrapped(module)
        known = self._attached.get(module)
        control = controls_of(module)
        options = (depth, shapes, without)
        if known is None or control is None or not known.fits(options, module):
            instrument(module, name=prefix, depth=depth, shapes=shapes, exclude=(*DEFAULT_EXCLUDE, *without))
            self._attached[module] = _Attached(prefix, options)
        elif known.prefix != prefix:
            rename(control, prefix)
            known.prefix = prefix
        set_enabled(module, enabled)
        wrap_methods(module, forward=whole)

    def silence(self, module: nn.Module, prefix: str) -> None:
        """Let a module that is used without ranges show none. One that is not compiled has none to show; compiled
        code brings its ranges along, and is told by a name that is switched off."""
        inner = unwrapped(module)
        if inner in self._attached:
            self.disable(module)
        elif _is_compiled(module):
            self.enable(module, prefix, None, enabled=False)

    def prepare(self, module: nn.Module, prefix: str) -> None:
        """`module` is about to be compiled, whole or by a method: have its name known to the compiled code before that
        is made. A use under way goes on; without one it is silent until the first."""
        inner = unwrapped(module)
        if inner not in self._attached:
            self.enable(inner, prefix, None, enabled=False)
        unwrap_methods(inner, ("forward",))

    def disable(self, module: nn.Module) -> None:
        """Let it be silent from its next call on. What is under way ends as it began."""
        inner = unwrapped(module)
        if inner in self._attached:
            set_enabled(inner, False)
            if not _is_compiled(module):  # for that one Dynamo has noted what its methods are
                unwrap_methods(inner)

    def switch(self, module: nn.Module, enabled: bool) -> None:
        """Layer ranges on or off for a while, without detaching anything."""
        module = unwrapped(module)
        if module in self._attached:
            set_enabled(module, enabled)

    def remove(self, module: nn.Module) -> None:
        """Leave no trace in `module`; compiled code, which has its ranges built in, stays switched off. Does nothing
        where nothing was attached."""
        inner = unwrapped(module)
        if inner not in self._attached:
            return
        set_enabled(inner, False)
        unwrap_methods(inner)
        if not _is_compiled(module):
            del self._attached[inner]
            uninstrument(inner)

    def modules(self) -> list[nn.Module]:
        return list(self._attached)


def _is_compiled(module: nn.Module, parts: bool = True) -> bool:
    """Whether a module, or with `parts` anything in it, went through torch.compile or Module.compile()."""
    return any(
        unwrapped(part) is not part or _compiled_call(part) is not None
        for part in (module.modules() if parts else (module,))
    )


def _compiled_call(module: nn.Module) -> object:
    slot = slot_of(module)
    return slot.inner if slot is not None else module.__dict__.get(SLOT)
