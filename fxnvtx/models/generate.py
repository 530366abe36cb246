"""Prompt to image, and prompt to video in two stages: the reference pipelines as plain loops, and what they use."""

from __future__ import annotations

import copy
import ctypes
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..errors import ConfigError
from ..output import write_bytes
from .build import (
    IMAGE_LATENT_CHANNELS,
    VIDEO_LATENT_CHANNELS,
    FlowMatchEulerScheduler,
    ImageModels,
    VideoModels,
    build,
    build_video,
    set_lora_scale,
)
from .dit import DiT

# ---------------------------------------------------------------------------------------------------------------- tiles

# Decoding a latent tile by tile, so that memory does not grow with the video.
#
#     tiles = plan_tiles(latent.shape[2:], tile=(8, 16, 16), halo=(2, 2, 2))
#     parts = [vae.decode(latent[tile.read]) for tile in tiles]
#     video = join_tiles(parts, tiles, vae.scale)
#
# Each tile is decoded with a halo around it, which is cut off again: every pixel comes from exactly one tile.


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


# ------------------------------------------------------------------------------------------------------------ a request


HALO = (1, 2, 2)  # latent points around a tile of a video: frames, rows, columns
REFINE_START = 0.9  # noise level at which the second stage starts


@torch.no_grad()
def generate(
    prompt: str,
    steps: int = 4,
    seed: int = 0,
    *,
    size: str = "tiny",
    guidance_scale: float = 4.0,
    negative_prompt: str = "",
    models: ImageModels | None = None,
) -> Tensor:
    """An image, uint8 [height, width, 3]. The same arguments give the same image to the bit.

    `seed` is that of the noise. `models` (from `build`) are used where given, else built from `size` with seed 0.
    """
    models = models or build(size)
    side = models.size.image // models.vae.scale[0]
    latent = noise((1, IMAGE_LATENT_CHANNELS, side, side), seed, like=models.dit)
    text = models.text_encoder(_tokens(models, prompt))
    blank = models.text_encoder(_tokens(models, negative_prompt))
    scheduler = copy.copy(models.scheduler)  # other threads may use the same models
    scheduler.set_timesteps(steps)
    latent = denoise(models.dit, scheduler, latent, text, blank, guidance_scale)
    return to_uint8(models.vae.decode(latent))[0]


@torch.no_grad()
def generate_video(
    prompt: str,
    steps: int = 4,
    seed: int = 0,
    *,
    refine_steps: int = 2,
    size: str = "tiny",
    guidance_scale: float = 4.0,
    negative_prompt: str = "",
    models: VideoModels | None = None,
) -> Tensor:
    """A video, uint8 [frames, height, width, 3]: denoised at half the side, upsampled, refined, decoded in tiles.

    Otherwise as `generate`. The refiner's adapter is on while it refines: one request at a time per set of models.
    """
    models = models or build_video(size)
    frames, side = models.size.video
    time, space = frames // models.vae.scale[0], side // models.vae.scale[1]
    latent = noise((1, VIDEO_LATENT_CHANNELS, time, space // 2, space // 2), seed, like=models.dit)
    text = models.text_encoder(_tokens(models, prompt))
    blank = models.text_encoder(_tokens(models, negative_prompt))

    scheduler = copy.copy(models.scheduler)  # other threads may use the same models
    scheduler.set_timesteps(steps)
    latent = denoise(models.dit, scheduler, latent, text, blank, guidance_scale)

    latent = models.upsampler(latent)
    scheduler.set_timesteps(refine_steps, start=REFINE_START)
    latent = scheduler.add_noise(latent, noise(tuple(latent.shape), seed + 1, like=models.refiner))
    set_lora_scale(models.refiner, 1.0)
    try:
        latent = denoise(models.refiner, scheduler, latent, text, blank, guidance_scale=1.0)
    finally:
        set_lora_scale(models.refiner, 0.0)

    tiles = plan_tiles(latent.shape[2:], tile=models.size.tile, halo=HALO)
    parts = [models.vae.decode(latent[tile.read]) for tile in tiles]
    return to_uint8(join_tiles(parts, tiles, models.vae.scale))[0]


def denoise(
    dit: DiT,
    scheduler: FlowMatchEulerScheduler,
    latent: Tensor,
    text: tuple[Tensor, Tensor],
    blank: tuple[Tensor, Tensor],
    guidance_scale: float,
) -> Tensor:
    """All steps that the scheduler was set to, with classifier-free guidance; a scale of 1 needs no second pass.

    `text` and `blank` are what the text encoder returns for the prompt and for the negative prompt.
    """
    for index, timestep in enumerate(scheduler.timesteps.to(latent.device)):
        now = timestep.expand(latent.shape[0])
        velocity = dit(latent, now, *text)
        if guidance_scale != 1.0:
            unguided = dit(latent, now, *blank)
            velocity = unguided + guidance_scale * (velocity - unguided)
        latent = scheduler.step(velocity, index, latent)
    return latent


def noise(shape: tuple[int, ...], seed: int, *, like: torch.nn.Module) -> Tensor:
    """Standard normal noise, the same on every device, with the device and dtype of `like`'s weights."""
    weight = next(like.parameters())
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.to(weight.device, weight.dtype)


def to_uint8(pixels: Tensor) -> Tensor:
    """Channels second and -1..1, to channels last and 0..255: [batch, 3, ...] to uint8 [batch, ..., 3] on the CPU."""
    scaled = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).movedim(1, -1).contiguous().cpu()


def _tokens(models: ImageModels | VideoModels, prompt: str) -> Tensor:
    if not isinstance(prompt, str):
        raise ConfigError(f"prompt must be a str, not {type(prompt).__name__}")
    return models.tokenizer(prompt).to(next(models.text_encoder.parameters()).device)


# ---------------------------------------------------------------------------------------------------------- pictures

# PNG and animated PNG, written with the standard library (the format: W3C PNG, third edition).


def write_png(path: str | os.PathLike[str], image: Tensor) -> Path:
    """Write an image, uint8 [height, width, 3]. Raises ConfigError (not an image) and OutputError (cannot write)."""
    return write_apng(path, image.unsqueeze(0))


def write_apng(path: str | os.PathLike[str], frames: Tensor, fps: int = 8) -> Path:
    """Write a video, uint8 [frames, height, width, 3], as one animated PNG that plays for ever.

    Viewers that know no animation show the first frame. Raises ConfigError and OutputError.
    """
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ConfigError(f"an image is uint8 [..., height, width, 3], not {frames.dtype} {list(frames.shape)}")
    if not 1 <= fps <= 0xFFFF:
        raise ConfigError(f"fps must be from 1 to 65535, not {fps}")
    return write_bytes(path, _encode(frames.cpu(), fps))


def _encode(frames: Tensor, fps: int) -> bytes:
    count, height, width, _ = frames.shape
    chunks = [_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    if count > 1:
        chunks.append(_chunk(b"acTL", struct.pack(">II", count, 0)))
    number = 0  # control and data chunks of an animation share one sequence
    for index, frame in enumerate(frames):
        data = zlib.compress(_rows(frame))
        if count > 1:
            control = struct.pack(">IIIIIHHBB", number, width, height, 0, 0, 1, fps, 0, 0)
            chunks.append(_chunk(b"fcTL", control))
            number += 1
        if index == 0:
            chunks.append(_chunk(b"IDAT", data))
        else:
            chunks.append(_chunk(b"fdAT", struct.pack(">I", number) + data))
            number += 1
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + _chunk(b"IEND", b"")


def _rows(frame: Tensor) -> bytes:
    """The pixels as PNG wants them: before each row a byte that names its filter, 0 for none."""
    rows = F.pad(frame.flatten(1), (1, 0)).contiguous()
    return ctypes.string_at(rows.data_ptr(), rows.numel())  # bytes without numpy, which torch can do without


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
