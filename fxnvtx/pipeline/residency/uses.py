"""A use of a component by a stage, and the order of the uses of one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

__all__ = ["ComponentUse", "Timeline"]


@dataclass(frozen=True)
class ComponentUse:
    """One stage needs one component, for one phase of its work.

    `dtype`: convert floating-point weights to it for the use (None: as they are). `prefetch`: the weights may be
    brought in ahead of the use. `heavy`: worth bringing in ahead. `stage` is filled in by the pipeline.
    """

    component: str
    phase: str | None = None
    dtype: torch.dtype | None = None
    prefetch: bool = True
    heavy: bool = True
    stage: str = ""

    @property
    def key(self) -> tuple[str, str, str | None]:
        return self.stage, self.component, self.phase

    @property
    def prefix(self) -> str:
        """What the component's layers are called while this use lasts."""
        parts = (self.stage, self.component, self.phase)
        return ".".join(part for part in parts if part)

    def by(self, stage: str) -> ComponentUse:
        return replace(self, stage=stage)


class Timeline:
    """The uses of one request in order, and how far it has come."""

    def __init__(self, uses: Sequence[ComponentUse] = ()) -> None:
        self.uses = list(uses)
        self._position = -1

    def stage_begins(self, stage: str) -> None:
        """The next use to come is the first one of `stage`, the next one of that name from here on."""
        for index in (*range(self._position + 1, len(self.uses)), *range(self._position + 1)):
            if self.uses[index].stage == stage:
                self._position = index - 1
                return

    def find(self, key: tuple[str, str, str | None]) -> ComponentUse | None:
        """The declared use with this key: the next one to come, else the last one that was."""
        return next((u for u in (*self.uses[self._position + 1 :], *self.uses) if u.key == key), None)

    def begins(self, use: ComponentUse) -> None:
        for index in range(self._position + 1, len(self.uses)):
            if self.uses[index].key == use.key:
                self._position = index
                return

    def next_heavy(self) -> ComponentUse | None:
        """The first use still to come that is worth bringing in ahead."""
        return next((u for u in self.uses[self._position + 1 :] if u.heavy), None)
