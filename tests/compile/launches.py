"""An independent witness: every kernel launch of Inductor's generated code, timed without fxnvtx's help.

Generated code calls extern kernels as attributes of one object, operators of torch through `torch.ops`, and its own C++
kernels through globals of the generated module. The first and the last are replaced by timing functions; shapes are
those of the tensors that were really passed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import torch

from fxnvtx.recording import Range, Recording


@dataclass
class Launch:
    name: str
    shapes: list[tuple[int, ...]]
    thread_id: int
    start_ns: int
    end_ns: int
    storages: frozenset[int] = frozenset()  # addresses of the memory that was handed over


READY_MADE = ("addmm", "mm", "bmm", "baddbmm", "convolution", "_mm_plus_mm", "bias_addmm")
IN_PLACE = ("zero_", "fill_", "copy_")  # what generated code launches by a tensor's own methods


class KernelError(Exception):
    """Raised in the place of a kernel."""


def generated_modules() -> list[Any]:
    from torch._inductor.codecache import PyCodeCache

    return [m for m in PyCodeCache.modules if hasattr(m, "call") or hasattr(m, "Runner")]


def kernels_of(module: Any) -> dict[str, Any]:
    """C++ kernels are functions; Triton kernels (also the user's own) are objects with a `run`."""
    return {
        k: v
        for k, v in vars(module).items()
        if (k.startswith("cpp_fused") and callable(v))
        or type(v).__module__.startswith("torch._inductor.runtime.triton")
    }


class TimedTriton:
    """Stands for a Triton kernel in generated code, which calls `kernel.run(...)`."""

    def __init__(self, kernel: Any, run: Any) -> None:
        self._kernel = kernel
        self.run = run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


@contextlib.contextmanager
def witness(fail_at: int | None = None) -> Iterator[list[Launch]]:
    """Collect the launches of all code generated so far. `fail_at`: the launch with this number raises KernelError."""
    from torch._inductor.select_algorithm import extern_kernels

    seen: list[Launch] = []
    undo: list[Callable[[], None]] = []

    def timing(name: str, kernel: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if fail_at is not None and len(seen) == fail_at:
                seen.append(Launch(name, [], threading.get_native_id(), 0, 0))
                raise KernelError(name)
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            shapes = [tuple(a.shape) for a in tensors]
            storages = frozenset(a.untyped_storage().data_ptr() for a in tensors)
            start = perf_counter_ns()
            try:
                return kernel(*args, **kwargs)
            finally:
                seen.append(Launch(name, shapes, threading.get_native_id(), start, perf_counter_ns(), storages))

        return run

    registered = [name for name, kernel in vars(extern_kernels).items() if callable(kernel)]  # bmm_dtype, _int_mm, ...
    for name in dict.fromkeys((*READY_MADE, *registered)):
        if hasattr(extern_kernels, name):
            own = name in vars(extern_kernels)
            kernel = getattr(extern_kernels, name)
            setattr(extern_kernels, name, timing(name, kernel))
            put_back = functools.partial(setattr, extern_kernels, name, kernel)
            undo.append(put_back if own else functools.partial(delattr, extern_kernels, name))
    for kind in (torch._ops.OpOverload, torch._ops.OpOverloadPacket):
        original = kind.__call__

        def call(self: Any, *args: Any, __original: Any = original, **kwargs: Any) -> Any:
            name = str(self)
            caller = sys._getframe(1).f_globals
            if "extern_kernels" not in caller or "async_compile" in caller or name.startswith("inductor._"):
                return __original(self, *args, **kwargs)  # not generated code, or a view that launches nothing
            return timing(name, functools.partial(__original, self))(*args, **kwargs)

        setattr(kind, "__call__", call)  # noqa: B010
        undo.append(functools.partial(setattr, kind, "__call__", original))
    for name in IN_PLACE:
        method = getattr(torch.Tensor, name)

        def on_tensor(self: Any, *args: Any, __name: str = name, __method: Any = method, **kwargs: Any) -> Any:
            if "extern_kernels" not in sys._getframe(1).f_globals:
                return __method(self, *args, **kwargs)
            return timing(f"Tensor.{__name}", __method)(self, *args, **kwargs)

        setattr(torch.Tensor, name, on_tensor)
        undo.append(functools.partial(delattr, torch.Tensor, name))
    for module in generated_modules():
        for name, kernel in kernels_of(module).items():
            runs = hasattr(kernel, "run")
            stand_in = TimedTriton(kernel, timing(name, kernel.run)) if runs else timing(name, kernel)
            setattr(module, name, stand_in)
            undo.append(functools.partial(setattr, module, name, kernel))
    try:
        yield seen
    finally:
        for back in reversed(undo):
            back()


def enclosing(recording: Recording, launch: Launch) -> list[Range]:
    """The ranges open during the whole launch on its thread, outermost first."""
    around = [
        r
        for r in recording.ranges
        if r.thread_id == launch.thread_id
        and r.start_ns <= launch.start_ns
        and r.end_ns is not None
        and launch.end_ns <= r.end_ns
    ]
    return sorted(around, key=lambda r: r.depth)


def check_nesting(recording: Recording) -> None:
    """Every module's range lies in a module it is part of (a call graph through other parents is not in our models)."""
    above: list[Range] = []
    for item in recording.ranges:
        del above[item.depth :]
        if item.category == "module" and above and above[-1].category == "module" and above[-1].label != "backward":
            assert item.label.startswith(f"{above[-1].label}."), (above[-1].label, item.label)
        above.append(item)


def innermost(recording: Recording, launch: Launch) -> str | None:
    around = enclosing(recording, launch)
    return around[-1].label if around else None


def empty_ranges(recording: Recording, launches: list[Launch]) -> list[Range]:
    """Ranges in which nothing was launched."""

    def holds(item: Range, launch: Launch) -> bool:
        inside = item.start_ns <= launch.start_ns and launch.end_ns <= (item.end_ns or 0)
        return inside and item.thread_id == launch.thread_id

    return [r for r in recording.ranges if not any(holds(r, n) for n in launches)]
