"""The timesteps of a loop, known on the CPU before it begins.

A pipeline on a GPU keeps them there, and reading them would make the CPU wait. But they are computed on the CPU, from
the arguments of `scheduler.set_timesteps`: a shallow copy of the scheduler computes them once more, for the CPU.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .scene import here

__all__ = ["in_step", "known", "note", "number"]


def number(item: Any) -> float | None:
    """A number that can be read without waiting for a device."""
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        return float(item)
    if isinstance(item, Tensor) and item.device.type == "cpu" and item.numel() == 1 and not item.is_complex():
        return float(item)
    return None


def note(scheduler: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """After `method`, a scheduler's set_timesteps, ran with these arguments: remember what it left, if on a device."""
    here.timesteps = None
    found = getattr(scheduler, "timesteps", None)
    if isinstance(found, Tensor) and found.device.type != "cpu":
        numbers = computed(scheduler, method, args, kwargs)
        if numbers is not None and len(numbers) == len(found):
            here.timesteps = (found, numbers)


def computed(
    scheduler: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[float] | None:
    """What set_timesteps gives with device="cpu"; None where that cannot be told without touching the scheduler."""
    try:
        given = inspect.signature(method).bind(scheduler, *args, **kwargs)
        if "device" not in inspect.signature(method).parameters or any(
            isinstance(value, Tensor) and value.device.type != "cpu" for value in given.arguments.values()
        ):
            return None
        given.arguments["device"] = "cpu"
        twin = copy.copy(scheduler)
        method(twin, *given.args[1:], **given.kwargs)
        return in_step(list(twin.timesteps))
    except Exception:  # somebody else's code, run for a label only
        return None


def in_step(found: Sequence[Any]) -> list[float] | None:
    """All of them as numbers, or nothing."""
    numbers = [number(item) for item in found]
    return [n for n in numbers if n is not None] if None not in numbers else None


def known(found: Any) -> list[float] | None:
    """The numbers in what a pipeline loops over; None where they cannot be read without waiting."""
    if isinstance(found, Tensor) and found.device.type != "cpu":
        if here.timesteps is None:
            return None
        whole, numbers = here.timesteps
        start = _start(found, whole)
        return None if start is None else numbers[start : start + len(found)]
    return in_step(found)


def _start(part: Tensor, whole: Tensor) -> int | None:
    """Where `part`, the tensor itself or a slice of it, begins."""
    if part is whole:
        return 0
    if part.dim() != 1 or whole.dim() != 1 or part.stride() != whole.stride() or part.device != whole.device:
        return None
    shared = part._base is whole or (part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() != 0)
    start, rest = divmod(int(part.storage_offset() - whole.storage_offset()), whole.stride(0))
    return start if shared and not rest and start >= 0 and start + len(part) <= len(whole) else None
