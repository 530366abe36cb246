"""The sizes the reference models come in. DiT: S, B, L and XL of arXiv 2212.09748, table 1; tiny is ours, for a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError


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
