"""Reference models with random weights, made from a size and a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import nn

from .dit import DiT
from .lora import apply_lora
from .scheduler import FlowMatchEulerScheduler
from .sizes import ModelSize, model_size
from .text import ByteTokenizer, TextEncoder
from .upsampler import LatentUpsampler
from .vae import VAE
from .video_vae import VideoVAE

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
