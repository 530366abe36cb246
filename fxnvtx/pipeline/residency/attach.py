"""Instrumentation that is on exactly while a component is in use, under the name of that use."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import nn

from ...control import controls_of, rename
from ...instrument import instrument, label_of, set_enabled, uninstrument
from ...names import unwrapped
from ...slot import SLOT, slot_of
from .methods import unwrap_methods, wrap_methods

__all__ = ["Attachments"]


@dataclass
class _Attached:
    prefix: str
    depth: int | None
    shapes: bool

    def fits(self, depth: int | None, shapes: bool, module: nn.Module) -> bool:
        """Whether it is as we left it, but for the name. What became of its children every outermost call sees."""
        return (self.depth, self.shapes) == (depth, shapes) and label_of(module) == self.prefix


class Attachments:
    """Which modules carry instrumentation because of a use. Keeps no module alive."""

    def __init__(self) -> None:
        self._attached: weakref.WeakKeyDictionary[nn.Module, _Attached] = weakref.WeakKeyDictionary()

    def enable(
        self, module: nn.Module, prefix: str, depth: int | None, enabled: bool = True, *, shapes: bool = False
    ) -> None:
        """Let `module` and its layers show as `prefix` and `<prefix>.<fqn>`. Idempotent; a new prefix renames."""
        whole = not _is_compiled(module, parts=False)
        module = unwrapped(module)
        known = self._attached.get(module)
        control = controls_of(module)
        if known is None or control is None or not known.fits(depth, shapes, module):
            instrument(module, name=prefix, depth=depth, shapes=shapes)
            self._attached[module] = _Attached(prefix, depth, shapes)
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
