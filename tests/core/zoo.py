"""Small levels, one habit of real models each. The traceable ones must take the fx path, or its tests test nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-3
TABLE = {"scale": 2.0}
W = 4


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(W, W)
        self.b = nn.Linear(W, W)


class Straight(Base):
    def forward(self, x):
        return self.b(F.gelu(self.a(x)))


class Scaled(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.0
        self.mode = "tanh"

    def forward(self, x):
        return torch.copysign(self.a(x), x * 0 + self.scale) + F.gelu(self.b(x), approximate=self.mode)


class Truthy(Base):
    def __init__(self) -> None:
        super().__init__()
        self.flag = 1

    def forward(self, x):
        return {"y": self.a(x), "flag": self.flag}


class OwnTensors(Base):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(W))
        self.register_buffer("shift", torch.randn(W))

    def forward(self, x):
        return self.a(x) * self.weight + self.shift.to(self.weight.dtype)


class Attention(Base):
    def forward(self, x):
        b, n, c = x.shape
        q = self.a(x).view(b, n, 2, c // 2).transpose(1, 2)
        k = self.b(x).view(b, n, 2, c // 2).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, k)
        return y.transpose(1, 2).reshape(b, n, c)


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(3))
        self.norm = nn.LayerNorm(W)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)


class LoopSequential(nn.Module):
    """Runs the items of a Sequential itself, one of which has another name too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(W, W)
        self.layers = nn.Sequential(self.first, nn.Linear(W, W))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Optional(Base):
    def forward(self, x, cond=None):
        x = self.a(x)
        if cond is not None:
            x = x + self.b(cond)
        return x


class StarArgs(Base):
    def forward(self, *args, **kwargs):
        return self.a(args[0]) + self.b(kwargs.get("y", args[-1]))


class KeywordOnly(Base):
    def forward(self, x, *, y=None, gain=2.0):
        return self.a(x) * gain, y


class PositionalOnly(Base):
    def forward(self, x, /, y=1.0):
        return self.a(x) * y


def helper(x):
    if x.sum() > 0:
        return x * 2
    return x - 1


class Helper(Base):
    def forward(self, x):
        return self.b(helper(self.a(x)))


class GlobalNumber(Base):
    def forward(self, x):
        return self.a(x) + EPS


class GlobalTable(Base):
    def forward(self, x):
        return self.a(x) * TABLE["scale"]


class Dropouts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(W)

    def forward(self, x):
        return F.dropout(self.drop(self.norm(self.a(x))), 0.3, self.training)


class Factory(Base):
    def forward(self, x):
        pos = torch.arange(W, dtype=x.dtype)
        return self.a(x + pos)


class LocalFactory(Base):
    """Read as sound, refused while it is traced."""

    def forward(self, x):
        size = 4
        return self.a(x + torch.ones(size))


class SymbolicFactory(Base):
    def forward(self, x):
        return self.a(x) + torch.zeros(x.shape[0], 1)


class RandomFactory(Base):
    def forward(self, x):
        noise = torch.randn(W)
        return self.a(x + noise)


class RandomLike(Base):
    def forward(self, x):
        return self.a(x + torch.randn_like(x))


class InPlace(Base):
    def forward(self, x):
        y = self.a(x)
        y.mul_(2).add_(1)
        z = y[:, :2]
        z.zero_()
        return self.b(y)


class AugAssign(Base):
    def forward(self, x):
        y = self.a(x)
        y += 1
        return self.b(y)


class Unpack(Base):
    def forward(self, x):
        p, q = self.a(x).chunk(2, dim=-1)
        (r, s), t = (p, q), p
        return torch.cat([r, s, t, q], dim=-1)


class UnpackChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x):
        p, q = self.pair(x)
        return p + q


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(W, W)
        self.parts = 2

    def forward(self, x):
        y = self.a(x)
        return tuple(y for _ in range(self.parts))


class Appends(nn.Module):
    """A child that writes into the list it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(W, W)

    def forward(self, kept, x=None):
        y = self.a(kept[-1])
        kept.append(y)
        return y


class SharedList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = Appends()
        self.two = Appends()

    def forward(self, x):
        kept = [x]
        self.one(kept)
        y = self.two(kept)
        return kept, y


class SharedDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.write = Writes()
        self.b = nn.Linear(W, W)

    def forward(self, x):
        state = {"x": x}
        pair = (state, x)
        self.write(pair)
        return self.b(state["x"])


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(W, W)

    def forward(self, pair):
        state, x = pair
        state["x"] = self.a(x)


class CalledTwice(Base):
    def forward(self, x):
        return self.b(self.a(self.a(x)))


class SameChildTwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(W, W)
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x))


class NestedInputs(Base):
    def forward(self, batch, extra):
        return {"out": [self.a(batch["x"]), self.b(extra[0][1])], "same": batch["x"]}


class NoGrad(Base):
    @torch.no_grad()
    def forward(self, x):
        return self.b(self.a(x))


class InnerNoGrad(Base):
    def forward(self, x):
        with torch.no_grad():
            x = self.a(x)
        return self.b(x)


class Autocast(Base):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.b(self.a(x))


class OwnCall(nn.Linear):
    """A child whose class adds to __call__."""

    def __init__(self) -> None:
        super().__init__(W, W)

    def __call__(self, x):
        return super().__call__(x) * 2


class HasOwnCall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = OwnCall()
        self.b = nn.Linear(W, W)

    def forward(self, x):
        return self.b(self.a(x))


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(W, W)

    def forward(self, x, times=2):
        x = self.a(x)
        return self(x, times - 1) if times else x


class Compares(Base):
    def forward(self, x):
        return torch.where(x > 0, self.a(x), self.b(x))


class Decides(Base):
    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


class ShadowedArgument(Base):
    """Argument names that mean something to Python or to torch.fx."""

    def forward(self, input, type=1.0, getattr=None):
        return self.a(input) * type, getattr


class Wide(nn.Module):
    """Straight inside straight inside a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(W, W), nn.GELU(), Straight())
        self.attn = Attention()
        self.loop = Loop()
        self.tail = nn.ModuleDict({"x": nn.Linear(W, W)})

    def forward(self, x):
        x = self.stem(x)
        x = self.loop(x + self.attn(x))
        return self.tail["x"](x)


TRACEABLE = (
    Straight,
    Scaled,
    Truthy,
    OwnTensors,
    Loop,
    Unpack,
    UnpackChild,
    InPlace,
    RandomLike,
    Compares,
    CalledTwice,
    Dropouts,
)
REFUSED = (
    Optional,
    StarArgs,
    PositionalOnly,
    Helper,
    GlobalNumber,
    GlobalTable,
    Factory,
    RandomFactory,
    LocalFactory,
    AugAssign,
    SharedList,
    SharedDict,
    SameChildTwoNames,
    LoopSequential,
    NoGrad,
    InnerNoGrad,
    Autocast,
    HasOwnCall,
    Recursive,
    Decides,
)
