"""The weights of a component, piece by piece: which storages there are, where each one's bytes are, and moving them.

A storage that is offloaded holds no memory: its tensors become empty tensors of no elements, so that a use
without loading fails loudly instead of computing with stale numbers. Parameters stay the same objects throughout.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .memory import ByteAccount, HostSlot, Place, ResidencyRanges, Transfer

log = logging.getLogger("fxnvtx.pipeline")

__all__ = ["Piece", "Stored", "module_tensors"]


def module_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module, each once."""
    found: dict[int, Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        found.setdefault(id(tensor), tensor)
    return list(found.values())


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, as far as autograd noticed."""
    return 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class _View:
    """How one tensor lies in its storage."""

    tensor: weakref.ref[Tensor]
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    version: int


class Stored:
    """One storage with the tensors that look into it (several where weights are tied as views)."""

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        storage = tensors[0].untyped_storage()
        self.nbytes = storage.nbytes()
        self.strange = tensors[0].device.type != device.type  # not in compute memory, and not by our doing
        self.resident = True
        self.slot: HostSlot | None = None
        self.cast: torch.dtype | None = None  # what it was converted to when it was loaded, if it was
        self.held = 0 if self.strange else self.nbytes  # bytes in compute memory now
        self.pointer = storage.data_ptr()
        self.views = [
            _View(weakref.ref(t), t.dtype, tuple(t.size()), tuple(t.stride()), int(t.storage_offset()), version(t))
            for t in tensors
        ]

    def alive(self) -> list[tuple[Tensor, _View]]:
        return [(t, v) for v in self.views if (t := v.tensor()) is not None]

    def matches(self, tensor: Tensor) -> bool:
        """Whether `tensor` is as this object left it: nobody gave it other data in the meantime."""
        if not self.resident:
            return tensor.numel() == 0
        return tensor.untyped_storage().data_ptr() == self.pointer

    def wants(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype to convert this storage to for a use that asks for `dtype`; None: as it is."""
        kinds = {v.dtype for v in self.views}
        if dtype is None or len(kinds) != 1 or not next(iter(kinds)).is_floating_point or dtype in kinds:
            return None
        return dtype

    def changed(self) -> bool:
        return any(version(t) != v.version for t, v in self.alive())

    def bytes_now(self) -> Tensor:
        """The storage as flat bytes, without a copy."""
        tensor = self.alive()[0][0]
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())  # type: ignore[call-overload]

    def attach(self, flat: Tensor, cast: torch.dtype | None) -> None:
        """Let the tensors look into `flat` (bytes, or elements of `cast`)."""
        storage = flat.untyped_storage()
        for tensor, view in self.alive():
            made = torch.empty(0, dtype=cast or view.dtype, device=flat.device)
            tensor.data = made.set_(storage, view.offset, view.size, view.stride)  # type: ignore[call-overload]
        self.resident, self.cast, self.held, self.pointer = True, cast, storage.nbytes(), storage.data_ptr()
        self.strange = False

    def detach(self) -> None:
        for tensor, view in self.alive():
            tensor.data = torch.empty(0, dtype=view.dtype, device=tensor.device)
        self.resident, self.cast, self.held, self.pointer = False, None, 0, 0


class Piece:
    """A set of storages that move together: a whole component, one of its blocks, or what is outside the blocks."""

    def __init__(self, name: str, component: str, place: Place, account: ByteAccount, ranges: ResidencyRanges) -> None:
        self.name = name
        self.component = component
        self.place = place
        self.account = account
        self.ranges = ranges
        self.stored: list[Stored] = []
        self._pending: Transfer | None = None
        self._pending_for: list[tuple[Stored, torch.dtype | None]] = []
        self._counted = 0

    # ---------------------------------------------------------------------------------------------- what there is

    def update(self, tensors: Iterable[Tensor], known: dict[int, Stored] | None = None) -> None:
        """Take the tensors as they are now. Those still as they were left keep their place; new ones, or ones that
        were given other data, count as resident; those that are gone are forgotten. `known`: storages, by the id of
        their tensors, that may come from another piece."""
        owners = self.known() if known is None else known
        kept: dict[int, Stored] = {}
        fresh: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            owner = owners.get(id(tensor))
            if owner is not None and owner.matches(tensor):
                kept[id(owner)] = owner
            elif tensor.untyped_storage().nbytes() and tensor.device.type != "meta":
                fresh.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        if not fresh and kept.keys() == {id(s) for s in self.stored}:
            return
        self.cancel()
        for owner in [o for o in kept.values() if o.resident and o.pointer in fresh]:
            fresh[owner.pointer] = [*(t for t, _ in owner.alive()), *fresh[owner.pointer]]
            del kept[id(owner)]
        self.stored = [*kept.values(), *(Stored(group, self.place.device) for group in fresh.values())]
        self._recount()

    def known(self) -> dict[int, Stored]:
        """The storages by the id of the tensors that look into them."""
        return {id(t): s for s in self.stored for t, _ in s.alive()}

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, wherever they are."""
        return sum(s.nbytes for s in self.stored)

    @property
    def resident_bytes(self) -> int:
        return sum(s.held for s in self.stored)

    @property
    def kept(self) -> bool:
        """Whether all of it has a host copy, so that letting it go needs no room."""
        return all(s.slot is not None for s in self.stored)

    @property
    def pending(self) -> bool:
        return self._pending is not None

    @property
    def committed_bytes(self) -> int:
        """What is in memory, and what is on its way there, counted yet or not."""
        return self.resident_bytes + _nbytes(self._pending_for)

    def missing(self, dtype: torch.dtype | None = None) -> list[tuple[Stored, torch.dtype | None]]:
        """What must be brought in, or in again with another dtype, before a use with `dtype`."""
        wanted = ((s, s.wants(dtype)) for s in self.stored)
        return [(s, cast) for s, cast in wanted if not s.resident or s.cast != cast or s.strange]

    # --------------------------------------------------------------------------------------------------- moving

    def load(self, dtype: torch.dtype | None = None) -> None:
        """Bring everything in that is not. Where that fails nothing has changed."""
        missing = self.missing(dtype)
        if missing:
            with self.ranges("load", self.name, _nbytes(missing)):
                self._secure(missing)
                self._put(missing, self._fetch(missing))

    def prefetch(self, dtype: torch.dtype | None = None) -> None:
        """Begin to bring in what is not there; `wait` ends it."""
        missing = [(s, cast) for s, cast in self.missing(dtype) if not s.resident]
        if self._pending is None and missing:
            shown = self.ranges("prefetch", self.name, _nbytes(missing))

            def move() -> list[Tensor]:
                with shown:
                    return self._fetch(missing)

            self._pending_for = missing
            self._pending = self.place.start(move)

    def wait(self) -> None:
        """Finish a prefetch. One that failed has changed nothing, and is left to `load` to try again."""
        pending, missing = self._pending, self._pending_for
        self._pending, self._pending_for = None, []
        if pending is None:
            return
        with self.ranges("wait", self.name, _nbytes(missing)):
            try:
                made = pending.wait()
            except Exception as error:
                # its text only: a log that kept the exception would keep the frames above, and so the module, alive
                log.warning("bringing %s in ahead of its use failed (%s): trying once more", self.name, str(error))
                return
            self._put(missing, made)

    def cancel(self) -> None:
        """Drop a prefetch that nobody needs any more."""
        pending, self._pending, self._pending_for = self._pending, None, []
        if pending is not None:
            try:
                made = pending.wait()
            except Exception:  # its weights are not wanted, neither is its failure
                return
            self.account.add(self.component, -sum(m.nbytes for m in made))
            del made

    def save(self) -> None:
        """Write changes to the host copies, where there are any, and leave the memory as it is."""
        for stored in self.stored:
            if stored.resident and stored.slot is not None and stored.alive():
                self._save(stored, "all")

    def dispose(self) -> None:
        """The module is gone: so are its weights, from the account too."""
        self.cancel()
        self.stored = []
        self._recount()

    def offload(self, keep: str) -> None:
        """Let the memory go. `keep`: what happens to changes made to the weights meanwhile. "all": every change is
        written to the host copy; "noticed": those that autograd's version counter saw."""
        self.cancel()
        leaving = [s for s in self.stored if s.resident]
        if leaving:
            with self.ranges("offload", self.name, sum(s.held for s in leaving)):
                for stored in leaving:
                    if stored.alive():
                        self._save(stored, keep)
                for stored in leaving:
                    stored.detach()
            self._recount()

    # ------------------------------------------------------------------------------------------------- details

    def _secure(self, missing: list[tuple[Stored, torch.dtype | None]]) -> None:
        """Resident storages about to be converted need a host copy of the original first."""
        for stored, cast in missing:
            if stored.resident and stored.cast is None and cast is not None:
                self._save(stored, "all")

    def _save(self, stored: Stored, keep: str) -> None:
        if stored.cast is not None:
            return  # a converted copy; the original is in the slot
        if stored.slot is None:
            slot = self.place.slot(stored.nbytes)
            slot.write(stored.bytes_now())
            stored.slot = slot
        elif stored.changed() or (keep == "all" and not stored.slot.holds(stored.bytes_now())):
            stored.slot.write(stored.bytes_now())
        else:
            return
        stored.views = [_View(v.tensor, v.dtype, v.size, v.stride, v.offset, version(t)) for t, v in stored.alive()]

    def _fetch(self, missing: list[tuple[Stored, torch.dtype | None]]) -> list[Tensor]:
        """New memory with the bytes of the host copies; all of it, or an exception and none."""
        made: list[Tensor] = []
        counted = 0
        try:
            for stored, cast in missing:
                flat = self.place.allocate(stored.nbytes)
                counted += flat.nbytes
                self.account.add(self.component, flat.nbytes)
                if stored.slot is not None:
                    stored.slot.read(flat)
                else:
                    flat.copy_(stored.bytes_now())  # from another device, and to stay
                if cast is not None:
                    converted = flat.view(stored.views[0].dtype).to(cast)
                    counted += converted.nbytes
                    self.account.add(self.component, converted.nbytes)
                    counted -= flat.nbytes
                    self.account.add(self.component, -flat.nbytes)
                    flat = converted
                made.append(flat)
        except BaseException:
            self.account.add(self.component, -counted)
            raise
        return made

    def _put(self, missing: list[tuple[Stored, torch.dtype | None]], made: list[Tensor]) -> None:
        for (stored, cast), flat in zip(missing, made, strict=True):
            stored.attach(flat, cast)
        self._counted += sum(m.nbytes for m in made)
        self._recount()

    def _recount(self) -> None:
        now = self.resident_bytes
        self.account.add(self.component, now - self._counted)
        self._counted = now


def _nbytes(missing: list[tuple[Stored, torch.dtype | None]]) -> int:
    return sum(stored.nbytes for stored, _ in missing)
