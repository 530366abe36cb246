"""The two memories that weights move between, and how a move goes on while something else computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .storage import FileSlot, HostSlot, PinnedSlot

__all__ = ["CudaPlace", "MemoryPlace", "Place", "Transfer", "default_place"]

T = TypeVar("T")


class Transfer(Protocol):
    """A move under way. `wait` returns what the move made, or raises what it raised."""

    def wait(self) -> Any: ...


class Place(Protocol):
    """Compute memory with host room behind it."""

    device: torch.device

    def allocate(self, nbytes: int) -> Tensor: ...

    def slot(self, nbytes: int) -> HostSlot: ...

    def start(self, move: Callable[[], T]) -> Transfer: ...


class MemoryPlace:
    """Without a GPU: compute memory is the machine's, host room is a memory-mapped file, and one thread moves."""

    device = torch.device("cpu")

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._mover: ThreadPoolExecutor | None = None

    def allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def slot(self, nbytes: int) -> HostSlot:
        return FileSlot(nbytes, self.folder)

    def start(self, move: Callable[[], T]) -> Transfer:
        if self._mover is None:
            self._mover = ThreadPoolExecutor(1, thread_name_prefix="fxnvtx-residency")
        return _Threaded(self._mover.submit(move))


class _Threaded:
    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def wait(self) -> Any:
        return self._future.result()


class CudaPlace:
    """With a GPU: compute memory is the device's, host room is pinned, and a side stream moves."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side: torch.cuda.Stream | None = None

    def allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def slot(self, nbytes: int) -> HostSlot:
        return PinnedSlot(nbytes)

    def start(self, move: Callable[[], T]) -> Transfer:
        if self._side is None:
            self._side = torch.cuda.Stream(self.device)
        # what was freed for this move may still be read by kernels already launched
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            made = move()
            done = torch.cuda.Event()
            done.record(self._side)
        return _Streamed(made, done, self.device)


class _Streamed:
    def __init__(self, made: Any, done: torch.cuda.Event, device: torch.device) -> None:
        self._made = made
        self._done = done
        self._device = device

    def wait(self) -> Any:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        for storage in self._made:
            storage.record_stream(stream)
        return self._made


def default_place(folder: str | None = None, device: torch.device | None = None) -> Place:
    """The place that belongs to a compute device: the current CUDA device where there is one, unless told."""
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return CudaPlace(device) if device.type == "cuda" else MemoryPlace(folder)
