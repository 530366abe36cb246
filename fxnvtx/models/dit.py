"""The diffusion transformer of Peebles & Xie (arXiv 2212.09748), for images and videos, and the text encoder before it.

Blocks, final layer and sizes are the published ones (adaLN). Text comes in two ways: its pooled vector joins the
timestep in adaLN, its tokens join the patches in the sequence (the paper's "in-context conditioning"), which adds
nothing to a block. So the XL stack has exactly the published 669,344,256 parameters. The text encoder needs no
download: bytes in, one vector per byte and one for the whole prompt out.

All forwards in this package are straight lines: no branches, no helper calls, only children, parameters, torch
functions and tensor methods. So torch.fx can trace each of them, alone with its children opaque or through the
whole model.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..errors import ConfigError

# ------------------------------------------------------------------------------------------------------- layers of both


class Attention(nn.Module):
    """Multi-head self-attention: [batch, tokens, dim] to the same shape.

    `mask` is what `scaled_dot_product_attention` takes: True where a key may be seen, broadcast to
    [batch, heads, tokens, tokens].
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.to_k(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.to_v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between: [..., dim] to the same shape."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


# ----------------------------------------------------------------------------------------------------------------- text


class ByteTokenizer:
    """UTF-8 bytes as tokens. Ids: 0 padding, 1 start, 2 end, then 3 + byte."""

    pad, start, end, first_byte = 0, 1, 2, 3
    vocabulary = 259

    def __init__(self, max_length: int = 64) -> None:
        if max_length < 2:
            raise ConfigError(f"max_length must be at least 2 (start and end), not {max_length}")
        self.max_length = max_length

    def __call__(self, prompts: str | Sequence[str]) -> Tensor:
        """Ids of one prompt or several, int64 [batch, max_length]; a longer prompt is cut."""
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = []
        for prompt in batch:
            if not isinstance(prompt, str):
                raise ConfigError(f"a prompt must be a str, not {type(prompt).__name__}")
            text = prompt.encode("utf-8", "replace")[: self.max_length - 2]
            ids = [self.start, *(self.first_byte + byte for byte in text), self.end]
            rows.append(ids + [self.pad] * (self.max_length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), self.max_length)


class TextBlock(nn.Module):
    """Pre-norm transformer block; padding is not attended to."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """Ids [batch, length] to (one vector per token [batch, length, dim], zero at padding; their mean [batch, dim])."""

    def __init__(self, dim: int, depth: int, heads: int, max_length: int = 64) -> None:
        super().__init__()
        self.pad = ByteTokenizer.pad
        self.token_embedding = nn.Embedding(ByteTokenizer.vocabulary, dim)
        self.position_embedding = nn.Parameter(torch.randn(max_length, dim) * dim**-0.5)
        self.blocks = nn.ModuleList([TextBlock(dim, heads) for _ in range(depth)])
        self.final_norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        mask = ids != self.pad
        x = self.token_embedding(ids) + self.position_embedding[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        x = self.final_norm(x) * mask.unsqueeze(-1)
        return x, x.sum(1) / mask.sum(1, keepdim=True)


# -------------------------------------------------------------------------------------------- the diffusion transformer


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
