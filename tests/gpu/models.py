"""What the shared models (tests/gpuless/models.py) leave out because it needs a real second device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..compile.listeners.children import CHILDREN, WIDTH
from ..gpuless.models import Attention, Call

KINDS = ("plain", "forward_hook", "forward_pre_hook", "instance_forward", "own_call", "weight_norm", "pruned")


class Hooked(nn.Module):
    """Children that Dynamo inlines through the call that we stand in front of."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: CHILDREN[name](nn.Linear(WIDTH, WIDTH)) for name in KINDS})

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers.values():
            x = layer(x).tanh()
        return x


class Copied(nn.Module):
    """To the host and back, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 11), nn.Linear(11, 13)
        self.out, self.back = Call(lambda x: x.to("cpu")), Call(lambda x, like: x.to(like.device))

    def forward(self, x: torch.Tensor) -> Any:
        return self.after(self.back(self.out(self.before(x)), x))


class Block(nn.Module):
    """Norm, attention and a layer of its own; all blocks of one size, so that they compile to one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.proj = nn.LayerNorm(16), Attention(16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.proj(self.attn(self.norm(x)))


class Alike(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


class Residual(nn.Module):
    """A residual block of a VAE's decoder: GroupNorm, convolution, twice, with attention over the pixels behind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, 16), nn.Conv2d(16, 24, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, 24), nn.Conv2d(24, 16, 3, padding=1)
        self.norm3, self.attn, self.out = nn.LayerNorm(16), Attention(16), nn.Conv2d(16, 3, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())
        pixels = x.flatten(2).transpose(1, 2)
        return self.out((pixels + self.attn(self.norm3(pixels))).transpose(1, 2).unflatten(2, x.shape[2:]))
