"""Memory for weights: a GPU's and pinned host memory, or the machine's and files; how many bytes, and its ranges.

Nothing else in a capture tells a load from a layer, so weights that move have ranges of their own.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .. import ranges
from ..errors import OutputError

__all__ = [
    "ByteAccount",
    "CudaPlace",
    "FileSlot",
    "HostSlot",
    "MemoryPlace",
    "PinnedSlot",
    "Place",
    "ResidencyRanges",
    "Transfer",
    "default_place",
]


# ------------------------------------------------------------------------ how much: exact, per component, with the peak


class ByteAccount:
    """Bytes of weight storage that exist in compute memory (the GPU's; the machine's where there is none).

    Counted at the moment of allocation, also on a prefetching thread, so the peak has nothing hidden in it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_component: dict[str, int] = {}
        self._total = 0
        self._peak = 0

    def add(self, component: str, nbytes: int) -> None:
        """Count `nbytes` more (negative: less) for a component."""
        with self._lock:
            self._by_component[component] = self._by_component.get(component, 0) + nbytes
            self._total += nbytes
            self._peak = max(self._peak, self._total)

    def of(self, component: str) -> int:
        with self._lock:
            return self._by_component.get(component, 0)

    @property
    def resident_bytes(self) -> int:
        return self._total

    @property
    def peak_bytes(self) -> int:
        """The most that was resident at one time since `reset_peak`."""
        return self._peak

    def reset_peak(self) -> None:
        with self._lock:
            self._peak = self._total


# --------------------------------------------------------------------------------------------------------------- ranges


class ResidencyRanges:
    """Makes `residency.load <name>`, `.wait`, `.prefetch` and `.offload`, with the bytes as payload.

    `wanted` is asked at every move: it depends on the request for which the weights move, a warm-up shows nothing.
    """

    def __init__(self, wanted: Callable[[], bool] = bool) -> None:
        self.wanted = wanted

    def __call__(self, what: str, name: str, nbytes: int) -> ranges.range:
        return ranges.range(f"residency.{what} {name}", category="residency", payload=nbytes, enabled=self.wanted())


# ------------------------------------------------------ where weights wait: a memory-mapped file, or pinned host memory


class HostSlot(Protocol):
    """Room for the bytes of one storage. Tensors here are flat uint8."""

    nbytes: int

    def write(self, data: Tensor) -> None: ...

    def read(self, out: Tensor) -> None: ...

    def holds(self, data: Tensor) -> bool: ...


class FileSlot:
    """One storage in a file of its own, mapped into memory and already unlinked: it vanishes with the process,
    however that ends, and its pages belong to the file system's cache, which gives them up under pressure."""

    def __init__(self, nbytes: int, folder: str | None) -> None:
        self.nbytes = nbytes
        try:
            with tempfile.TemporaryFile(prefix="fxnvtx-weights-", dir=folder) as file:
                # really taken from the disk: a sparse file would kill the process with SIGBUS when the disk is full
                os.posix_fallocate(file.fileno(), 0, nbytes)
                self._map = mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            place = folder or tempfile.gettempdir()
            raise OutputError(
                f"cannot keep {nbytes:,} bytes of weights in {place} ({error.strerror or error}): "
                "choose another folder with residency_dir"
            ) from error
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def write(self, data: Tensor) -> None:
        self._bytes.copy_(data)
        self._map.flush()
        self._let_go()

    def read(self, out: Tensor) -> None:
        self._map.madvise(mmap.MADV_WILLNEED)
        out.copy_(self._bytes)
        self._let_go()

    def holds(self, data: Tensor) -> bool:
        try:
            return torch.equal(self._bytes, data)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        # the mapping's pages would count as this process's memory; the file's cache keeps what it can afford
        self._map.madvise(mmap.MADV_DONTNEED)


class PinnedSlot:
    """One storage in page-locked host memory, from which a GPU copies while it computes."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def write(self, data: Tensor) -> None:
        self._bytes.copy_(data)

    def read(self, out: Tensor) -> None:
        out.copy_(self._bytes, non_blocking=True)

    def holds(self, data: Tensor) -> bool:
        return torch.equal(self._bytes, data.cpu())


# ----------------------------------------------- the two memories, and how a move goes on while something else computes


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
    """The place that belongs to a compute device: by default the current CUDA device, or the host."""
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return CudaPlace(device) if device.type == "cuda" else MemoryPlace(folder)
