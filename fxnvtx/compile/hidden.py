"""Dynamo must not see the slots: neither that there is one, nor that there is none.

For a module without hooks Dynamo goes straight to `forward`. All others (with hooks, with a `forward` of their own in
the module's dict, with a class that overrides `__call__`) it inlines through `nn.Module._wrapped_call_impl`, which
reads the attribute that holds the slot. It would trace into our code and break there, and guard on what it read, so
that a listener that comes or goes would recompile. So its variable for a module answers `None` to that question, as a
module without a slot does, and leaves no guard.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from .._imports import when_imported
from ..slot import SLOT, slot_of
from .notices import warn_once

__all__ = ["hide_slots"]

# Seen in torch 2.11 to 2.15: both kinds of variable for a module live here, the second one for modules that are
# specialised on (`torch.export`, torch._dynamo.config.inline_inbuilt_nn_modules = False).
_WHERE = "torch._dynamo.variables.nn_module"
_KINDS = ("UnspecializedNNModuleVariable", "NNModuleVariable")
# How a variable reads an attribute: (self, tx, name) in all of them; the second name from torch 2.14 on
_READ = ("var_getattr", "tp_getattro_impl")


def reads_none(module: Any) -> bool:
    """Whether calling `module` does the same where the slot's attribute is taken for None.

    So it is with nothing there, with a slot, and with what `Module.compile()` puts there on a module of ours: Dynamo
    would look through that and inline the same `_call_impl`.
    """
    if not isinstance(module, nn.Module):
        return False
    found = module.__dict__.get(SLOT)
    slot = slot_of(module)
    if slot is not None:
        found = slot.inner
    elif found is not None:
        from ..control import entry_of

        if entry_of(module) is None:
            return False
    # the bound method that was compiled; from torch 2.14 on inside a wrapper of torch's own
    compiled: Any = getattr(found, "_torchdynamo_orig_callable", None)
    compiled = inspect.unwrap(compiled)
    return found is None or getattr(compiled, "__self__", None) is module


@functools.cache  # once: the patch is harmless where nothing is instrumented any more
def hide_slots() -> None:
    """Patch Dynamo, now or when it gets imported."""
    when_imported(_WHERE, _patch)


def _patch(namespace: types.ModuleType) -> None:
    kinds = [getattr(namespace, name, None) for name in _KINDS]
    name = next((read for read in _READ if all(read in getattr(kind, "__dict__", ()) for kind in kinds)), None)
    if name is None:
        warn_once("slots", "this torch lets Dynamo see fxnvtx: a model with hooks may get graph breaks while listening")
        return
    for kind in kinds:
        setattr(kind, name, _answering(getattr(kind, name)))


def _answering(original: Callable[..., Any]) -> Callable[..., Any]:
    """The variable's way of reading an attribute, except for that one."""

    @functools.wraps(original)
    def read(self: Any, tx: Any, name: str) -> Any:
        if name == SLOT:
            hidden = _none(self, tx)
            if hidden is not None:
                return hidden
        return original(self, tx, name)

    return read


def _none(variable: Any, tx: Any) -> Any:
    """None as Dynamo writes it; Python's None where the question must go on to Dynamo."""
    from torch._dynamo.variables import ConstantVariable

    value = getattr(variable, "value", None)
    if value is None and hasattr(variable, "module_key"):
        value = tx.output.get_submodule(variable.module_key)
    effects = tx.output.side_effects
    changed = getattr(effects, "has_pending_mutation_of_attr", None)
    if not reads_none(value) or (changed is not None and changed(variable, SLOT)):
        return None  # the program being traced assigns to it
    return ConstantVariable.create(None)
