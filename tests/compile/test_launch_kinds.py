"""Every kind of launch that generated code knows: matmuls, fallbacks, custom operators, subgraphs, partitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxnvtx

from .generated import wrapper_sources
from .launches import check_nesting, enclosing, innermost, witness
from .models import Mlp

pytestmark = pytest.mark.slow


@torch.library.custom_op("fxnvtx_tests::negate", mutates_args=())
def negate(x: torch.Tensor) -> torch.Tensor:
    return -x


@negate.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op("fxnvtx_tests::negate_", mutates_args=("x",))
def negate_(x: torch.Tensor) -> None:
    x.neg_()


class Call(nn.Module):
    """A module that does one thing."""

    def __init__(self, function, *parts):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return self.function(self, x)


def _inplace(self, x):
    y = x * 2
    negate_(y)
    return y


# module name -> (what it does, part of the operator's name that must be launched inside it)
KINDS = {
    "sorting": (lambda self, x: x.sort(dim=-1).values, "sort"),
    "topping": (lambda self, x: x.topk(8, dim=-1).values, "topk"),
    "product": (lambda self, x: torch.bmm(x[None], x.t()[None])[0] @ x, "bmm"),
    "scatter": (lambda self, x: x.scatter_reduce(0, x.long() % 8, x, "prod"), "scatter"),
    "placing": (lambda self, x: x.index_put((x.argmax(0) % 4,), x.new_ones(8), accumulate=True), "index_put"),
    "custom": (lambda self, x: negate(x), "fxnvtx_tests.negate"),
    "inplace": (_inplace, "fxnvtx_tests.negate_"),
    "attention": (
        lambda self, x: nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])[0, 0],
        "attention",
    ),
    "factors": (lambda self, x: torch.linalg.qr(x)[0] * x, "linalg_qr"),
}


class Kinds(nn.Module):
    def __init__(self):
        super().__init__()
        for name, (function, _) in KINDS.items():
            setattr(self, name, Call(function))
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.lookup = nn.Embedding(8, 8)

    def forward(self, x):
        for name in KINDS:
            x = getattr(self, name)(x)
        x = self.conv(x[:, None])[:, 0]
        return x + self.lookup(torch.arange(len(x)))


def test_fallbacks_of_every_kind():
    model = fxnvtx.instrument(Kinds(), "net", path="hooks").eval()
    x = torch.randn(8, 8)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fxnvtx", fullgraph=True)
        compiled(x)
        with witness() as launches, fxnvtx.record() as recording:
            compiled(x)
    assert recording.balanced
    assert all(enclosing(recording, n) for n in launches)
    check_nesting(recording)
    names = [n.name for n in launches]
    for module, (_, operator) in KINDS.items():
        found = [n for n in launches if operator and operator in n.name]
        assert found or not operator, (module, names)
        for launch in found:
            if operator == "fxnvtx_tests.negate" and "negate_" in launch.name:
                continue
            assert innermost(recording, launch) == f"net.{module}", (launch.name, innermost(recording, launch))
    convolutions = [n for n in launches if "conv" in n.name]
    assert [innermost(recording, n) for n in convolutions] == ["net.conv"]


class Branching(nn.Module):
    """cond and while_loop: the bodies are functions of their own in the generated code."""

    def __init__(self):
        super().__init__()
        self.yes = nn.Linear(8, 11)
        self.no = nn.Linear(8, 13)
        self.step = nn.Linear(8, 8)
        self.last = nn.Linear(8, 17)

    def forward(self, x):
        def true(x):
            return self.yes(x).sum(-1, keepdim=True) + x

        def false(x):
            return self.no(x).sum(-1, keepdim=True) - x

        x = torch.cond(x.sum() > 0, true, false, (x,))

        def going(i, x):
            return i < 3

        def body(i, x):
            return i + 1, torch.relu(self.step(x))

        _, x = torch._higher_order_ops.while_loop(going, body, (torch.tensor(0), x))
        return self.last(x)


@pytest.mark.parametrize("sign", [1, -1])
def test_control_flow(sign):
    model = fxnvtx.instrument(Branching(), "net")
    x = sign * torch.rand(5, 8)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fxnvtx", fullgraph=True)
        expected = compiled(x)
        with witness() as launches, fxnvtx.record() as recording:
            assert torch.equal(compiled(x), expected)
    assert recording.balanced
    owners = {8: "net.step", 11: "net.yes", 13: "net.no", 17: "net.last"}
    check_nesting(recording)
    matmuls = [n for n in launches if n.name in ("mm", "addmm")]
    for launch in matmuls:
        width = next((n for n in (11, 13, 17) if any(n in s for s in launch.shapes)), 8)
        assert innermost(recording, launch) == owners[width]
    seen = [innermost(recording, n) for n in matmuls]
    assert seen == [("net.yes" if sign > 0 else "net.no"), "net.step", "net.step", "net.step", "net.last"]
    assert not any("unknown" in r.label for r in recording.ranges)
    assert all(enclosing(recording, n) for n in launches)


class Nested(nn.Module):
    """One subgraph serves all blocks (nested_compile_region): the same function is called once for each."""

    def __init__(self, block=lambda: Mlp(8, 11, 13)):
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = _region(block, x)
        return x


@torch.compiler.nested_compile_region
def _region(block, x):
    return block(x)


def test_a_subgraph_that_serves_several_blocks():
    model = fxnvtx.instrument(Nested(), "net")
    x = torch.randn(5, 8)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fxnvtx", fullgraph=True)
        expected = compiled(x)
        with witness() as launches, fxnvtx.record() as recording:
            assert torch.equal(compiled(x), expected)
    check_nesting(recording)
    matmuls = [n for n in launches if n.name in ("mm", "addmm")]
    seen = [innermost(recording, n) for n in matmuls]
    assert seen == [f"net.blocks.{b}.{m}" for b in range(3) for m in ("up", "mid", "down")]


def test_the_modules_fused_in_a_subgraph_that_serves_several_blocks():
    """What a fused kernel computes is found from what it reads, and a subgraph's inputs have names of their own."""
    model = fxnvtx.instrument(Nested(lambda: nn.Sequential(Scale(8), nn.SiLU(), nn.LayerNorm(8))), "net")
    x = torch.randn(5, 8)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fxnvtx", fullgraph=True)
        expected = compiled(x)
        with witness() as launches, fxnvtx.record() as recording:
            assert torch.equal(compiled(x), expected)
    check_nesting(recording)
    seen = [[r.label for r in enclosing(recording, n)] for n in launches]
    assert seen == [["net", f"net.blocks.{b}", "fused(0, 1, 2)"] for b in range(3)]


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x):
        return x * self.weight


def test_partitions(monkeypatch):
    """An operator that no CUDA graph can hold cuts the generated code into functions. Inductor does so only where it
    uses CUDA graphs; the code it generates is the same without them."""
    from torch._inductor.scheduler import Scheduler

    def cuts_at_negate(self, node):
        return "a custom operator" if "negate" in str(getattr(node.node, "op_overload", "")) else None

    monkeypatch.setattr(Scheduler, "should_partition", cuts_at_negate)
    model = fxnvtx.instrument(Cut(), "net")
    x = torch.randn(5, 8)
    patch = {"graph_partition": True, "fx_graph_cache": False}
    no_cache = torch._functorch.config.patch(enable_autograd_cache=False)
    with torch.no_grad(), torch._inductor.config.patch(patch), no_cache:
        compiled = torch.compile(model, backend="fxnvtx", fullgraph=True)
        expected = compiled(x)
        with witness() as launches, fxnvtx.record() as recording:
            assert torch.equal(compiled(x), expected)
    check_nesting(recording)
    seen = [(n.name, innermost(recording, n)) for n in launches if "cpp" not in n.name]
    assert [s for _, s in seen] == ["net.before", "net.cut", "net.after"], seen
    for launch in launches:  # a partition's ranges lie in the region's, not in those of whatever came before
        labels = [r.label for r in enclosing(recording, launch)]
        assert len(labels) <= 2, labels
        assert labels[0] == "net"
    assert not any("unknown" in r.label for r in recording.ranges)
    assert "self.partitions[1]" in wrapper_sources()[-1]


class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.before = nn.Linear(8, 11)
        self.cut = Call(lambda self, x: negate(x))
        self.after = nn.Linear(11, 13)

    def forward(self, x):
        return self.after(self.cut(self.before(x).relu())).relu()


class Crossed(nn.Module):
    """Attention between two sequences: 5 queries of width 8 and 3 keys, each normed by a module of its own."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm_q, self.norm_k = nn.RMSNorm(8), nn.RMSNorm(8)

    def forward(self, x, context):
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context)), self.to_v(context)
        return nn.functional.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])


def test_a_kernel_has_no_owner_whose_values_it_does_not_touch():
    model = fxnvtx.instrument(Crossed(), "net")
    x, context = torch.randn(5, 8), torch.randn(3, 8)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fxnvtx", fullgraph=True)
        compiled(x, context)
        with witness() as launches, fxnvtx.record() as recording:
            compiled(x, context)
    checked = set()
    for launch in launches:
        sizes = {n for shape in launch.shapes for n in shape}
        text = " ".join(r.label for r in enclosing(recording, launch))
        if launch.name.startswith("cpp") and (5 in sizes) != (3 in sizes):
            mine, other = ("norm_q", "norm_k") if 5 in sizes else ("norm_k", "norm_q")
            assert mine in text, (launch, text)
            assert other not in text, (launch, text)
            checked.add(mine)
    assert checked == {"norm_q", "norm_k"}
