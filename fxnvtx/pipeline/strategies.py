"""Where a component's weights are between its uses: four answers with one interface."""

from __future__ import annotations

import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigError
from .memory import ByteAccount, Place, ResidencyRanges
from .weights import Piece, Stored, module_tensors

__all__ = ["ComponentOffload", "LayerwiseOffload", "Resident", "SnapshotOffload", "Strategy", "find_blocks"]


class Strategy(ABC):
    """Brings the weights of one module in before a use and lets them go after.

    The manager calls before_use, wait_for_use, (the use), finish_use; prefetch at any time in between uses; and
    finish_request at the end. Where loading fails the weights are where they were. Holds no reference to the module.
    """

    mode: ClassVar[str]
    offloads: ClassVar[bool] = True
    kept = False  # the last use wants the weights to stay, whatever the mode

    @property
    def stays(self) -> bool:
        """Whether the weights remain in compute memory between uses."""
        return self.kept or not self.offloads

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

    for kind in (Resident, ComponentOffload, LayerwiseOffload, SnapshotOffload):
        if kind.mode == mode:
            return kind
    raise ConfigError(f"there is no residency mode {mode!r}")


# ------------------------------------------------- one block at a time, the next one on its way while this one computes


def find_blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of a component in order: of every outermost ModuleList or Sequential that has several children
    with weights, those children."""
    found: list[tuple[str, nn.Module]] = []
    todo = [("", module)]
    while todo:
        path, parent = todo.pop(0)
        children = [(f"{path}.{name}" if path else name, child) for name, child in parent.named_children()]
        weighted = [(name, child) for name, child in children if module_tensors(child)]
        if isinstance(parent, (nn.ModuleList, nn.Sequential)) and len(weighted) > 1:
            found += weighted
        else:
            todo += children
    return found


class LayerwiseOffload(Strategy):
    """While the component is in use, hooks on its blocks bring each one in when it is called and let it go when it
    returns. At most two blocks are there at a time, besides what lies outside the blocks (embeddings, final layer) and
    what blocks share; that stays for the length of the use.

    Weights inside a block are read-only during a use, as with SnapshotOffload; change them through `update`.
    """

    mode = "layerwise-offload"

    def __init__(self, component: str, place: Place, account: ByteAccount, ranges: ResidencyRanges) -> None:
        super().__init__(component, place, account, ranges)
        self.outside = self._piece(component)
        self.blocks: list[Piece] = []
        self._modules: list[weakref.ref[nn.Module]] = []
        self._hooks: list[RemovableHandle] = []
        self._dtype: torch.dtype | None = None

    def pieces(self) -> list[Piece]:
        return [self.outside, *self.blocks]

    def refresh(self, module: nn.Module) -> None:
        blocks = find_blocks(module)
        pieces = {id(ref()): piece for ref, piece in zip(self._modules, self.blocks, strict=True)}
        known = {k: s for piece in self.pieces() for k, s in piece.known().items()}
        tensors = [module_tensors(block) for _, block in blocks]
        seen_in: dict[object, set[int]] = {}
        for index, found in enumerate(tensors):
            for tensor in found:
                seen_in.setdefault(_storage_key(tensor, known), set()).add(index)
        inside = {id(t) for found in tensors for t in found}
        outside = [t for t in module_tensors(module) if id(t) not in inside]
        shared = {_storage_key(t, known) for t in outside} | {k for k, where in seen_in.items() if len(where) > 1}
        outside += [t for found in tensors for t in found if _storage_key(t, known) in shared]
        kept = [
            pieces.pop(id(block)) if id(block) in pieces else self._piece(f"{self.component}.{path}")
            for path, block in blocks
        ]
        for gone in pieces.values():
            gone.cancel()  # before its storages may be taken over by others
        self.blocks, self._modules = kept, [weakref.ref(block) for _, block in blocks]
        for piece, found in zip(kept, tensors, strict=True):
            piece.update([t for t in found if _storage_key(t, known) not in shared], known)
        self.outside.update(outside, known)
        for gone in pieces.values():
            gone.dispose()

    def before_use(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        self._unhook()
        self._dtype = dtype
        if not self.outside.pending:
            self.outside.load(dtype)
        for piece in self.blocks:  # on the first use everything is still there
            if not piece.pending:
                piece.offload("noticed")
        for index, ref in enumerate(self._modules):
            block = ref()
            if block is not None:
                self._hook(block, index)

    def wait_for_use(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        self.outside.wait()
        self.outside.load(dtype)

    def finish_use(self, module: nn.Module) -> None:
        self._unhook()
        self.refresh(module)
        self._release("noticed")

    def give_up(self, module: nn.Module) -> None:
        self._unhook()
        self._dtype = None
        for piece in self.pieces():
            piece.cancel()
            if piece.kept:
                piece.offload("noticed")

    def prefetch(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        self.outside.prefetch(dtype)
        if self.blocks:
            self.blocks[0].prefetch(dtype)

    def prefetch_bytes(self) -> int:
        return sum(p.nbytes - p.resident_bytes for p in (self.outside, *self.blocks[:1]) if not p.pending)

    def update(self, module: nn.Module, change: Callable[[nn.Module], None], in_use: bool) -> None:
        """Call `change` on one block after the other, then on each part that holds no block."""
        for piece, ref in zip(self.blocks, list(self._modules), strict=True):
            block = ref()
            if block is not None:
                self._change(piece, block, change)
        for part in _parts_without(module, {id(ref()) for ref in self._modules}):
            self._change(self.outside, part, change, stays=True)
        self.refresh(module)
        if not in_use:
            self._release("all")

    def _change(self, piece: Piece, part: nn.Module, change: Callable[[nn.Module], None], stays: bool = False) -> None:
        piece.wait()
        piece.load(None)
        try:
            change(part)
        finally:
            piece.save()
            if not stays:
                piece.offload("noticed")

    def bring_back(self, module: nn.Module) -> None:
        self._unhook()
        for piece in self.pieces():
            piece.wait()
            piece.load(None)

    @property
    def bound_bytes(self) -> int:
        return self.outside.nbytes + sum(sorted((p.nbytes for p in self.blocks), reverse=True)[:2])

    # ------------------------------------------------------------------------------------------------- details

    def _piece(self, name: str) -> Piece:
        return Piece(name, self.component, self.place, self.account, self.ranges)

    def _release(self, keep: str) -> None:
        for piece in (*self.blocks, self.outside):
            piece.offload(keep)

    def _hook(self, block: nn.Module, index: int) -> None:
        def before(_module: nn.Module, _args: Any) -> None:
            self._enter(index)

        def after(_module: nn.Module, _args: Any, _result: Any) -> None:
            self.blocks[index].offload("noticed")

        self._hooks.append(block.register_forward_pre_hook(_as_is(before), prepend=True))
        self._hooks.append(block.register_forward_hook(_as_is(after), always_call=True))

    def _enter(self, index: int) -> None:
        following = self.blocks[(index + 1) % len(self.blocks)]
        for piece in self.blocks:  # a block that was expected and did not come
            if piece.pending and piece is not self.blocks[index] and piece is not following:
                piece.cancel()
        self.blocks[index].wait()
        self.blocks[index].load(self._dtype)
        if following is not self.blocks[index]:
            following.prefetch(self._dtype)

    def _unhook(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks = []


def _as_is(hook: Callable[..., None]) -> Callable[..., None]:
    """Dynamo must run a hook as it is, between two graphs: traced, what it does would be baked in."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled here, and asking would import it: a second
        return hook
    disabled: Callable[..., None] = torch.compiler.disable(hook)
    return disabled


def _parts_without(module: nn.Module, blocks: set[int]) -> list[nn.Module]:
    """The outermost descendants of a module in which none of `blocks` lies."""
    found = []
    for child in module.children():
        if not any(id(m) in blocks for m in child.modules()):
            found.append(child)
        elif id(child) not in blocks:
            found += _parts_without(child, blocks)
    return found


def _storage_key(tensor: Tensor, known: dict[int, Stored]) -> object:
    """Equal for tensors that look into one storage, also while its memory is let go."""
    owner = known.get(id(tensor))
    if owner is not None and not owner.resident and owner.matches(tensor):
        return "offloaded", id(owner)
    return tensor.untyped_storage().data_ptr() or ("empty", id(tensor))
