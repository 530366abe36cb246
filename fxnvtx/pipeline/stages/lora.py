"""Switching an adapter between two stages."""

from __future__ import annotations

from torch import nn

from ...errors import PipelineError
from ...models import LoRALinear, set_lora_scale
from ..args import ServerArgs
from ..batch import Batch
from ..context import running
from ..stage import PipelineStage

__all__ = ["LoRASwitchStage"]


class LoRASwitchStage(PipelineStage):
    """Sets the scale of the adapters of `component`; 0 switches them off.

    The change goes through the residency manager: an adapter that lies in a file is changed in the file.
    """

    def __init__(self, component: str, scale: float) -> None:
        self.component = component
        self.scale = scale

    def forward(self, batch: Batch, args: ServerArgs) -> Batch:
        manager = running().manager
        if manager is None:
            raise PipelineError(f"stage {self.component_name} switches weights: add it to a pipeline")
        manager.update_component(self.component, self._switch)
        return batch

    def _switch(self, part: nn.Module) -> None:
        if any(isinstance(module, LoRALinear) for module in part.modules()):
            set_lora_scale(part, self.scale)
