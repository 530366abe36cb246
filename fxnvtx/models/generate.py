"""Reference models from a size and a seed, with random weights; and the reference pipelines as plain loops with them:
prompt to image, and prompt to video in two stages.
"""

from __future__ import annotations

import copy
import ctypes
import math
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..errors import ConfigError
from ..output import write_bytes
from .dit import ByteTokenizer, DiT, TextEncoder, apply_lora, set_lora_scale
from .vae import VAE, LatentUpsampler, VideoVAE, join_tiles, plan_tiles

# ------------------------------------------ sizes: S, B, L and XL of arXiv 2212.09748, table 1; tiny is ours, for a CPU


@dataclass(frozen=True)
class ModelSize:
    """One row of the table.

    `image` and `video` are what it generates, in pixels: side; frames and side. `tile` is the piece of a video latent
    that is decoded at a time: frames, rows, columns.
    """

    depth: int
    dim: int
    heads: int
    text_depth: int
    text_dim: int
    text_heads: int
    vae_channels: tuple[int, ...]
    vae_groups: int
    video_channels: tuple[int, ...]
    image: int
    video: tuple[int, int]
    tile: tuple[int, int, int]


_SD_VAE = (128, 256, 512, 512)
SIZES: dict[str, ModelSize] = {
    "tiny": ModelSize(2, 64, 4, 1, 32, 2, (8, 16, 16, 16), 4, (8, 8, 16, 16), 64, (8, 64), (2, 4, 4)),
    "small": ModelSize(12, 384, 6, 4, 256, 4, (32, 64, 128, 128), 32, (16, 32, 64, 64), 256, (16, 128), (4, 8, 8)),
    "base": ModelSize(12, 768, 12, 6, 512, 8, _SD_VAE, 32, (32, 64, 128, 128), 256, (16, 256), (4, 16, 16)),
    "large": ModelSize(24, 1024, 16, 12, 768, 12, _SD_VAE, 32, (64, 128, 256, 256), 256, (32, 256), (4, 16, 16)),
    "xl": ModelSize(28, 1152, 16, 12, 768, 12, _SD_VAE, 32, (128, 256, 512, 512), 256, (32, 512), (4, 32, 32)),
}


def model_size(name: str) -> ModelSize:
    """The row of that name; ConfigError where there is none."""
    if name not in SIZES:
        raise ConfigError(f"there is no model size {name!r}: choose one of {', '.join(SIZES)}")
    return SIZES[name]


# ------------------------------------------------------------------------------------------------------- the scheduler

# Euler steps along the straight paths of flow matching: a sample at noise level s is (1 - s) * data + s * noise.


TRAIN_TIMESTEPS = 1000


class FlowMatchEulerScheduler:
    """Noise levels from 1 (noise) to 0 (data), and the step between two of them.

    `shift` > 1 spends more of the steps at high noise, as larger images need (arXiv 2403.03206, equation 23). A step is
    told its index, so nothing is kept from one step to the next: copies of the scheduler agree with it.
    """

    def __init__(self, shift: float = 3.0) -> None:
        if not (math.isfinite(shift) and shift > 0):
            raise ConfigError(f"shift must be a positive number, not {shift!r}")
        self.shift = shift
        self.sigmas: tuple[float, ...] = ()
        self.timesteps = torch.empty(0)

    def set_timesteps(self, steps: int, *, start: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
        """Lay `steps` steps from noise level `start` (1 for pure noise; less to refine a sample) down to 0.

        Sets `sigmas` (steps + 1 numbers, the last is 0) and returns `timesteps` (float32 [steps], 1000 * sigma).
        """
        if not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"steps must be a whole number, at least 1, not {steps!r}")
        if not 0 < start <= 1:
            raise ConfigError(f"start must be a noise level above 0 and at most 1, not {start!r}")
        first = start / (self.shift - (self.shift - 1) * start)  # what the shift below turns into `start`
        even = [first * (1 - index / steps) for index in range(steps + 1)]
        shifted = [self.shift * s / (1 + (self.shift - 1) * s) for s in even]
        self.sigmas = (start, *shifted[1:])
        self.timesteps = torch.tensor(self.sigmas[:-1], dtype=torch.float32, device=device) * TRAIN_TIMESTEPS
        return self.timesteps

    def _sigma(self, index: int) -> float:
        if not 0 <= index < len(self.timesteps):
            raise ConfigError(f"there is no step {index} of {len(self.timesteps)}: call set_timesteps first")
        return self.sigmas[index]

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """From the sample at noise level `sigmas[index]` and its velocity (noise - data) to `sigmas[index + 1]`."""
        sigma = self._sigma(index)
        return sample + velocity * (self.sigmas[index + 1] - sigma)

    def add_noise(self, sample: Tensor, noise: Tensor, index: int = 0) -> Tensor:
        """`sample` at the noise level of step `index`."""
        sigma = self._sigma(index)
        return sample * (1 - sigma) + noise * sigma


# --------------------------------------------------------------------------------------------------------------- models


IMAGE_LATENT_CHANNELS = 4
VIDEO_LATENT_CHANNELS = 8

Module = TypeVar("Module", bound=nn.Module)


class _Components:
    def components(self) -> dict[str, nn.Module]:
        """The modules by name, in the order in which a request uses them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, nn.Module)}

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast every module, as `nn.Module.to`; returns self."""
        for module in self.components().values():
            module.to(*args, **kwargs)
        return self


@dataclass
class ImageModels(_Components):
    """What turns a prompt into an image."""

    size: ModelSize
    tokenizer: ByteTokenizer
    text_encoder: TextEncoder
    dit: DiT
    vae: VAE
    scheduler: FlowMatchEulerScheduler


@dataclass
class VideoModels(_Components):
    """What turns a prompt into a video in two stages: `dit` at half the side, `upsampler`, `refiner`.

    `dit` and `refiner` carry adapters (lora.py), switched off; the second stage switches the refiner's on.
    """

    size: ModelSize
    tokenizer: ByteTokenizer
    text_encoder: TextEncoder
    dit: DiT
    upsampler: LatentUpsampler
    refiner: DiT
    vae: VideoVAE
    scheduler: FlowMatchEulerScheduler


def build(size: str = "tiny", seed: int = 0, *, device: torch.device | str = "cpu") -> ImageModels:
    """The models of an image pipeline, float32, in eval mode. The same seed gives the same weights to the bit.

    The global random generators are neither used nor changed. device="meta" allocates nothing.
    """
    row = model_size(size)
    return ImageModels(
        size=row,
        tokenizer=ByteTokenizer(),
        text_encoder=_make(_text_encoder(row), seed, 0, device),
        dit=_make(_dit(row, IMAGE_LATENT_CHANNELS), seed, 1, device),
        vae=_make(
            lambda: VAE(latent=IMAGE_LATENT_CHANNELS, channels=row.vae_channels, groups=row.vae_groups), seed, 2, device
        ),
        scheduler=FlowMatchEulerScheduler(),
    )


def build_video(size: str = "tiny", seed: int = 0, *, device: torch.device | str = "cpu") -> VideoModels:
    """The models of a two-stage video pipeline; otherwise as `build`."""
    row = model_size(size)
    models = VideoModels(
        size=row,
        tokenizer=ByteTokenizer(),
        text_encoder=_make(_text_encoder(row), seed, 0, device),
        dit=_make(_dit(row, VIDEO_LATENT_CHANNELS), seed, 1, device),
        upsampler=_make(
            lambda: LatentUpsampler(channels=VIDEO_LATENT_CHANNELS, hidden=row.video_channels[-1]), seed, 2, device
        ),
        refiner=_make(_dit(row, VIDEO_LATENT_CHANNELS), seed, 3, device),
        vae=_make(lambda: VideoVAE(latent=VIDEO_LATENT_CHANNELS, channels=row.video_channels), seed, 4, device),
        scheduler=FlowMatchEulerScheduler(),
    )
    for number, dit in enumerate((models.dit, models.refiner)):
        apply_lora(dit, seed=_mix(seed, 5 + number))
    return models


def _text_encoder(row: ModelSize) -> Callable[[], TextEncoder]:
    return lambda: TextEncoder(row.text_dim, row.text_depth, row.text_heads)


def _dit(row: ModelSize, channels: int) -> Callable[[], DiT]:
    return lambda: DiT(channels=channels, dim=row.dim, depth=row.depth, heads=row.heads, text_dim=row.text_dim)


def _mix(seed: int, component: int) -> int:
    # apart from one another for every component of neighbouring seeds
    return (seed * 1_000_003 + component) % 2**63


def _make(construct: Callable[[], Module], seed: int, component: int, device: torch.device | str) -> Module:
    """Construct on the meta device, where the constructors of torch draw no random number, then fill."""
    with torch.device("meta"):
        module = construct().float()  # whatever the default dtype is
    if torch.device(device).type != "meta":
        module.to_empty(device="cpu")
        fill(module, torch.Generator().manual_seed(_mix(seed, component)))
        module.to(device)
    return module.eval()


@torch.no_grad()
def fill(module: nn.Module, generator: torch.Generator) -> None:
    """Random weights that keep the variance of what flows through: matrices by their fan-in, norms 1, biases 0."""
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


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
