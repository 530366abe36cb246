"""A video autoencoder: 3-D convolutions, 8 times smaller on each side and 4 times in time.

Its norm looks at one point only, so a decoded pixel depends on nothing beyond a fixed distance. That is what makes
tiled decoding (tiles.py) exact where the halo is wide enough.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

# (time, height, width) of each change of resolution, from the pixels to the latent
STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
SCALE = (4, 8, 8)


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of each point of [batch, channels, T, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)
        return x * self.weight.unflatten(0, (-1, 1, 1, 1))


class ResnetBlock3d(nn.Module):
    """Two normalised convolutions and a shortcut: [batch, inside, T, H, W] to [batch, outside, T, H, W]."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(inside)
        self.conv1 = nn.Conv3d(inside, outside, 3, padding=1)
        self.norm2 = ChannelNorm(outside)
        self.conv2 = nn.Conv3d(outside, outside, 3, padding=1)
        self.conv_shortcut = nn.Identity() if inside == outside else nn.Conv3d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Upsample3d(nn.Module):
    """Repeat every point by (time, height, width), then smooth."""

    def __init__(self, channels: int, scale: tuple[int, int, int]) -> None:
        super().__init__()
        self.resize = nn.Upsample(scale_factor=tuple(float(s) for s in scale), mode="nearest")
        self.conv = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.resize(x))


class VideoEncoder(nn.Module):
    """[batch, 3, 4 t, 8 h, 8 w] to [batch, latent, t, h, w]."""

    def __init__(self, latent: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.conv_in = nn.Conv3d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                nn.Sequential(
                    ResnetBlock3d(channels[i], channels[i + 1]),
                    nn.Conv3d(channels[i + 1], channels[i + 1], 3, stride=STRIDES[i], padding=1),
                )
                for i in range(len(STRIDES))
            ]
        )
        self.mid_block = ResnetBlock3d(channels[-1], channels[-1])
        self.norm_out = ChannelNorm(channels[-1])
        self.conv_out = nn.Conv3d(channels[-1], latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class VideoDecoder(nn.Module):
    """[batch, latent, t, h, w] to [batch, 3, 4 t, 8 h, 8 w]."""

    def __init__(self, latent: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.conv_in = nn.Conv3d(latent, channels[-1], 3, padding=1)
        self.mid_block = ResnetBlock3d(channels[-1], channels[-1])
        self.up_blocks = nn.ModuleList(
            [
                nn.Sequential(ResnetBlock3d(channels[i + 1], channels[i]), Upsample3d(channels[i], STRIDES[i]))
                for i in reversed(range(len(STRIDES)))
            ]
        )
        self.norm_out = ChannelNorm(channels[0])
        self.conv_out = nn.Conv3d(channels[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VideoVAE(nn.Module):
    """Videos [batch, 3, 4 t, 8 h, 8 w] in -1..1, latents [batch, latent, t, h, w].

    `decode` takes a whole latent or one tile of it: the loop over tiles is the caller's (tiles.py).
    """

    scale = SCALE
    halo = 8  # latent points, in each direction, beyond which a decoded pixel depends on nothing

    def __init__(self, *, latent: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.latent_channels = latent
        self.encoder = VideoEncoder(latent, channels)
        self.decoder = VideoDecoder(latent, channels)

    def encode(self, video: Tensor) -> Tensor:
        return self.encoder(video)

    def decode(self, latent: Tensor) -> Tensor:
        return self.decoder(latent)

    def forward(self, video: Tensor) -> Tensor:
        return self.decoder(self.encoder(video))
