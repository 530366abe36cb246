"""Between the two stages of a video: a latent of twice the side."""

from __future__ import annotations

import torch

from ..args import ServerArgs
from ..batch import Batch
from ..residency import ComponentUse
from ..stage import PipelineStage

__all__ = ["UpsamplingStage"]


class UpsamplingStage(PipelineStage):
    """Doubles height and width of `latent`."""

    def __init__(self, component: str = "upsampler") -> None:
        self.component = component

    def component_uses(self, args: ServerArgs, stage_name: str) -> list[ComponentUse]:
        return [ComponentUse(self.component)]

    def verify_input(self, batch: Batch, args: ServerArgs) -> list[str]:
        return ["latent is missing"] if batch.latent is None else []

    @torch.no_grad()
    def forward(self, batch: Batch, args: ServerArgs) -> Batch:
        with self.use_component(self.component) as upsampler:
            batch.latent = upsampler(batch.latent)
        return batch
