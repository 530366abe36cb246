"""The call path of one instrumented module: what runs when the module is called while somebody listens.

`nn.Module.__call__` looks at one attribute, `_compiled_call_impl`, and calls what it finds there. That is the
place `Module.compile()` uses, and it is the place fxnvtx uses, because of what it is not: it is not a forward hook
(0.3 us instead of 1.2 us, and an exception in anybody's hook unwinds through our `finally`), not a replaced `forward`
(accelerate and diffusers may replace and restore that one as they like), not part of the module's state (torch
leaves it out of pickles and copies), and Dynamo ignores it when it inlines a module. It exists from torch 2.2 on.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from . import ranges as _ranges
from .compile.invisible import dynamo_active, jit_traces
from .names import input_shapes, unwrapped
from .ranges import HANDLE, Label, close_tuple, local, mark_now, nvtx_pop, nvtx_push, pop, push

if TYPE_CHECKING:
    from .control import Control
    from .levels import Level

__all__ = ["SLOT", "Around", "Slot", "in_range", "slot_of"]

SLOT = "_compiled_call_impl"
Around = Callable[[tuple[Any, ...], dict[str, Any]], "tuple[Label, object] | None"]


class Slot:
    """Lives in the module's own dict, so it dies with the module. Nothing else holds it or the module."""

    __slots__ = (
        "around",
        "attributes",
        "below",
        "body",
        "by_parent",
        "control",
        "inner",
        "label",
        "level",
        "module",
        "occupied",
        "plain",
        "prefix",
        "shapes",
        "shown",
    )

    def __init__(self, module: nn.Module, control: Control, inner: Any) -> None:
        self.module = module
        self.control = control
        self.inner = inner  # what was in the place before (a compiled callable), given back on removal
        self.occupied = False  # whether there was anything, None included
        self.plain: Any = inner if inner is not None else module._call_impl
        self.label: Label = cast(Label, None)
        self.attributes: Any = None
        self.prefix = ""
        self.by_parent: dict[str, Label] | None = None  # tied modules: label of the caller -> own label
        self.shapes = False
        self.shown: dict[tuple[object, ...], Label] = {}
        self.level: Level | None = None
        self.below: dict[str, tuple[Any, ...]] = {}
        self.body: Any = self.plain
        # (arguments) -> what this very call is for: a range around the module's own, None for no such range
        self.around: Around | None = None

    def name(
        self, label: Label, prefix: str, by_parent: dict[str, Label] | None, shapes: bool, level: Level | None
    ) -> None:
        """Set or change what this module is called, how its children's labels begin, and how its inside runs."""
        self.label = label
        self.prefix = prefix
        self.attributes = label.attributes
        self.by_parent = by_parent
        if shapes != self.shapes:
            self.shapes, self.shown = shapes, {}
        self.level = level if self.inner is None else None
        self.below = {}
        if self.level is not None:
            self.body = self.run_level
        else:
            self.body = self.run_shapes if shapes else self.plain

    @property
    def entry_point(self) -> Any:
        return self.call if self.settled else self.call_resolving

    @property
    def settled(self) -> bool:
        """Whether every call of this module shows the same one range."""
        return self.by_parent is None and not self.shapes and self.around is None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The cheapest form: one label, NVTX only. Everything else goes through `call_resolving`."""
        if not self.control.fast:
            return self.call_resolving(*args, **kwargs)
        stack = local.stack
        entry = (self.label, self.control)
        try:
            stack.append(entry)
            nvtx_push(self.attributes, HANDLE)
            if kwargs:
                return self.body(*args, **kwargs)
            return self.body(*args)  # saves copying an empty dict
        finally:
            if stack and stack[-1] is entry:
                del stack[-1]
                nvtx_pop(HANDLE)
            else:
                close_tuple(stack, entry)

    def call_root(self, *args: Any, **kwargs: Any) -> Any:
        _ranges.emitted = True
        self.control.mend()
        return self.call(*args, **kwargs) if self.settled else self.call_resolving(*args, **kwargs)

    def call_resolving(self, *args: Any, **kwargs: Any) -> Any:
        """Recorders, tied modules, shapes, and models that are switched off or being switched."""
        control = self.control
        if control in local.silent or not _ranges.active:
            return self.plain(*args, **kwargs)
        stack = local.stack
        if not control.enabled and not control.runs_on(stack):
            # Outermost call of a model that is switched off: its whole call tree stays silent, also when it is
            # switched on in the middle.
            with control.silence():
                return self.plain(*args, **kwargs)
        outer = None if self.around is None else self.around(args, kwargs)
        outermost = None if outer is None else push(*outer)
        entry = push(self.current_label(stack))
        if entry is not None:
            entry.owner = control
        try:
            return self.body(*args, **kwargs)
        finally:
            pop(entry)
            pop(outermost)

    def current_label(self, stack: list[Any]) -> Label:
        """A tied module is called by the path through which it is being reached now."""
        if self.by_parent is not None:
            for entry in reversed(stack):
                above = entry[0] if type(entry) is tuple else entry.label
                found = self.by_parent.get(above.text)
                if found is not None:
                    return found
        return self.label

    def run_shapes(self, *args: Any, **kwargs: Any) -> Any:
        self.show_shapes(args, kwargs)
        return self.plain(*args, **kwargs)

    def show_shapes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes = input_shapes(args, kwargs)
        text = self.current_label(local.stack[:-1]).text
        key = (text, *shapes)
        shown = self.shown.get(key)
        if shown is None:
            listed = ", ".join(f"[{', '.join(map(str, s))}]" for s in shapes)  # type: ignore[call-overload]
            shown = self.shown[key] = _ranges.label(f"{text} in=[{listed}]")
        mark_now(shown)

    def run_level(self, *args: Any, **kwargs: Any) -> Any:
        """The generated forward where it is proven equal to the real one just now, else the real one."""
        if self.shapes:
            self.show_shapes(args, kwargs)
        level, module = self.level, self.module
        if level is None or dynamo_active() or _traced() or not level.holds(module):
            return self.plain(*args, **kwargs)
        stack = local.stack
        label = self.label
        if self.by_parent is not None:
            above = stack[-1]
            label = above[0] if type(above) is tuple else above.label
        known = self.below.get(label.text)
        if known is None or known[0] is not level:  # another thread may give this slot another level meanwhile
            prefix = self.prefix if self.by_parent is None else f"{label.text}."
            known = self.below[label.text] = (level, level.labels_below(prefix))
        labels = known[1]
        if self.control.fast:
            return level.fast(module, stack, labels, *args, **kwargs)
        return level.general(module, stack, labels, *args, **kwargs)

    # A copy of the module must not keep calling the original. torch leaves the slot out of pickles and copies; this is
    # for classes that bring their own __getstate__ and copy everything.
    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return _silent_slot(memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        return _silent_slot, (self.module,)


class OuterSlot(Slot):
    """For a class that overrides `__call__`: a generated forward must not step past it to the slot's body."""

    __slots__ = ()


def calls_plainly(module: nn.Module) -> bool:
    """Whether calling the module does what nn.Module does, and nothing around it."""
    return type(module).__call__ is nn.Module.__call__


def _silent_slot(module: nn.Module) -> Slot:
    from .control import Control

    return Slot(module, Control.off(), None)


_module_call = nn.Module.__call__


def _traced() -> bool:
    """Whether torch.fx (it replaces nn.Module.__call__ meanwhile) or torch.jit watches the calls of modules now: a
    generated forward goes past the places where they look."""
    return nn.Module.__call__ is not _module_call or jit_traces()


def slot_of(module: nn.Module) -> Slot | None:
    """The slot in place on this module, if it is one of ours."""
    found = module.__dict__.get(SLOT)
    if type(found) is MethodType and isinstance(found.__self__, Slot):
        return found.__self__
    return None


def _brings_its_range(module: Any) -> bool:
    """Whether this is torch.compile's wrapper, put later around a module that has a slot."""
    return isinstance(module, nn.Module) and slot_of(unwrapped(module)) is not None


def in_range(module: Any, label: Label, /, *args: Any, **kwargs: Any) -> Any:
    """Call a child from a generated forward in the general form: its range is opened here, not by its own slot."""
    found = getattr(module, SLOT, None)
    slot = found.__self__ if type(found) is MethodType else None
    if isinstance(slot, OuterSlot) or (slot is None and _brings_its_range(module)):
        return module(*args, **kwargs)
    entry = push(label)
    try:
        return slot.body(*args, **kwargs) if type(slot) is Slot else module(*args, **kwargs)
    finally:
        pop(entry)
