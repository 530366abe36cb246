"""Decoding a latent tile by tile, so that memory does not grow with the video.

    tiles = plan_tiles(latent.shape[2:], tile=(8, 16, 16), halo=(2, 2, 2))
    parts = [vae.decode(latent[tile.read]) for tile in tiles]
    video = join_tiles(parts, tiles, vae.scale)

Each tile is decoded with a halo around it, which is cut off again: every pixel comes from exactly one tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class Tile:
    """One tile of a latent [batch, channels, *sizes], in latent points.

    It owns `start` to `stop`; to decode it one reads `halo_start` to `halo_stop`. One entry per axis.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]
    halo_start: tuple[int, ...]
    halo_stop: tuple[int, ...]

    @property
    def read(self) -> tuple[slice, ...]:
        """Index of the tile with its halo in the latent."""
        return (slice(None), slice(None), *map(slice, self.halo_start, self.halo_stop))

    def keep(self, scale: Sequence[int]) -> tuple[slice, ...]:
        """Index of what the tile owns in its decoded part; `scale`: decoded points per latent point, per axis."""
        spans = zip(self.start, self.stop, self.halo_start, scale, strict=True)
        return (slice(None), slice(None), *(slice((a - h) * s, (b - h) * s) for a, b, h, s in spans))

    def write(self, scale: Sequence[int]) -> tuple[slice, ...]:
        """Index of what the tile owns in the whole decoded result."""
        spans = zip(self.start, self.stop, scale, strict=True)
        return (slice(None), slice(None), *(slice(a * s, b * s) for a, b, s in spans))


def plan_tiles(sizes: Sequence[int], *, tile: Sequence[int], halo: Sequence[int]) -> list[Tile]:
    """Cut a latent of `sizes` (without batch and channels) into tiles of at most `tile`, each read with `halo` more
    points on every side that has them. In order of the axes, the last one fastest."""
    if not len(sizes) == len(tile) == len(halo):
        raise ConfigError(f"sizes, tile and halo must have one number per axis, not {sizes}, {tile} and {halo}")
    if min(tile) < 1 or min(halo) < 0:
        raise ConfigError(f"a tile needs at least 1 point per axis and a halo at least 0, not {tile} and {halo}")
    tiles = []
    for start in product(*(range(0, size, step) for size, step in zip(sizes, tile, strict=True))):
        stop = tuple(min(a + step, size) for a, step, size in zip(start, tile, sizes, strict=True))
        halo_start = tuple(max(a - h, 0) for a, h in zip(start, halo, strict=True))
        halo_stop = tuple(min(b + h, size) for b, h, size in zip(stop, halo, sizes, strict=True))
        tiles.append(Tile(start, stop, halo_start, halo_stop))
    return tiles


def join_tiles(parts: Sequence[Tensor], tiles: Sequence[Tile], scale: Sequence[int]) -> Tensor:
    """The whole result [batch, channels, *sizes * scale] from the decoded parts of the tiles, in the same order."""
    sizes = [max(tile.stop[axis] for tile in tiles) * s for axis, s in enumerate(scale)]
    whole = parts[0].new_empty((*parts[0].shape[:2], *sizes))
    for part, tile in zip(parts, tiles, strict=True):
        whole[tile.write(scale)] = part[tile.keep(scale)]
    return whole
