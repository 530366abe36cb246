"""The autoencoders, 8 times smaller on each side: of images, of videos (and 4 times in time), and the step between.

Images: that of latent diffusion (arXiv 2112.10752), convolutional. With channels (128, 256, 512, 512) it has exactly
the 83,653,863 parameters of the published Stable Diffusion VAE.

Videos: 3-D convolutions. Their norm looks at one point only, so a decoded pixel depends on nothing beyond a fixed
distance. That is what makes tiled decoding exact where the halo is wide enough.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..errors import ConfigError

# --------------------------------------------------------------------------------------------------------------- images


class ResnetBlock(nn.Module):
    """Two normalised convolutions and a shortcut: [batch, inside, H, W] to [batch, outside, H, W]."""

    def __init__(self, inside: int, outside: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inside, eps=1e-6)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outside, eps=1e-6)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.conv_shortcut = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head attention among all pixels, with its residual: [batch, channels, H, W] to the same shape."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        # One head, spelled out: kernels for attention are picked by shape, and 4-D is the shape they know.
        q = self.to_q(tokens).unsqueeze(1)
        k = self.to_k(tokens).unsqueeze(1)
        v = self.to_v(tokens).unsqueeze(1)
        tokens = self.to_out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + tokens.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """Half the height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """One resolution of the encoder."""

    def __init__(self, inside: int, outside: int, layers: int, groups: int, last: bool) -> None:
        super().__init__()
        widths = [inside] + [outside] * layers
        self.resnets = nn.ModuleList([ResnetBlock(widths[i], outside, groups) for i in range(layers)])
        self.downsample = nn.Identity() if last else Downsample(outside)

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return self.downsample(x)


class UpBlock(nn.Module):
    """One resolution of the decoder."""

    def __init__(self, inside: int, outside: int, layers: int, groups: int, last: bool) -> None:
        super().__init__()
        widths = [inside] + [outside] * layers
        self.resnets = nn.ModuleList([ResnetBlock(widths[i], outside, groups) for i in range(layers)])
        self.upsample = nn.Identity() if last else Upsample(outside)

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return self.upsample(x)


class MidBlock(nn.Module):
    """The smallest resolution, where every pixel sees every other."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnet_1 = ResnetBlock(channels, channels, groups)
        self.attn = SpatialAttention(channels, groups)
        self.resnet_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.resnet_2(self.attn(self.resnet_1(x)))


class Encoder(nn.Module):
    """[batch, 3, 8 h, 8 w] to [batch, out, h, w] (for four entries in `channels`)."""

    def __init__(self, out: int, channels: Sequence[int], layers: int, groups: int) -> None:
        super().__init__()
        widths = [channels[0], *channels]
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [DownBlock(widths[i], widths[i + 1], layers, groups, i == last) for i in range(len(channels))]
        )
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """[batch, latent, h, w] to [batch, 3, 8 h, 8 w] (for four entries in `channels`)."""

    def __init__(self, latent: int, channels: Sequence[int], layers: int, groups: int) -> None:
        super().__init__()
        widths = [channels[-1], *reversed(channels)]
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(latent, channels[-1], 3, padding=1)
        self.mid_block = MidBlock(channels[-1], groups)
        self.up_blocks = nn.ModuleList(
            [UpBlock(widths[i], widths[i + 1], layers + 1, groups, i == last) for i in range(len(channels))]
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Images [batch, 3, H, W] in -1..1, latents [batch, latent, H / scale, W / scale] of about unit variance.

    `encode` gives the mean of the posterior, so that everything here is deterministic; `forward` encodes and decodes.
    """

    scaling_factor = 0.18215  # of the published VAE

    def __init__(self, *, latent: int, channels: Sequence[int], layers: int = 2, groups: int = 32) -> None:
        super().__init__()
        self.latent_channels = latent
        self.scale = (2 ** (len(channels) - 1),) * 2
        self.encoder = Encoder(2 * latent, channels, layers, groups)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        self.decoder = Decoder(latent, channels, layers, groups)

    def encode(self, image: Tensor) -> Tensor:
        mean, _ = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean * self.scaling_factor

    def decode(self, latent: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latent / self.scaling_factor))

    def forward(self, image: Tensor) -> Tensor:
        mean, _ = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return self.decoder(self.post_quant_conv(mean))


# --------------------------------------------------------------------------------------------------------------- videos


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

    `decode` takes a whole latent or one tile of it: the loop over tiles is the caller's (generate.py).
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


# ------------------------------------------------------------------------------------ between the two stages of a video


class LatentUpsampler(nn.Module):
    """[batch, channels, T, H, W] to [batch, channels, T, 2 H, 2 W]."""

    def __init__(self, *, channels: int, hidden: int, depth: int = 1) -> None:
        super().__init__()
        self.conv_in = nn.Conv3d(channels, hidden, 3, padding=1)
        self.res_blocks = nn.ModuleList([ResnetBlock3d(hidden, hidden) for _ in range(depth)])
        self.upsample = Upsample3d(hidden, (1, 2, 2))
        self.post_res_blocks = nn.ModuleList([ResnetBlock3d(hidden, hidden) for _ in range(depth)])
        self.conv_out = nn.Conv3d(hidden, channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.conv_in(latent)
        for block in self.res_blocks:
            x = block(x)
        x = self.upsample(x)
        for block in self.post_res_blocks:
            x = block(x)
        return self.conv_out(x)


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
