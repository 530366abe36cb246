"""LayerwiseOffload: one block of a component at a time, the next one on its way while this one computes."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .account import ByteAccount
from .marks import ResidencyRanges
from .place import Place
from .strategies import Strategy
from .weights import Piece, Stored, module_tensors

__all__ = ["LayerwiseOffload", "find_blocks"]


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
