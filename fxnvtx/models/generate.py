"""Prompt to image, and prompt to video in two stages: the reference pipelines as plain loops."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..errors import ConfigError
from .build import IMAGE_LATENT_CHANNELS, VIDEO_LATENT_CHANNELS, ImageModels, VideoModels, build, build_video
from .dit import DiT
from .lora import set_lora_scale
from .scheduler import FlowMatchEulerScheduler
from .tiles import join_tiles, plan_tiles

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
