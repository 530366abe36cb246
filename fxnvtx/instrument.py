"""instrument / uninstrument / set_enabled, and the same as an object: choose a path for every module of a model, and
take it back."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TypeVar, cast

from torch import fx, nn

from . import control as _control
from . import graph as _graph
from . import ranges as _ranges
from . import recording
from .control import Control, controls, controls_of, entry_of, lock, register, unregister, update
from .errors import InstrumentError
from .names import DEFAULT_EXCLUDE, Pattern, Selection, unwrapped
from .ranges import emit

__all__ = [
    "DiffusionNvtxHooks",
    "instrument",
    "is_enabled",
    "label_of",
    "module_by_id",
    "set_enabled",
    "uninstrument",
    "unwrapped",
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
        copy = _graph.insert_ranges(model, name, depth=depth, include=selection.include, exclude=selection.exclude)
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
        return _graph.remove_ranges(model)  # type: ignore[return-value]
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
    found = _control.current(key)
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
    others = sys.modules.get(f"{__package__}.compile.dynamo")
    silent = others.silent_models() if others is not None else None
    if silent is not None:
        return f"compiled by other backends, no layer inside is shown: {silent}"
    return "no instrumented model was called while it ran"


def _at_exit() -> None:
    modules = sum(len(c.entries) for c in controls()) + _control.lost
    if modules and not emit.emitted and not emit.silence_told:
        emit.log.warning("%d modules were instrumented but no range was emitted: %s", modules, _ranges.why_silent())


def _metering() -> AbstractContextManager[None]:
    from .compile.metering import metering

    return metering()


recording.explain_silence = _silence
recording.metering = _metering
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
