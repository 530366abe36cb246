"""A root range for components that are used by a method: vae.decode(x), vae.encode(x), or forward(x) without a call.

`nn.Module.__call__` is where a module's own range begins; a plain method goes around it, and its layers would lie loose
in the stage. While a component is in use its methods are wrapped on the instance, and given back after.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

from torch import nn

from ... import control, ranges
from ...compile.invisible import dynamo_active
from ...instrument import is_enabled, label_of

__all__ = ["METHODS", "unwrap_methods", "wrap_methods"]

METHODS = ("encode", "decode", "forward")


class _Ranged:
    """A bound method with the module's own range around it, unless that range is the innermost one already."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = weakref.ref(module)
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        assert module is not None
        method = getattr(type(module), self.name).__get__(module)
        text = label_of(module)
        if text is None or not ranges.active or dynamo_active() or not is_enabled(module) or _innermost(text):
            return method(*args, **kwargs)
        entry = ranges.push(ranges.label(text, "module"))
        if entry is not None:
            entry.owner = control.controls_of(module)
        try:
            return method(*args, **kwargs)
        finally:
            ranges.pop(entry)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Ranged:
        module = self.module()
        return _Ranged(cast(nn.Module, memo.get(id(module), module)), self.name)

    def __reduce__(self) -> Any:
        return getattr, (self.module(), self.name)


def wrap_methods(module: nn.Module, forward: bool = True) -> None:
    """Wrap those of METHODS that the module's class has and nobody replaced on the instance.

    `forward`: whether that one too; not on a module that gets compiled, Dynamo would have to read the wrapper.
    """
    for name in METHODS if forward else METHODS[:-1]:
        if callable(getattr(type(module), name, None)) and name not in module.__dict__:
            module.__dict__[name] = _Ranged(module, name)


def unwrap_methods(module: nn.Module) -> None:
    """Take the wrappers out. A module without any is left as it is."""
    for name in METHODS:
        if type(module.__dict__.get(name)) is _Ranged:
            del module.__dict__[name]


def _innermost(text: str) -> bool:
    stack = ranges.local.stack
    if not stack:
        return False
    label = stack[-1][0] if type(stack[-1]) is tuple else stack[-1].label
    return bool(label.text == text)
