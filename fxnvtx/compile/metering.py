"""Counting the work of eager calls: while a recorder wants it, at the first call of a module with some input shapes.

Torch shows every operator of one real call to a dispatch mode that looks at shapes and calls the operator: nothing runs
twice, no value and no random number changes. The mode must not be on where torch.compile may begin, which would skip
what it was to compile. So once something was compiled in the process, only modules are counted whose code is known to
call nothing but torch's operators and each other; compiled ones among them are left out.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode  # where torch keeps it, 1.12 to 2.15

from .. import ranges as _ranges
from .. import slot as _slot
from ..categories import MODULE
from ..names import input_shapes
from ..ranges import Mark, Open, local
from ..slot import Slot, slot_of
from ..stack import Live
from ..work import Entry, register
from .torch_private import dynamo_active, hide_module, jit_traces
from .work import Work, formulas, operator_work, summed

__all__ = ["metering"]

Key = tuple[str, str]  # label, and the module around where the range is no module's


class _Mode(TorchDispatchMode):
    """Calls what it is shown, and counts it for the innermost range."""

    supports_higher_order_operators = True  # torch 2.6 to 2.15: without it they raise under a mode

    def __init__(self, count: _Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_made_of_others(func):
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        self.count.add(func, args, kwargs, result)
        return result


def _is_made_of_others(operator: Any) -> bool:
    """Whether torch runs it as other operators (it is shown whole in inference mode only). With a Python kernel for
    that, other code would run than without a mode."""
    if not isinstance(operator, torch._ops.OpOverload) or operator._overloadpacket in formulas():
        return False
    kind = torch._C.DispatchKey.CompositeImplicitAutograd
    return kind not in operator.py_kernels and torch._C._dispatch_has_kernel_for_dispatch_key(
        operator.name(), "CompositeImplicitAutograd"
    )


class _Count:
    """What was counted in one call of a module on one thread."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.calls: dict[Key, int] = {}
        self.works: dict[Key, list[Work]] = {}
        self.left_out: set[Key] = set()  # compiled: its own code tells its work
        self.mode = _Mode(self)

    def add(self, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        key = innermost()
        if key is not None:
            self.works.setdefault(key, []).append(operator_work(operator, args, kwargs, result))

    def entries(self) -> Iterator[Entry]:
        for key, calls in self.calls.items():
            if key not in self.left_out:
                work = summed(self.works.get(key, ()))
                yield Entry(*key, False, "eager", calls, work.flops, work.moved, work.unknown, self.device)


def innermost() -> Key | None:
    """Which range is open on this thread."""
    stack = local.stack
    if not stack:
        return None
    text = stack[-1][0]
    if text.category == MODULE:
        return text.text, ""
    around = (entry[0] for entry in reversed(stack[:-1]))
    return text.text, next((label.text for label in around if label.category == MODULE), "")


class _Meter(threading.local, Live):
    """Decides per call of a module whether it is counted. Per thread: which call is."""

    count: _Count | None = None

    def __init__(self) -> None:
        self.seen: set[Any] = set()

    def call(self, slot: Slot, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the body of the slot, whose range is open."""
        count = self.count
        key = (id(slot), local.stack[-1][0].text if local.stack else "", *input_shapes(args, kwargs))
        if count is not None:
            self.seen.add(key)
            if slot.inner is not None and (here := innermost()) is not None:
                count.left_out.add(here)
                with _without(count.mode):
                    return slot.body(module, *args, **kwargs)
            return slot.body(module, *args, **kwargs)
        if key in self.seen or not _may_be_counted(module):
            return slot.body(module, *args, **kwargs)
        self.seen.add(key)
        count = self.count = _Count(_device(module, args))
        try:
            own = innermost()
            if own is not None:
                count.calls[own] = 1
            with count.mode:
                result = slot.body(module, *args, **kwargs)
            register(count.entries(), module)  # not where it raised: half of a call is nobody's work
            return result
        finally:
            self.count = None

    # the side that ranges.py calls

    def opened(self, entry: Open) -> None:
        if self.count is not None and (key := innermost()) is not None:
            self.count.calls[key] = self.count.calls.get(key, 0) + 1

    def closed(self, entry: Open) -> None: ...

    def marked(self, mark: Mark) -> None: ...

    def stray_pop(self) -> None: ...


@contextmanager
def _without(mode: _Mode) -> Iterator[None]:
    """Take the mode off meanwhile, so that compiled code sees none."""
    stack = torch.utils._python_dispatch._get_current_dispatch_mode_stack()  # 2.0 to 2.15
    if not stack or stack[-1] is not mode:
        yield
        return
    mode.__exit__(None, None, None)
    try:
        yield
    finally:
        mode.__enter__()


def _device(module: nn.Module, args: tuple[Any, ...]) -> str:
    given = next((a for a in args if isinstance(a, torch.Tensor)), None)
    held = next(module.parameters(), given)
    return "" if held is None else held.device.type


def _may_be_counted(module: nn.Module) -> bool:
    """Whether nothing can be compiled during a call."""
    if dynamo_active() or jit_traces() or _slot.tracing():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # vmap, grad: values are wrapped
        return False
    slot = slot_of(module)
    if slot is None or slot.inner is not None:
        return False
    below = list(module.modules())
    if not compiled_anything() and not any(_is_compiled(m) for m in below):
        return True
    return _is_plain(module, set())


def compiled_anything() -> bool:
    """Whether torch.compile was called in this process, as far as torch remembers (2.11 to 2.15)."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:
        return False
    backends = getattr(dynamo, "cached_backends", None)
    return not isinstance(backends, dict) or any(backend is not None for backend in backends.values())


def _is_compiled(module: nn.Module) -> bool:
    slot = slot_of(module)
    inner = slot.inner if slot is not None else module.__dict__.get(_slot.SLOT)
    return inner is not None or hasattr(module, "_orig_mod")


def _is_plain(module: nn.Module, seen: set[int]) -> bool:
    """Whether the module's own code is known to call operators and its children only, and so is theirs. A compiled
    child is called through its slot, which takes the mode off."""
    if id(module) in seen:
        return True
    seen.add(id(module))
    slot = slot_of(module)
    if hasattr(module, "_orig_mod") or (slot is None and _is_compiled(module)):
        return False
    if slot is not None and slot.inner is not None:
        return True
    if module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__:
        return False
    inside = slot.inside if slot is not None else None
    proven = inside is not None and inside.level is not None
    if not proven and not type(module).forward.__module__.startswith("torch.nn.modules."):
        return False
    return all(_is_plain(child, seen) for child in module.children())


@contextmanager
def metering() -> Iterator[None]:
    """Count the eager calls of instrumented modules while the block runs. One block at a time: of several the first."""
    if _slot.metered is not None:
        yield
        return
    meter = _Meter()
    _slot.metered = meter.call
    _ranges.add_sink(meter)
    try:
        yield
    finally:
        _ranges.remove_sink(meter)
        _slot.metered = None


hide_module(globals())  # compiled code may be called inside
