"""Where weights are while they are not in compute memory: a memory-mapped file, or pinned host memory."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Protocol

import torch
from torch import Tensor

from ...errors import OutputError

__all__ = ["FileSlot", "HostSlot", "PinnedSlot"]


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
