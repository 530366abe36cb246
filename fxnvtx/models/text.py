"""A text encoder that needs no download: bytes in, one vector per byte and one for the whole prompt out."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .layers import MLP, Attention


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
