"""The call path of one instrumented module: what runs when the module is called while somebody listens.

`nn.Module.__call__` looks at one attribute, `_compiled_call_impl`, and calls what it finds there. That is the
place `Module.compile()` uses, and it is the place fxnvtx uses, because of what it is not: it is not a forward hook
(0.3 us instead of 1.2 us, and an exception in anybody's hook unwinds through our `finally`), not a replaced `forward`
(accelerate and diffusers may replace and restore that one as they like), not part of the module's state (torch
leaves it out of pickles and copies), and Dynamo ignores it when it inlines a module. It exists from torch 2.2 on.

A slot asks its model's `Gate` whether its ranges are shown now. Nothing here holds the module: a slot hands it to what
it calls, so a model that is dropped is freed at once.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter_ns
from types import MethodType
from typing import Any, Protocol

from torch import nn

from ..compile.torch_private import dynamo_active, jit_traces
from ..ranges import HANDLE, Entry, Label, begin, emit, end, label, local, mark_now, nvtx_pop, nvtx_push, pop, push
from ..ranges.crossing import held_open, surrounding
from ..ranges.emit import attend, close_deep
from ..ranges.labels import input_shapes
from .selection import unwrapped

__all__ = [
    "SLOT",
    "Around",
    "Gate",
    "Inside",
    "Naming",
    "OuterSlot",
    "Slot",
    "calls_plainly",
    "in_range",
    "lock",
    "slot_of",
    "tracing",
]

# Over everything that says which modules have ranges. Where a change of listeners is under way its lock comes first.
lock = threading.RLock()


class Gate:
    """Read by every slot of one model. Switching a model writes here and touches no module."""

    def __init__(self, shapes: bool = False) -> None:
        self.shapes = shapes
        self.enabled = True
        self.fast = False
        self.nvtx_only = False
        self._silent_calls = 0

    @classmethod
    def off(cls) -> Gate:
        """A gate that is switched off for good."""
        gate = Gate()
        gate.enabled = False
        return gate

    def refresh(self) -> None:
        """The cheap path is for the settled case: switched on everywhere, nobody to be told at once."""
        self.fast = self.enabled and not self._silent_calls and not self.shapes and emit.active and not emit.live
        self.nvtx_only = self.fast and emit.nvtx_on and not emit.sinks

    def runs_on(self, stack: list[Any]) -> bool:
        """Whether a call of this model that emits is under way on the thread that owns `stack`."""
        return any(len(entry) > 1 and entry[1] is self for entry in reversed(stack)) or any(
            crossing.owner is self for crossing in surrounding()
        )

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Around an outermost call that began switched off."""
        silent = local.silent
        silent.add(self)
        with lock:
            self._silent_calls += 1
            self.refresh()
        try:
            yield
        finally:
            silent.discard(self)
            with lock:
                self._silent_calls -= 1
                self.refresh()

    def look(self, key: int) -> None:
        """An outermost call of the module whose id() is `key` begins: see that what lies below it is as it was."""


SLOT = "_compiled_call_impl"


class Metered(Protocol):
    """Who wants to know the work of calls."""

    def number(self, slot: Slot, label: Label, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """The payload of the call's range: which kind of call it is."""

    def call(self, slot: Slot, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the body of the slot, whose range is open."""


metered: Metered | None = None  # set by compile/metering.py while a recorder wants to know the work of what it records
Around = Callable[[tuple[Any, ...], dict[str, Any]], "tuple[Label, object] | None"]
Body = Callable[..., Any]  # (module, *its arguments)


class Naming:
    """What one module is called: one label, or for a tied module one per caller."""

    __slots__ = ("by_parent", "label")

    def __init__(self, label: Label, by_parent: dict[str, Label] | None) -> None:
        self.label = label
        self.by_parent = by_parent  # label of the caller -> own label

    def now(self, stack: list[Any]) -> Label:
        """A tied module is called by the path through which it is being reached now."""
        if self.by_parent is not None:
            for entry in reversed(stack):
                found = self.by_parent.get(entry[0].text)
                if found is not None:
                    return found
            for crossing in surrounding():
                found = self.by_parent.get(crossing.label.text)
                if found is not None:
                    return found
        return self.label


class Generated(Protocol):
    """A generated forward (traced_forward.py), as slots use it."""

    @property
    def holds(self) -> Callable[[nn.Module], bool]: ...

    @property
    def fast(self) -> Callable[..., Any]: ...

    @property
    def general(self) -> Callable[..., Any]: ...

    def labels_below(self, prefix: str, kinds: dict[str, str]) -> tuple[Any, ...]: ...


class Inside:
    """What runs within a module's range where that is more than its forward: input shapes, a generated forward.

    `prefix`: how the labels of its children begin. `kinds`: the class of each child that the generated forward names.
    """

    __slots__ = ("below", "gate", "kinds", "level", "naming", "plain", "prefix", "shown")

    def __init__(
        self, gate: Gate, naming: Naming, plain: Body, level: Generated | None, prefix: str, kinds: dict[str, str]
    ) -> None:
        self.gate = gate
        self.naming = naming
        self.plain = plain
        self.level = level
        self.prefix = prefix
        self.kinds = kinds
        self.below: dict[str, tuple[Any, ...]] = {}  # by own label: labels of the children
        self.shown: dict[tuple[object, ...], Label] = {}

    def run(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """The generated forward where it is proven equal to the real one just now, else the real one."""
        if self.gate.shapes:
            self.show_shapes(args, kwargs)
        level = self.level
        if level is None or dynamo_active() or tracing() or not level.holds(module):
            return self.plain(module, *args, **kwargs)
        stack = local.stack
        label = self.naming.label
        if self.naming.by_parent is not None:
            label = stack[-1][0]
        labels = self.below.get(label.text)
        if labels is None:
            prefix = self.prefix if self.naming.by_parent is None else f"{label.text}."
            labels = self.below[label.text] = level.labels_below(prefix, self.kinds)
        if self.gate.nvtx_only:
            return level.fast(module, stack, labels, *args, **kwargs)
        return level.general(module, stack, labels, *args, **kwargs)

    def show_shapes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes = input_shapes(args, kwargs)
        text = self.naming.now(local.stack[:-1]).text
        key = (text, *shapes)
        shown = self.shown.get(key)
        if shown is None:
            listed = ", ".join(f"[{', '.join(map(str, s))}]" for s in shapes)  # type: ignore[call-overload]
            shown = self.shown[key] = label(f"{text} in=[{listed}]")
        mark_now(shown)


class Covered:
    """What was in the slot's place before (Module.compile() puts a compiled callable there). It knows its module."""

    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def run(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Slot:
    """One module's place on the call path. What lies in the module is one of its bound methods."""

    __slots__ = (
        "around",
        "attributes",
        "body",
        "gate",
        "holds_open",
        "inner",
        "inside",
        "key",
        "label",
        "module",
        "naming",
        "occupied",
        "plain",
    )

    def __init__(self, module: nn.Module, gate: Gate, naming: Naming) -> None:
        self.module = weakref.ref(module)
        self.key = id(module)
        self.gate = gate
        self.holds_open = False  # its forward only begins the work (a coroutine, a generator)
        self.inner: Any = None  # what was in the place before, given back on removal
        self.occupied = False  # whether there was anything, None included
        self.plain: Body = _forward_of(module)
        self.inside: Inside | None = None
        self.body: Body = self.plain
        # (arguments) -> what this very call is for: a range around the module's own, None for no such range
        self.around: Around | None = None
        self.name(naming)

    def name(self, naming: Naming) -> None:
        self.naming = naming
        self.label = naming.label
        self.attributes = naming.label.attributes

    def cover(self, module: nn.Module, inner: Any, occupied: bool) -> None:
        """Remember what else claims the place."""
        if inner is not self.inner:
            self.plain = _forward_of(module) if inner is None else Covered(inner).run
            self.inner = inner
            self.inside, self.body = None, self.plain
        self.occupied = occupied

    def fill(self, inside: Inside | None) -> None:
        """How the module's inside runs."""
        self.inside = inside
        self.body = self.plain if inside is None else inside.run

    @property
    def entry_point(self) -> Body:
        """The cheapest form of a call that is right for this module."""
        return self.call if self.settled else self.call_resolving

    @property
    def settled(self) -> bool:
        """Whether every call of this module shows the same one range."""
        return self.naming.by_parent is None and not self.gate.shapes and self.around is None and not self.holds_open

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The cheapest form: one label. Everything else goes through `call_resolving`.

        Two times the same, without tests in between what is timed: for NVTX alone, and for recorders. Where the stack
        is as deep as the push left it and nothing was torn off it meanwhile, our entry is the one on top.
        """
        gate = self.gate
        held = self.module  # read before it is called: looking up a method is slower
        entry: Entry
        if gate.nvtx_only:
            stack = local.stack
            depth = len(stack) + 1
            if depth == 1:
                stack.torn = False
                gate.look(self.key)
            if stack.special:
                attend(stack)
            body = self.body  # not before look(), which may change it
            module = held()
            if module is None:
                module = _calling_module()
            entry = (self.label, gate)
            try:
                stack.append(entry)
                nvtx_push(self.attributes, HANDLE)
                if kwargs:
                    return body(module, *args, **kwargs)
                if len(args) == 1:
                    return body(module, args[0])  # the usual case; saves making another tuple
                return body(module, *args)
            finally:
                if len(stack) == depth and not stack.torn:
                    del stack[-1]
                    nvtx_pop(HANDLE)
                else:
                    close_deep(stack, entry)
        if not gate.fast:
            return self.call_resolving(*args, **kwargs)
        stack = local.stack
        if not stack:
            stack.torn = False
            gate.look(self.key)
        body = self.body
        module = held()
        if module is None:
            module = _calling_module()
        if stack.special:
            attend(stack)
        log = stack.log
        depth = len(stack) + 1
        entry = (self.label, gate, None, perf_counter_ns())
        try:
            stack.append(entry)
            if log is not None:
                log.append(entry)
            if emit.nvtx_on:
                nvtx_push(self.attributes, HANDLE)
            if kwargs:
                return body(module, *args, **kwargs)
            if len(args) == 1:
                return body(module, args[0])
            return body(module, *args)
        finally:
            if len(stack) == depth and not stack.torn:
                del stack[-1]
                log = stack.log  # recorders may have come and gone
                if log is not None:
                    log += (entry, perf_counter_ns())
                if emit.nvtx_on:
                    nvtx_pop(HANDLE)
            else:
                close_deep(stack, entry)

    def call_root(self, *args: Any, **kwargs: Any) -> Any:
        emit.emitted = True
        if local.stack:  # the forms below look where nothing is open
            self.gate.look(self.key)
        return self.call(*args, **kwargs) if self.settled else self.call_resolving(*args, **kwargs)

    def call_resolving(self, *args: Any, **kwargs: Any) -> Any:
        """Recorders, tied modules, shapes, and models that are switched off or being switched."""
        gate = self.gate
        module = self.module()
        if module is None:
            module = _calling_module()
        if gate in local.silent or not emit.active:
            return self.plain(module, *args, **kwargs)
        stack = local.stack
        if not gate.enabled and not gate.runs_on(stack):
            # Outermost call of a model that is switched off: its whole call tree stays silent, also when it is
            # switched on in the middle.
            with gate.silence():
                return self.plain(module, *args, **kwargs)
        if not stack:
            stack.torn = False
            gate.look(self.key)
        outer = None if self.around is None else self.around(args, kwargs)
        if self.holds_open:
            name = self.naming.now(stack)
            return held_open(self.plain(module, *args, **kwargs), lambda: begin(name, None, gate), end)
        outermost = None if outer is None else push(*outer)
        name, meter = self.naming.now(stack), metered
        entry = push(name, None if meter is None else meter.number(self, name, args, kwargs), gate)
        try:
            if meter is not None:
                return meter.call(self, module, args, kwargs)
            return self.body(module, *args, **kwargs)
        finally:
            pop(entry)
            pop(outermost)

    # A copy of the module must not keep calling the original. torch leaves the slot out of pickles and copies; this is
    # for classes that bring their own __getstate__ and copy everything.
    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return _silent_slot(memo.get(self.key, self.module()))

    def __reduce__(self) -> tuple[Any, ...]:
        return _silent_slot, (self.module(),)


class OuterSlot(Slot):
    """For a class that overrides `__call__`: a generated forward must not step past it to the slot's body."""

    __slots__ = ()


def calls_plainly(module: nn.Module) -> bool:
    """Whether calling the module does what nn.Module does, and nothing around it."""
    return type(module).__call__ is nn.Module.__call__


def _forward_of(module: nn.Module) -> Body:
    """What nn.Module calls where the place is empty: hooks and forward."""
    return _own_call if "_call_impl" in module.__dict__ else type(module)._call_impl


def _own_call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)


def _calling_module() -> nn.Module:
    """The module whose call this is where the slot's own has died: a shallow copy, by a class that copies everything,
    has the original's slot."""
    frame = sys._getframe(2)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, nn.Module):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    raise ReferenceError("the module that was called is gone")


def _silent_slot(module: Any) -> Slot:
    return Slot(module, Gate.off(), Naming(label(type(module).__name__), None))


_module_call = nn.Module.__call__


def tracing() -> bool:
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
    if type(slot) is Slot:
        meter = metered
        entry = push(label, None if meter is None else meter.number(slot, label, args, kwargs))
        try:
            if meter is not None:
                return meter.call(slot, module, args, kwargs)
            return slot.body(module, *args, **kwargs) if kwargs else slot.body(module, *args)
        finally:
            pop(entry)
    if isinstance(slot, OuterSlot) or (slot is None and _brings_its_range(module)):
        return module(*args, **kwargs)
    entry = push(label)
    try:
        return module(*args, **kwargs)
    finally:
        pop(entry)
