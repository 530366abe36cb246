"""Compilers look at everything a module has and everything that runs. The slot and our functions are not theirs."""

from __future__ import annotations

import sys
import types

from torch.jit import _recursive

from .compile.invisible import hide_from_dynamo
from .slot import SLOT

__all__ = ["keep_out_of_sight"]

# Where a compiled model's root has a slot, functions of these run with Dynamo watching.
_OURS = ["control", "graph", "hooks", "instrument", "levels", "names", "ranges", "recording", "slot", "soundness"]
_hidden: set[str] = set()


def keep_out_of_sight() -> None:
    """Called before the first slot is placed, and again later for what has been imported since."""
    for name in _OURS:
        module = sys.modules.get(f"{__package__}.{name}")
        if module is not None and name not in _hidden:
            _hidden.add(name)
            _hide_functions(module)
    # torch.jit.script converts whatever lies in a module's dict
    ignored = getattr(_recursive, "ignored_attributes", None)
    if isinstance(ignored, list) and SLOT not in ignored:
        ignored.append(SLOT)


def _hide_functions(module: types.ModuleType) -> None:
    for found in list(vars(module).values()):
        if getattr(found, "__module__", None) != module.__name__:
            continue
        for member in vars(found).values() if isinstance(found, type) else (found,):
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if isinstance(function, types.FunctionType):
                hide_from_dynamo(function.__code__)
