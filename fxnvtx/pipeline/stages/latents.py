"""The noise that a generation starts from."""

from __future__ import annotations

import torch

from ..args import ServerArgs
from ..batch import Batch
from ..stage import PipelineStage

__all__ = ["LatentStage", "noise"]


class LatentStage(PipelineStage):
    """Fills `latent` with noise of `shape` from the request's seed."""

    def __init__(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.shape = shape
        self.device = torch.device(device)

    def forward(self, batch: Batch, args: ServerArgs) -> Batch:
        batch.latent = noise(self.shape, batch.seed, self.device)
        return batch


def noise(shape: tuple[int, ...], seed: int, device: torch.device) -> torch.Tensor:
    """Standard normal float32 noise: drawn on the CPU, so that it is the same for every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
