"""Work carried by labels: of compiled code, made known once per table, and of eager calls, counted as they run.

A table of generated code knows what each of its launches does. Generated code goes through its rows in one order, so
how often each range opens in one run follows from the table: once per table and block, when it first runs for a
listener, its work becomes entries of labels.

Eager calls are counted while a recorder wants it, at the first call of a module with some input shapes. Torch shows
every operator of one real call to a dispatch mode that looks at shapes and calls the operator: nothing runs twice, no
value and no random number changes. The mode must not be on where torch.compile may begin, which would skip what it was
to compile. So once something was compiled in the process, only modules are counted whose code is known to call nothing
but torch's operators and each other; compiled ones among them are left out.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode  # where torch keeps it, 1.12 to 2.15

from .. import ranges as _ranges
from ..categories import MODULE
from ..errors import warn_once
from ..modules import call_slot as _slot
from ..modules.call_slot import Slot, slot_of
from ..ranges import Mark, Open, local
from ..ranges.labels import Label, input_shapes
from ..ranges.stack import Live
from ..recording import ONE_KIND, Entry, carry_work, number_of
from .region import Call
from .torch_private import dynamo_active, hide_module, jit_traces
from .work import Work, formulas, operator_work, summed

__all__ = ["metering", "register_work"]

# label, the module around where the range is no module's, and which kind of the module's calls it is
Key = tuple[str, str, int | None]


class _Mode(TorchDispatchMode):
    """Calls what it is shown, and counts it for the innermost range."""

    supports_higher_order_operators = True  # torch 2.6 to 2.15: without it they raise under a mode

    def __init__(self, count: _Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # nested tensors, DTensors: what they are made of is shown next
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
        """What a call of each label does on average, for calls that do not tell their number; and what each number's
        does, where in this call there were several."""
        kinds: dict[tuple[str, str], list[Key]] = {}
        for key in self.calls:
            if key not in self.left_out:
                kinds.setdefault(key[:2], []).append(key)
        for keys in kinds.values():
            alone = len(keys) == 1
            yield self._entry(keys, "eager", keys[0][2] if alone else None)
            if not alone:
                yield from (self._entry([key], ONE_KIND, key[2]) for key in keys)

    def _entry(self, keys: list[Key], part: str, number: int | None) -> Entry:
        work = summed([work for key in keys for work in self.works.get(key, ())])
        calls = sum(self.calls[key] for key in keys)
        return Entry(*keys[0][:2], False, part, calls, work.flops, work.moved, work.unknown, self.device, number)


def innermost() -> Key | None:
    """Which range is open on this thread."""
    stack = local.stack
    if not stack:
        return None
    text = stack[-1][0]
    module = next((entry for entry in reversed(stack) if entry[0].category == MODULE), None)
    if module is None:
        return text.text, "", None
    payload = module[2] if len(module) > 2 else None
    number = payload if type(payload) is int else None
    return text.text, "" if module is stack[-1] else module[0].text, number


class _Meter(threading.local, Live):
    """Decides per call of a module whether it is counted. Per thread: which call is."""

    count: _Count | None = None

    def __init__(self) -> None:
        self.seen: set[Any] = set()

    def number(self, slot: Slot, label: Label, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        return number_of(label.text, (id(slot), *input_shapes(args, kwargs)))

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
            carry_work(count.entries(), module)  # not where it raised: half of a call is nobody's work
            return result
        finally:
            self.count = None

    # the side that ranges calls

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
    _slot.metered = meter
    _ranges.add_sink(meter)
    try:
        yield
    finally:
        _ranges.remove_sink(meter)
        _slot.metered = None


# ------------------------------------------------------------------------------------------------- compiled code


class _Key(NamedTuple):
    label: str
    under: str


class _Base(NamedTuple):
    """The range that is open where no row's is. module: the nearest one around what opens in it. why: its calls may
    not be those of the generated function."""

    key: _Key
    module: str
    why: str


class _Table(Protocol):
    work: list[Any]
    backward: bool
    below: bool


class _Resolved(Protocol):
    levels: list[tuple[tuple[Any, Label], ...]]


def register_work(table: _Table, resolved: _Resolved, call: Call) -> None:
    """Register what the ranges of this table's rows stand for. Never raises."""
    if not table.work:
        return
    try:
        carry_work(_entries(table, resolved, call), None if call.control is None else call.control.model())
    except Exception as error:  # a model runs, whatever its work may be
        warn_once("carried work", f"the work of a compiled region is not carried: {error!r}")


def _entries(table: _Table, resolved: _Resolved, call: Call) -> Iterable[Entry]:
    opened: dict[_Key, int] = {}
    flops: dict[_Key, dict[str, int]] = {}
    moved: dict[_Key, int] = {}
    unknown: dict[_Key, str] = {}
    base = _base(table, call)
    device = next((t.device.type for held in call.alive if (t := held()) is not None), "")
    seen: set[Any] = set()
    here: tuple[tuple[Any, Label], ...] = ()
    for row, launched, size, why in table.work:
        levels = resolved.levels[row]
        same = 0
        while same < min(len(here), len(levels)) and here[same] == levels[same]:
            same += 1
        for depth in range(same, len(levels)):
            step, text = levels[depth]
            if text.category == MODULE:
                if step in seen:
                    continue  # a piece of a call that was counted
                seen.add(step)
            key = _key(levels[: depth + 1], base)
            opened[key] = opened.get(key, 0) + 1
        here = levels
        key = _key(levels, base)
        if not levels:
            opened[key] = 1
            why = why or base.why
        total = flops.setdefault(key, {})
        for kind, count in launched:
            total[kind] = total.get(kind, 0) + count
        moved[key] = moved.get(key, 0) + size
        unknown[key] = unknown.get(key) or why
    opened.setdefault(base.key, 1)
    for key, calls in opened.items():
        numbers = tuple(sorted(flops.get(key, {}).items()))
        why = unknown.get(key, "")
        yield Entry(*key, table.backward, call.region.part, calls, numbers, moved.get(key, 0), why, device)


def _key(levels: tuple[tuple[Any, Label], ...], base: _Base) -> _Key:
    if not levels:
        return base.key
    text = levels[-1][1]
    if text.category == MODULE:
        return _Key(text.text, "")
    around = [above.text for _, above in levels[:-1] if above.category == MODULE]
    return _Key(text.text, around[-1] if around else base.module)


def _base(table: _Table, call: Call) -> _Base:
    again = "a part of the code that may run several times" if table.below else ""
    if call.base is not None and call.region.framed:
        return _Base(_Key(call.base, ""), call.base, again)
    around = [entry[0].text for entry in local.stack if entry[0].category == MODULE]
    module = around[-1] if around else ""
    if call.base is not None:
        return _Base(_Key(call.base, module), module, again)
    return _Base(_Key(module, ""), module, "in a compiled function that is no module's")


hide_module(globals())  # compiled code may be called inside
