"""Which strategy holds the weights of which module, and how much room there is."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ...names import unwrapped
from ..args import ServerArgs
from .memory import ByteAccount, MemoryPlace, Place, ResidencyRanges, default_place
from .strategies import Strategy, strategy_class

__all__ = ["Holdings"]


InUse = Callable[[Any], bool]


class Holdings:
    """The strategies of all modules that a manager has met. Keeps no module alive; `in_use(module)` says which ones may
    not be touched."""

    def __init__(
        self,
        kinds: Mapping[str, str],
        args: Callable[[], ServerArgs],
        place: Place | None,
        in_use: InUse,
        shows: Callable[[], bool],
    ) -> None:
        self.kinds = kinds
        self._args = args
        self.account = ByteAccount()
        self.marks = ResidencyRanges(shows)
        self._place = place
        self._in_use = in_use
        self._strategies: dict[int, tuple[weakref.ref[nn.Module], Strategy]] = {}  # by the id of the module

    @property
    def args(self) -> ServerArgs:
        """Those of the request that asks."""
        return self._args()

    def strategy(self, name: str, module: nn.Module) -> Strategy:
        """The strategy that the arguments want for component `name`; made, or changed between uses."""
        inner = unwrapped(module)
        mode = self.args.residency_mode(name, self.kinds.get(name, "other"))
        known = self.of(module)
        if known is not None and (known.mode == mode or self._in_use(module)):
            return known
        if known is not None:
            known.bring_back(inner)
            known.dispose()
        made = strategy_class(mode)(name, self._weights_place(), self.account, self.marks)
        made.refresh(inner)
        if not self._in_use(module):
            made.finish_use(inner)
        self._strategies[id(inner)] = weakref.ref(inner), made
        return made

    def of(self, module: nn.Module) -> Strategy | None:
        """The strategy that holds a module now."""
        inner = unwrapped(module)
        return next((s for m, s in self.known() if m is inner), None)

    def known(self) -> list[tuple[nn.Module, Strategy]]:
        """Of all modules that are still there; those of modules that are gone are taken off the account."""
        found = []
        for key, (ref, strategy) in list(self._strategies.items()):
            module = ref()
            if module is None:
                del self._strategies[key]
                strategy.dispose()
            else:
                found.append((module, strategy))
        return found

    def bring_back(self, module: nn.Module) -> None:
        """All weights of a module into compute memory, and no part in them from here on."""
        strategy = self.of(module)
        if strategy is not None:
            strategy.bring_back(unwrapped(module))
            del self._strategies[id(unwrapped(module))]
            strategy.dispose()

    # ------------------------------------------------------------------------------------------------------ room

    def bound_bytes(self, components: Mapping[str, Any]) -> int:
        """All components that stay, and the largest one of those that do not (layer-wise: two blocks and what lies
        outside the blocks)."""
        found = [self.strategy(name, m) for name, m in components.items() if isinstance(m, nn.Module)]
        stay = sum(s.bound_bytes for s in found if s.stays)
        return stay + max((s.bound_bytes for s in found if not s.stays), default=0)

    def prefetch(self, strategy: Strategy, module: nn.Module, dtype: Any, components: Mapping[str, Any]) -> None:
        """Begin to bring in what a coming use needs first, if it fits beside what is there and is still to come."""
        needed = strategy.prefetch_bytes()
        fits = self._committed_bytes() + needed <= self.bound_bytes(components)
        if needed and (fits or self.args.performance_mode == "speed"):
            strategy.prefetch(unwrapped(module), dtype)

    def make_room(self, strategy: Strategy, components: Mapping[str, Any]) -> None:
        """Give up prefetches for other components where they and this use together exceed the bound."""
        if self.args.performance_mode == "speed":
            return
        bound = self.bound_bytes(components)
        needed = max(0, strategy.bound_bytes - strategy.committed_bytes)
        for module, other in self.known():
            if self._committed_bytes() + needed <= bound:
                return
            if other is not strategy and not self._in_use(module):
                other.finish_request(module)

    def _committed_bytes(self) -> int:
        """What is in memory or on its way, with what the uses that go on may still bring in."""
        return sum(
            max(s.committed_bytes, s.bound_bytes if s.offloads and self._in_use(m) else 0) for m, s in self.known()
        )

    def _weights_place(self) -> Place:
        if self._place is None:
            self._place = default_place(self.args.residency_dir)
        if isinstance(self._place, MemoryPlace) and self.args.residency_dir is not None:
            self._place.folder = self.args.residency_dir  # for what is put away from here on
        return self._place
