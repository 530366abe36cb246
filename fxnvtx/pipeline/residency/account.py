"""How many weight bytes are in compute memory: exact, per component, with the peak."""

from __future__ import annotations

import threading

__all__ = ["ByteAccount"]


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
