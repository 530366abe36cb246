"""A root range for components that are used by a method: vae.decode(x), vae.encode(x), or forward(x) without a call.

`nn.Module.__call__` is where a module's own range begins; a plain method goes around it, and its layers would lie loose
in the stage. While a component is in use its methods are wrapped on the instance, and given back after.

A wrapper is a bound method like any other: copies and pickles of the component get their own, and whoever compiles
`vae.decode` while it is wrapped (Dynamo reads what it compiles) gets the component's code and nothing of ours.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from ... import control, ranges
from ...compile.invisible import dynamo_active
from ...instrument import is_enabled, label_of

__all__ = ["METHODS", "unwrap_methods", "with_root", "wrap_methods"]

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
            ranges.pop(entry)

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
            ranges.pop(entry)

    assert isinstance(ranged, FunctionType)
    ranged.__name__ = name  # what a pickled method asks its object for; `method` may go by another one
    _wrappers[name, method] = ranged
    return ranged


def _open(module: nn.Module) -> ranges.Entry | None:
    known = control.controls_of(module)
    if known is not None and ranges.active and not dynamo_active():
        known.look(id(module))  # its layers may be others by now, and its root's slot is not asked
    text = label_of(module)
    if text is None or not ranges.active or dynamo_active() or not is_enabled(module) or _innermost(text):
        return None
    return ranges.push(ranges.label(text, "module"), None, control.controls_of(module))


def _innermost(text: str) -> bool:
    stack = ranges.local.stack
    return bool(stack) and bool(stack[-1][0].text == text)
