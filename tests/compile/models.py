"""Models whose every Linear has a shape of its own, so that a matmul's shape names the module it belongs to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BATCH = 5
PRIMES = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107]


class Mlp(nn.Module):
    """a -> b -> c, three shapes nobody else has."""

    def __init__(self, outside: int, inside: int, middle: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(outside)
        self.up = nn.Linear(outside, inside)
        self.mid = nn.Linear(inside, middle)
        self.down = nn.Linear(middle, outside)

    def forward(self, x):
        return x + self.down(torch.relu(self.mid(torch.nn.functional.gelu(self.up(self.norm(x))))))


class Unique(nn.Module):
    """Several Mlps around a common width; every (in, out) pair occurs once."""

    def __init__(self, blocks: int = 2, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(PRIMES[0], width)
        self.blocks = nn.ModuleList([Mlp(width, PRIMES[1 + 2 * i], PRIMES[2 + 2 * i]) for i in range(blocks)])
        self.head = nn.Linear(width, PRIMES[-1])

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).sin()

    def inputs(self, batch: int = BATCH):
        return torch.randn(batch, PRIMES[0])


class Broken(Unique):
    """Unique with graph breaks: in the root's own code, so that its rest is compiled as a resumed function."""

    def forward(self, x):
        x = self.embed(x)
        torch._dynamo.graph_break()
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.head(self.blocks[1](x)).sin()


class Twice(Unique):
    """Every block is called twice, and one is reached under two names."""

    def __init__(self) -> None:
        super().__init__(blocks=2)
        self.again = self.blocks[0]

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(block(x).tanh())
        return self.head(self.again(x)).sin()


class Same(nn.Module):
    """Blocks of one shape: they compile to one graph. Each has a tag to tell them apart: the scale buffer's value."""

    def __init__(self, blocks: int = 3, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(width, 11, 13) for _ in range(blocks)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def inputs(self, batch: int = BATCH):
        return torch.randn(batch, 8)


def widths_of_blocks(model: Unique) -> dict[int, str]:
    """A width that occurs in one block only -> that block: what a generated kernel's arguments tell about its owner."""
    widths: dict[int, set[str]] = {}
    for index, block in enumerate(model.blocks):
        inner: Any = getattr(block, "_orig_mod", block)
        for width in (inner.up.out_features, inner.mid.out_features):
            widths.setdefault(width, set()).add(f"blocks.{index}")
    return {w: found.pop() for w, found in widths.items() if len(found) == 1}


def linear_shapes(model: nn.Module) -> dict[frozenset[int], set[str]]:
    """{in, out} -> the FQNs of the Linears that have it (several only where a module is tied)."""
    found: dict[frozenset[int], set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            found.setdefault(frozenset((module.in_features, module.out_features)), set()).add(name)
    return found


# ways to compile a model: each gives what is to be called


def whole(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def regional(model, backend):
    for block in model.blocks:
        block.compile(backend=backend)
    return model
