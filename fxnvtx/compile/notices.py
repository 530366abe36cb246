"""What a user is told of compiled models: once per process and reason in the log, and per region in `explain()`."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass, field

__all__ = ["CompiledRegion", "note", "regions", "warn_once"]

SHOWN = 6
log = logging.getLogger("fxnvtx")
_said: set[str] = set()
_regions: deque[CompiledRegion] = deque(maxlen=1000)
_lock = threading.Lock()


def warn_once(reason: str, text: str) -> None:
    with _lock:
        if reason in _said:
            return
        _said.add(reason)
    log.warning("%s", text)


@dataclass
class CompiledRegion:
    """`path`: "kernels" (ranges around kernel launches), "pieces" (one compiled piece per module), "nodes" (range nodes
    in the graph that runs), "region" (one range around the whole) or "none" (another backend compiled it). `reason`:
    why not "kernels", empty otherwise. `owners`: paths of the modules in the region, relative to `name`; `launches`:
    launch sites in the generated code, 0 where it came from a cache; `unknown`: those whose owner is not known; `note`:
    where else than in a range of its own it is shown, and why."""

    name: str
    backend: str
    path: str
    reason: str = ""
    owners: list[str] = field(default_factory=list)
    launches: int = 0
    unknown: int = 0
    note: str = ""

    def __str__(self) -> str:
        shown = ", ".join(self.owners[:SHOWN]) + (", ..." if len(self.owners) > SHOWN else "")
        text = f"compiled region {self.name} ({self.backend}): path {self.path}, {len(self.owners)} modules"
        if shown:
            text += f" [{shown}]"
        if self.launches:
            text += f", {self.launches} launch sites"
        if self.unknown:
            text += f", {self.unknown} of them cannot be attributed"
        return "; ".join(filter(None, (text, self.reason, self.note)))


def note(region: CompiledRegion) -> CompiledRegion:
    with _lock:
        _regions.append(region)
    return region


def regions() -> list[CompiledRegion]:
    """The last 1000 regions compiled with the fxnvtx backend, the oldest first."""
    with _lock:
        return list(_regions)
