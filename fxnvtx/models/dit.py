"""The diffusion transformer of Peebles & Xie (arXiv 2212.09748), for images and videos, conditioned on text.

Blocks, final layer and sizes are the published ones (adaLN). Text comes in two ways: its pooled vector joins the
timestep in adaLN, its tokens join the patches in the sequence (the paper's "in-context conditioning"), which adds
nothing to a block. So the XL stack has exactly the published 669,344,256 parameters.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .layers import MLP, Attention

MAX_GRID = 128  # patches along one side of the latent, and patches in time


class PatchEmbed(nn.Module):
    """Cut a latent into patches and embed them: [batch, C, H, W] or [batch, C, T, H, W] to [batch, patches, dim].

    An image is a video of one frame. H and W must be divisible by `patch`; H / patch, W / patch and T at most MAX_GRID.
    """

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(channels * patch * patch, dim)
        self.frame_position = nn.Parameter(torch.randn(MAX_GRID, dim) * dim**-0.5)
        self.row_position = nn.Parameter(torch.randn(MAX_GRID, dim) * dim**-0.5)
        self.column_position = nn.Parameter(torch.randn(MAX_GRID, dim) * dim**-0.5)

    def forward(self, latent: Tensor) -> Tensor:
        rows = latent.shape[-2] // self.patch
        columns = latent.shape[-1] // self.patch
        x = latent.reshape(latent.shape[0], latent.shape[1], -1, rows, self.patch, columns, self.patch)
        x = self.proj(x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4))
        x = x + self.frame_position[: x.shape[1], None, None] + self.row_position[:rows, None]
        x = x + self.column_position[:columns]
        return x.flatten(1, 3)


class Unpatchify(nn.Module):
    """Patches [batch, patches, channels * patch * patch] back to the shape of `latent`."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        rows = latent.shape[-2] // self.patch
        columns = latent.shape[-1] // self.patch
        x = x.reshape(latent.shape[0], -1, rows, columns, latent.shape[1], self.patch, self.patch)
        return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(latent.shape)


class TimestepProjection(nn.Module):
    """Sinusoids of a timestep: [batch] to float32 [batch, dim], periods from 2 pi to 2 pi * 10000."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pairs = dim // 2
        self.decay = -math.log(10000.0) / self.pairs

    def forward(self, timestep: Tensor) -> Tensor:
        # arange, in the one form that torch.fx traces on every device; float32 whatever the model's dtype is
        index = timestep.new_ones(self.pairs, dtype=torch.float32).cumsum(0) - 1.0
        angle = timestep.float().unsqueeze(-1) * torch.exp(index * self.decay)
        return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


class TimeTextEmbed(nn.Module):
    """Timestep [batch] (0 to 1000) and pooled text [batch, text_dim] to the condition [batch, dim] of adaLN."""

    def __init__(self, dim: int, text_dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.time_proj = TimestepProjection(frequencies)
        self.linear_1 = nn.Linear(frequencies, dim)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(dim, dim)
        self.text_proj = nn.Linear(text_dim, dim)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        time = self.time_proj(timestep).to(pooled.dtype)
        return self.linear_2(self.act(self.linear_1(time))) + self.text_proj(pooled)


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition).unsqueeze(1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        x = x + gate_attn * self.attn(self.norm1(x) * (1 + scale_attn) + shift_attn)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class FinalLayer(nn.Module):
    """Last norm and projection: [batch, tokens, dim] to [batch, tokens, out]."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """Predicts the velocity of a noisy latent.

    latent [batch, channels, H, W] or [batch, channels, T, H, W]; timestep [batch], 0 to 1000; text tokens
    [batch, length, text_dim]; pooled text [batch, text_dim]. Returns the shape of the latent.
    """

    def __init__(self, *, channels: int, dim: int, depth: int, heads: int, text_dim: int, patch: int = 2) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(channels, dim, patch)
        self.time_text_embed = TimeTextEmbed(dim, text_dim)
        self.context_embed = nn.Linear(text_dim, dim)
        self.blocks = nn.ModuleList([DiTBlock(dim, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(dim, channels * patch * patch)
        self.unpatchify = Unpatchify(patch)

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        condition = self.time_text_embed(timestep, pooled)
        context = self.context_embed(text)
        x = torch.cat([context, self.patch_embed(latent)], dim=1)
        for block in self.blocks:
            x = block(x, condition)
        x = self.final_layer(x[:, context.shape[1] :], condition)
        return self.unpatchify(x, latent)
