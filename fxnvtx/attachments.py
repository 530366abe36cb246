"""Instrumentation that is on exactly while a component is in use, under the name of that use.

A root range for components that are used by a method: vae.decode(x), vae.encode(x), or forward(x) without a call.

`nn.Module.__call__` is where a module's own range begins; a plain method goes around it, and its layers would lie loose
in the stage. While a component is in use its methods are wrapped on the instance, and given back after.

A wrapper is a bound method like any other: copies and pickles of the component get their own, and whoever compiles
`vae.decode` while it is wrapped (Dynamo reads what it compiles) gets the component's code and nothing of ours.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from . import control, ranges
from .compile.torch_private import dynamo_active
from .control import controls_of, rename
from .instrument import instrument, is_enabled, label_of, set_enabled, uninstrument
from .names import DEFAULT_EXCLUDE, unwrapped
from .ranges import emit
from .slot import SLOT, slot_of

__all__ = ["METHODS", "Attachments", "unwrap_methods", "with_root", "wrap_methods"]


# -------------------------------------------------------------------------------------------------------------- methods


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
    if known is not None and emit.active and not dynamo_active():
        known.look(id(module))  # its layers may be others by now, and its root's slot is not asked
    text = label_of(module)
    if text is None or not emit.active or dynamo_active() or not is_enabled(module) or _innermost(text):
        return None
    return ranges.push(ranges.label(text, "module"), None, control.controls_of(module))


def _innermost(text: str) -> bool:
    stack = ranges.local.stack
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
