"""Where a component's weights are between its uses: four answers with one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from ...errors import ConfigError
from .account import ByteAccount
from .marks import ResidencyRanges
from .place import Place
from .weights import Piece, module_tensors

__all__ = ["ComponentOffload", "Resident", "SnapshotOffload", "Strategy"]


class Strategy(ABC):
    """Brings the weights of one module in before a use and lets them go after.

    The manager calls before_use, wait_for_use, (the use), finish_use; prefetch at any time in between uses; and
    finish_request at the end. Where loading fails the weights are where they were. Holds no reference to the module.
    """

    mode: ClassVar[str]
    offloads: ClassVar[bool] = True

    def __init__(self, component: str, place: Place, account: ByteAccount, ranges: ResidencyRanges) -> None:
        self.component = component
        self.place = place
        self.account = account
        self.ranges = ranges

    @abstractmethod
    def refresh(self, module: nn.Module) -> None:
        """Take the module's tensors as they are now: children and parameters may have been replaced."""

    @abstractmethod
    def before_use(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        """Have the weights on their way: begin, unless a prefetch has begun."""

    @abstractmethod
    def wait_for_use(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        """Return when the weights are there."""

    @abstractmethod
    def finish_use(self, module: nn.Module) -> None:
        """The use is over: let go of what this strategy does not keep."""

    @abstractmethod
    def give_up(self, module: nn.Module) -> None:
        """Loading failed: leave the weights where they were before it."""

    @abstractmethod
    def prefetch(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        """A use is near: begin to bring in what it will need first."""

    @abstractmethod
    def prefetch_bytes(self) -> int:
        """Bytes that `prefetch` would add."""

    def finish_request(self, module: nn.Module) -> None:
        """Drop what was on its way for a use that never came."""
        for piece in self.pieces():
            piece.cancel()

    @abstractmethod
    def update(self, module: nn.Module, change: Callable[[nn.Module], None], in_use: bool) -> None:
        """Call `change` on the module, or on its parts one by one, while the weights are there, and keep what it
        changes in them. `in_use`: the weights must still be there afterwards."""

    @abstractmethod
    def bring_back(self, module: nn.Module) -> None:
        """Leave the module as if it had never been managed: all weights there, as they were made."""

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """What moves by itself."""

    @property
    def committed_bytes(self) -> int:
        """What is in memory, and what is on its way there."""
        return sum(piece.committed_bytes for piece in self.pieces())

    def dispose(self) -> None:
        """The module is gone."""
        for piece in self.pieces():
            piece.dispose()

    @property
    @abstractmethod
    def bound_bytes(self) -> int:
        """The most that this component may hold in compute memory."""


class _Whole(Strategy):
    """A component that moves as one piece."""

    keep = "all"

    def __init__(self, component: str, place: Place, account: ByteAccount, ranges: ResidencyRanges) -> None:
        super().__init__(component, place, account, ranges)
        self.piece = Piece(component, component, place, account, ranges)

    def pieces(self) -> list[Piece]:
        return [self.piece]

    def refresh(self, module: nn.Module) -> None:
        self.piece.update(module_tensors(module))

    def before_use(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        if not self.piece.pending:
            self.piece.load(dtype)

    def wait_for_use(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        self.piece.wait()
        self.piece.load(dtype)

    def finish_use(self, module: nn.Module) -> None:
        self.refresh(module)
        self.piece.offload(self.keep)

    def give_up(self, module: nn.Module) -> None:
        self.piece.cancel()  # a load that fails has changed nothing

    def prefetch(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        self.piece.prefetch(dtype)

    def prefetch_bytes(self) -> int:
        return 0 if self.piece.pending else self.piece.nbytes - self.piece.resident_bytes

    def update(self, module: nn.Module, change: Callable[[nn.Module], None], in_use: bool) -> None:
        if not in_use:
            self.wait_for_use(module, None)
        try:
            change(module)
        finally:
            self.refresh(module)
            if in_use or not self.offloads:
                self.piece.save()
            else:
                self.piece.offload("all")

    def bring_back(self, module: nn.Module) -> None:
        self.wait_for_use(module, None)

    @property
    def bound_bytes(self) -> int:
        return self.piece.nbytes


class Resident(_Whole):
    """The weights stay. A use with another dtype converts them; the originals wait in host room meanwhile."""

    mode = "resident"
    offloads = False

    def finish_use(self, module: nn.Module) -> None:
        self.refresh(module)

    def prefetch_bytes(self) -> int:
        return 0

    def prefetch(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        pass


class ComponentOffload(_Whole):
    """The whole component comes in before a use and goes out after it, with whatever was done to its weights."""

    mode = "component-offload"


class SnapshotOffload(_Whole):
    """The host copy, once made, is the truth: after a use the memory is let go and nothing is copied back.

    Changes are kept where autograd's version counter saw them, or where they were made through `update`.
    """

    mode = "snapshot-offload"
    keep = "noticed"


def strategy_class(mode: str) -> type[Strategy]:
    """The strategy of a residency mode by its name."""
    from .layerwise import LayerwiseOffload

    for kind in (Resident, ComponentOffload, LayerwiseOffload, SnapshotOffload):
        if kind.mode == mode:
            return kind
    raise ConfigError(f"there is no residency mode {mode!r}")
