"""Models in which every parameter is one module's, so that what a kernel is given tells whose work it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@torch.library.custom_op("fxnvtx_gpuless::flip", mutates_args=())
def flip(x: torch.Tensor) -> torch.Tensor:
    return -x


flip.register_fake(torch.empty_like)
flip.register_autograd(lambda ctx, gradient: -gradient)


def _moving(name: str) -> Any:
    """Stands for a tensor's way to another device; device.py makes the real operation of it."""
    operator = torch.library.custom_op(
        f"fxnvtx_gpuless::{name}", torch.clone, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    operator.register_fake(torch.empty_like)
    return operator


to_host, to_device = _moving("to_host"), _moving("to_device")


class Call(nn.Module):
    """A module that does one thing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


class Attention(nn.Module):
    """Queries and keys are normed by modules of their own."""

    def __init__(self, width: int, bias: bool = False) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width, bias=bias) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width // 2), nn.RMSNorm(width // 2)

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        result = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        return self.to_out(result.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.up, self.act, self.down = nn.Linear(width, inside), nn.GELU(), nn.Linear(inside, width)

    def forward(self, x: torch.Tensor) -> Any:
        x = x + self.attn(self.norm(x))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Dit(nn.Module):
    """Two blocks of different widths inside, and an operator of one's own behind a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.blocks = nn.ModuleList([Block(16, 22), Block(16, 26)])
        self.gate, self.flip, self.head = nn.Tanh(), Call(flip), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.flip(self.gate(x) * 2))


class Vae(nn.Module):
    """Convolutions of one, two and three dimensions, each fed by fused work of others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.act1 = nn.Conv1d(6, 12, 3, padding=1), nn.GroupNorm(4, 12), nn.SiLU()
        self.conv2, self.norm2, self.act2 = nn.Conv2d(12, 20, 3, padding=1), nn.GroupNorm(4, 20), nn.SiLU()
        self.up = nn.Upsample(scale_factor=2)
        self.conv3 = nn.Conv3d(20, 14, (1, 3, 3), padding=(0, 1, 1), bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.act1(self.norm1(self.conv1(x))).unflatten(-1, (4, -1))
        x = self.up(self.act2(self.norm2(self.conv2(x))))
        return self.conv3(x[:, :, None].sigmoid())


class Indexed(nn.Module):
    """An operator with indices of its own: computed ones would be whatever a stand-in leaves in memory."""

    def __init__(self, function: Callable[..., Any], index: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("index", index)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, self.index)


class Kinds(nn.Module):
    """One module for each kind of library call and fallback."""

    NAMES = {  # module -> part of the operator's name
        "sorting": "sort",
        "topping": "topk",
        "product": "bmm",
        "scatter": "scatter",
        "placing": "index_put",
        "attention": "scaled_dot_product",
        "factors": "linalg_qr",
        "custom": "flip",
    }

    def __init__(self) -> None:
        super().__init__()
        index = torch.arange(8)
        self.sorting = Call(lambda x: x.sort(dim=-1).values)
        self.topping = Call(lambda x: x.topk(8, dim=-1).values)
        self.product = Call(lambda x: torch.bmm(x[None], x.t()[None])[0])
        self.scatter = Indexed(lambda x, i: x.scatter_reduce(0, i, x, "prod"), index.expand(8, 8).contiguous())
        self.placing = Indexed(lambda x, i: x.index_put((i % 4,), x, accumulate=True), index)
        self.attention = Call(lambda x: F.scaled_dot_product_attention(*([x[None, None]] * 3))[0, 0])
        self.factors = Call(lambda x: torch.linalg.qr(x)[0] * x)
        self.custom = Call(lambda x: flip(x))

    def forward(self, x: torch.Tensor) -> Any:
        for name in self.NAMES:
            x = getattr(self, name)(x)
        return x


class Branching(nn.Module):
    """cond and while_loop: functions of their own in the generated code."""

    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no, self.step, self.last = nn.Linear(8, 11), nn.Linear(8, 13), nn.Linear(8, 8), nn.Linear(8, 17)

    def forward(self, x: torch.Tensor) -> Any:
        def true(x: torch.Tensor) -> Any:
            return self.yes(x).sum(-1, keepdim=True) + x

        def false(x: torch.Tensor) -> Any:
            return self.no(x).sum(-1, keepdim=True) - x

        def going(i: torch.Tensor, x: torch.Tensor) -> Any:
            return i < 3

        def body(i: torch.Tensor, x: torch.Tensor) -> Any:
            return i + 1, torch.relu(self.step(x))

        x = torch.cond(x.sum() > 0, true, false, (x,))
        _, x = torch._higher_order_ops.while_loop(going, body, (torch.zeros_like(x[0, 0], dtype=torch.int64), x))
        return self.last(x)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 11), nn.Linear(11, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.down(torch.relu(self.up(self.norm(x))))


@torch.compiler.nested_compile_region
def _region(block: nn.Module, x: torch.Tensor) -> Any:
    return block(x)


class Nested(nn.Module):
    """One subgraph that serves all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = _region(block, x)
        return x


class Combo(nn.Module):
    """Independent work of three modules, which one kernel can do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.last = nn.GELU(), nn.Tanh(), nn.Sigmoid(), nn.Linear(8, 13)

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Any:
        return self.a(x), self.b(y), self.c(z), self.last(x)


class Foreach(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 11), nn.Linear(11, 13)
        self.each = Call(lambda *tensors: torch._foreach_add(list(tensors), 1.5))

    def forward(self, x: torch.Tensor) -> Any:
        a, b, c = self.each(self.before(x), x, x[:2])
        return self.after(a), b, c


class Reductions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.soft, self.lin = nn.LayerNorm(4096), nn.Softmax(-1), nn.Linear(4096, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.soft(self.norm(x)).sum(), self.lin(x)


class Cut(nn.Module):
    """An operator between two layers at which generated code may be cut into partitions."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.cut, self.after = nn.Linear(8, 11), Call(flip), nn.Linear(11, 13)

    def forward(self, x: torch.Tensor) -> Any:
        return self.after(self.cut(self.before(x).relu())).relu()


class Scan(nn.Module):
    """A sum along one long line, which several blocks of threads do together: they meet in a workspace of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.scan, self.after = nn.Linear(8, 11), Call(lambda x: x.cumsum(-1)), nn.Linear(8, 13)

    def forward(self, x: torch.Tensor, line: torch.Tensor) -> Any:
        return self.before(x), self.scan(line), self.after(x)


class Copied(nn.Module):
    """To the host and back, and an input that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 11), nn.Linear(11, 13)
        self.out, self.back = Call(to_host), Call(to_device)
        self.kept = Call(lambda into, x: into.copy_(x))

    def forward(self, x: torch.Tensor, into: torch.Tensor) -> Any:
        x = self.before(x)
        self.kept(into, x)
        return self.after(self.back(self.out(x)))


class Streams(nn.Module):
    """A part that runs on a stream of its own, as torch.cuda.stream() in a forward leaves it to Inductor."""

    STREAM = 5  # the number that Dynamo would have given it

    def __init__(self) -> None:
        super().__init__()
        self.before, self.act, self.aside, self.gate, self.after = (
            nn.Linear(8, 11),
            nn.Tanh(),
            nn.Linear(11, 14),
            nn.Sigmoid(),
            nn.Linear(11, 17),
        )

    def forward(self, x: torch.Tensor) -> Any:
        x = self.act(self.before(x))
        with torch.fx.traceback.annotate({"stream": self.STREAM}):
            aside = self.gate(self.aside(x))
        return self.after(x), aside


class Wide(nn.Module):
    """Large enough for Triton's matrix products, with something before and after to be fused into them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU()
        self.down = nn.Linear(128, 96, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(self.act(self.up(self.norm(x))))


class Deep(nn.Module):
    """A long inner dimension, which can be cut into a sum of products."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.act = nn.Linear(8192, 32, bias=False), nn.ReLU()

    def forward(self, x: torch.Tensor) -> Any:
        return self.act(self.lin(x))


def user_kernel() -> nn.Module:
    """A layer around a Triton kernel of the user's own."""
    from .kernels import double

    class Doubling(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            result = torch.empty_like(x)
            double[(1,)](x, result, x.numel(), block=64)
            return result

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.doubling, self.after = nn.Linear(8, 11), Doubling(), nn.Linear(11, 13)

        def forward(self, x: torch.Tensor) -> Any:
            return self.after(self.doubling(self.before(x)))

    return Around()
