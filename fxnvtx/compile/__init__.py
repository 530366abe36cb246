"""Layers inside torch.compile. The only package of fxnvtx that knows Dynamo and Inductor.

Importing it loads neither of them, nor torch, and puts each of these in place once what it concerns is imported too:

- `backend="fxnvtx"` by name: from a source tree or a zip, whose metadata is not installed, torch would not find the
  entry point;
- the user's own ranges in code that Dynamo traces;
- torch.profiler shows fxnvtx's ranges, once there can be any; on ROCm so does AMD's profiler;
- with the first slot, Dynamo must not see slots, and what other backends compile is looked at;
- a recording that asks for the work of eager layers gets it counted.

So nothing below compile/ needs to know of it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import warn_once
from . import dynamo

__all__ = ["NAME", "hide_slots", "no_longer_when_imported", "reads_none", "register", "when_imported"]

NAME = "fxnvtx"
_REGISTRY = "torch._dynamo.backends.registry"  # torch 2.0 to 2.15
_PROFILER = "torch.autograd.profiler"
_VERSION = "torch.version"
_RANGES, _MODELS = "fxnvtx.ranges", "fxnvtx.modules.registry"
# Seen in torch 2.11 to 2.15: both kinds of variable for a module live here, the second one for modules that are
# specialised on (`torch.export`, torch._dynamo.config.inline_inbuilt_nn_modules = False).
_MODULES = "torch._dynamo.variables.nn_module"
_KINDS = ("UnspecializedNNModuleVariable", "NNModuleVariable")
# How a variable reads an attribute: (self, tx, name) in all of them; the second name from torch 2.14 on
_READ = ("var_getattr", "tp_getattro_impl")

_registered = False


def register() -> None:
    """Now, or once what each piece concerns is imported. Again: nothing happens."""
    global _registered
    if _registered:
        return
    _registered = True
    when_imported(_REGISTRY, _add)
    for traced, patch in dynamo.TRACED.items():
        when_imported(traced, patch)
    when_imported(_RANGES, lambda _: when_imported(_PROFILER, _follow_sessions))
    when_imported(_RANGES, lambda _: when_imported(_VERSION, _listen_on_rocm))
    when_imported(_MODELS, _with_first_slot)
    when_imported(_MODELS, _count_work)


def _add(registry: types.ModuleType) -> None:
    """As torch does with the entry points it discovers: loaded when the backend is first used."""
    from importlib.metadata import EntryPoint

    known = getattr(registry, "_BACKENDS", None)
    if isinstance(known, dict):
        known.setdefault(NAME, EntryPoint(NAME, "fxnvtx.compile.backend:fxnvtx_backend", "torch_dynamo_backends"))
        return
    from .backend import fxnvtx_backend

    registry.register_backend(fxnvtx_backend, name=NAME)


def _follow_sessions(profiler: types.ModuleType) -> None:
    from .listeners import follow_sessions

    follow_sessions(profiler)


def _listen_on_rocm(version: types.ModuleType) -> None:
    if getattr(version, "hip", None) is not None:
        from .listeners import listen_on_rocm

        listen_on_rocm(version.hip)


def _count_work(_: types.ModuleType) -> None:
    from .. import recording

    def metering() -> Any:
        from . import metering

        return metering.metering()

    recording.metering = metering


def _with_first_slot(registry: types.ModuleType) -> None:
    registry.before_slots.append(_first_slot)


def _first_slot() -> None:
    hide_slots()
    when_imported(dynamo.HANDS_OVER, dynamo.watch_compilers)


# ------------------------------------------------------------------------------------------------------- hidden slots
#
# Dynamo must not see the slots: neither that there is one, nor that there is none.
#
# For a module without hooks Dynamo goes straight to `forward`. All others (with hooks, with a `forward` of their own in
# the module's dict, with a class that overrides `__call__`) it inlines through `nn.Module._wrapped_call_impl`, which
# reads the attribute that holds the slot. It would trace into our code and break there, and guard on what it read, so
# that a listener that comes or goes would recompile. So its variable for a module answers `None` to that question, as a
# module without a slot does, and leaves no guard.


def reads_none(module: Any) -> bool:
    """Whether calling `module` does the same where the slot's attribute is taken for None.

    So it is with nothing there, with a slot, and with what `Module.compile()` puts there on a module of ours: Dynamo
    would look through that and inline the same `_call_impl`.
    """
    from torch import nn

    from ..modules.call_slot import SLOT, slot_of

    if not isinstance(module, nn.Module):
        return False
    found = module.__dict__.get(SLOT)
    slot = slot_of(module)
    if slot is not None:
        found = slot.inner
    elif found is not None:
        from ..modules.registry import entry_of

        if entry_of(module) is None:
            return False
    # the bound method that was compiled; from torch 2.14 on inside a wrapper of torch's own
    compiled: Any = getattr(found, "_torchdynamo_orig_callable", None)
    compiled = inspect.unwrap(compiled)
    return found is None or getattr(compiled, "__self__", None) is module


@functools.cache  # once: the patch is harmless where nothing is instrumented any more
def hide_slots() -> None:
    """Patch Dynamo, now or when it gets imported."""
    when_imported(_MODULES, _patch)


def _patch(namespace: types.ModuleType) -> None:
    kinds = [getattr(namespace, name, None) for name in _KINDS]
    name = next((read for read in _READ if all(read in getattr(kind, "__dict__", ()) for kind in kinds)), None)
    if name is None:
        warn_once("slots", "this torch lets Dynamo see fxnvtx: a model with hooks may get graph breaks while listening")
        return
    from ..modules.call_slot import SLOT

    for kind in kinds:
        setattr(kind, name, _answering(getattr(kind, name), SLOT))


def _answering(original: Callable[..., Any], slot: str) -> Callable[..., Any]:
    """The variable's way of reading an attribute, except for that one."""

    @functools.wraps(original)
    def read(self: Any, tx: Any, name: str) -> Any:
        if name == slot:
            hidden = _none(self, tx, name)
            if hidden is not None:
                return hidden
        return original(self, tx, name)

    return read


def _none(variable: Any, tx: Any, slot: str) -> Any:
    """None as Dynamo writes it; Python's None where the question must go on to Dynamo."""
    from torch._dynamo.variables import ConstantVariable

    value = getattr(variable, "value", None)
    if value is None and hasattr(variable, "module_key"):
        value = tx.output.get_submodule(variable.module_key)
    effects = tx.output.side_effects
    changed = getattr(effects, "has_pending_mutation_of_attr", None)
    if not reads_none(value) or (changed is not None and changed(variable, slot)):
        return None  # the program being traced assigns to it
    return ConstantVariable.create(None)


# ------------------------------------------------------------------------------------------------- once it is imported

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
