"""Keep the functions of these rooms out of Dynamo's sight: some run while a compiled component is being called."""

from __future__ import annotations

import types

from ..compile.invisible import hide_from_dynamo

__all__ = ["hide_module"]


def hide_module(module: types.ModuleType) -> None:
    """Every function and method that the module defines, and the functions defined inside them."""
    for found in vars(module).values():
        if getattr(found, "__module__", None) != module.__name__:
            continue
        members = vars(found).values() if isinstance(found, type) else (found,)
        for member in members:
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if isinstance(function, types.FunctionType):
                _hide(function.__code__)


def _hide(code: types.CodeType) -> None:
    hide_from_dynamo(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _hide(constant)
