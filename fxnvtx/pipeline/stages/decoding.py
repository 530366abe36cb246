"""Latent to pixels, whole or tile by tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...models import Tile, join_tiles, plan_tiles, to_uint8
from ..args import ServerArgs
from ..batch import Batch
from ..residency import ComponentUse
from ..stage import PipelineStage

__all__ = ["DecodingStage", "tile_name"]


class DecodingStage(PipelineStage):
    """Decodes `latent` with the VAE; `tile` and `halo` are in latent points per axis, None decodes the whole at once.

    Fills `image` from a latent of four dimensions, `video` from one of five.
    """

    def __init__(
        self, component: str = "vae", *, tile: tuple[int, ...] | None = None, halo: tuple[int, ...] | None = None
    ) -> None:
        self.component = component
        self.tile = tile
        self.halo = halo

    def component_uses(self, args: ServerArgs, stage_name: str) -> list[ComponentUse]:
        return [ComponentUse(self.component)]

    def verify_input(self, batch: Batch, args: ServerArgs) -> list[str]:
        return ["latent is missing"] if batch.latent is None else []

    @torch.no_grad()
    def forward(self, batch: Batch, args: ServerArgs) -> Batch:
        assert batch.latent is not None
        with self.use_component(self.component) as vae:
            pixels = self._decode(vae, batch.latent)
        done = to_uint8(pixels)[0]
        if done.dim() == 3:
            batch.image = done
        else:
            batch.video = done
        return batch

    def _decode(self, vae: Any, latent: Tensor) -> Tensor:
        if self.tile is None:
            found: Tensor = vae.decode(latent)
            return found
        axes = latent.dim() - 2
        tiles = plan_tiles(latent.shape[2:], tile=self.tile, halo=self.halo or (0,) * axes)
        parts = []
        for tile in tiles:
            with self.ranged(tile_name(tile, self.tile)):
                parts.append(vae.decode(latent[tile.read]))
        return join_tiles(parts, tiles, vae.scale)


def tile_name(tile: Tile, size: tuple[int, ...]) -> str:
    """`vae_tile_t0_y1_x2`: which tile along each axis; the same string for the same place in every request."""
    places = [start // step for start, step in zip(tile.start, size, strict=True)]
    return "vae_tile_" + "_".join(f"{axis}{place}" for axis, place in zip("tyx"[-len(places) :], places, strict=True))
