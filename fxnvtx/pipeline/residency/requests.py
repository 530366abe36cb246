"""What the manager remembers of a request under way, and of a use that is going on."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ..args import ServerArgs
from ..steps import StepWindows
from .uses import ComponentUse, Timeline

__all__ = ["Active", "Request"]


@dataclass(eq=False)
class Active:
    """A use that is going on. `scoped`: it ends with a block, not with the next use. `ranged`: its layers may show."""

    use: ComponentUse
    module: nn.Module
    scoped: bool
    ranged: bool = False


@dataclass(eq=False)
class Request:
    """A request under way: its timeline, the stage it has come to, and its uses, the innermost one last."""

    args: ServerArgs
    use_nvtx: bool
    timeline: Timeline
    stage: str | None = None
    active: list[Active] = field(default_factory=list)
    layers: bool = True  # whether the present step shows its layers
    windows: StepWindows = field(default_factory=StepWindows)
