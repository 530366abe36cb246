"""The user's own ranges in compiled code: there, around the kernels of the code inside them, and never in the way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxnvtx

from .generated import counted, kernel_hashes, without_graph_caches
from .launches import enclosing, witness
from .models import PRIMES, Mlp

PREMADE = fxnvtx.range("premade")


@fxnvtx.range("decorated")
def decorated(x):
    return x.cos()


class Ranged(Mlp):
    """Every form, around layers whose shapes nobody else has."""

    def forward(self, x):
        with fxnvtx.range("mine", category="op"):
            h = self.up(self.norm(x))
            with PREMADE:
                h = torch.relu(self.mid(h))
        fxnvtx.range_push("pushed")
        y = self.down(h)
        fxnvtx.range_pop()
        with fxnvtx.maybe_nvtx_range("off", enabled=False):
            y = decorated(y)
        return x + y


class Bare(Mlp):
    """The same without ranges."""

    def forward(self, x):
        h = self.up(self.norm(x))
        h = torch.relu(self.mid(h))
        return x + self.down(h).cos()


class Row(nn.Module):
    def __init__(self, kind, same=True):
        super().__init__()
        sizes = [(11, 13), (11, 13) if same else (17, 19)]
        self.blocks = nn.ModuleList([kind(PRIMES[0], *size) for size in sizes])

    def forward(self, x):
        with fxnvtx.maybe_nvtx_range("all"):
            for block in self.blocks:
                x = block(x)
        return x


def whole(model, backend):
    return torch.compile(model, backend=backend, fullgraph=True)


def regional(model, backend):
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    return model


def _tree(recording):
    def walk(nodes):
        return [(n.label, n.category, walk(n.children)) for n in nodes if n.category != "compile"]

    return walk(recording.tree())


@pytest.mark.parametrize("way", [whole, regional])
@pytest.mark.parametrize("first", ["silent", "listening"])
def test_the_ranges_are_those_of_the_eager_model(way, first):
    model, x = fxnvtx.instrument(Row(Ranged), "net"), torch.randn(3, PRIMES[0])
    with torch.no_grad(), counted() as counters:
        with fxnvtx.record() as eager:
            expected = model(x)
        call = way(model, fxnvtx.backend("eager"))
        if first == "silent":
            call(x)
        else:
            with fxnvtx.record():
                call(x)
        with fxnvtx.record() as recording:
            assert torch.equal(call(x), expected)
        assert torch.equal(call(x), expected)
    assert recording.balanced
    assert _tree(recording) == _tree(eager)
    assert {"all", "mine", "premade", "pushed", "decorated"} <= {r.label for r in recording.ranges}
    assert counters["graphs"] == 1
    assert counters["breaks"] == {}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_backends_see_a_graph_without_them(backend):
    """Graphs, operations and results are those of the model without ranges, whoever listens."""
    seen = []
    for kind in (Bare, Ranged):
        torch.manual_seed(0)
        model, x = Row(kind), torch.ones(3, PRIMES[0])
        sizes: list[Any] = []

        def counting(graph_module, inputs, sizes=sizes):
            sizes.append([str(n.target) for n in graph_module.graph.nodes if n.op == "call_function"])
            return torch._dynamo.lookup_backend(backend)(graph_module, inputs)

        with counted() as counters:
            call = torch.compile(model, backend=counting, fullgraph=True)
            result = call(x)
            with fxnvtx.record():
                assert torch.equal(call(x), result)
        seen.append((result.tolist(), sizes, counters["graphs"], counters["breaks"]))
    assert seen[0] == seen[1]


def test_strict_export_does_not_know_them():
    model, x = Row(Ranged), torch.ones(3, PRIMES[0])
    with fxnvtx.record():
        program = torch.export.export(model, (x,), strict=True)
    assert not any(str(getattr(n.target, "__module__", "")).startswith("fxnvtx") for n in program.graph.nodes)
    assert torch.equal(program.module()(x), model(x))


def test_a_graph_break_inside_a_range():
    class Breaks(Mlp):
        def forward(self, x):
            with fxnvtx.range("around"):
                x = self.up(x)
                torch._dynamo.graph_break()
                x = self.mid(x)
            return self.down(x)

    model, x = fxnvtx.instrument(Breaks(PRIMES[0], 11, 13), "net"), torch.ones(3, PRIMES[0])
    expected = model(x)
    call = torch.compile(model, backend=fxnvtx.backend("eager"))
    call(x)
    with fxnvtx.record() as recording:
        assert torch.equal(call(x), expected)
    assert recording.balanced
    assert fxnvtx.ranges.local.stack == [] or not len(fxnvtx.ranges.local.stack)
    by_label = {r.label: r for r in recording.ranges}
    around, down = by_label["around"], by_label["net.down"]
    assert not around.start_ns <= down.start_ns <= around.end_ns  # type: ignore[operator]
    inside = [r for r in recording.ranges if r.label in ("net.up", "net.mid")]
    assert len(inside) == 2
    everywhere = [r for r in recording.ranges if r.label == "around"]
    assert all(any(a.start_ns <= r.start_ns and r.end_ns <= a.end_ns for a in everywhere) for r in inside)  # type: ignore[operator]


def test_inside_a_checkpointed_block():
    class Saved(Mlp):
        def forward(self, x):
            with fxnvtx.range("kept"):
                return checkpoint(self.inside, x, use_reentrant=False)

        def inside(self, x):
            with fxnvtx.range("again"):
                return self.down(self.mid(self.up(x)))

    model, x = fxnvtx.instrument(Saved(PRIMES[0], 11, 13), "net"), torch.ones(3, PRIMES[0])
    expected = model(x)
    with counted() as counters:
        call = torch.compile(model, backend=fxnvtx.backend("aot_eager"), fullgraph=True)
        with fxnvtx.record():
            result = call(x)
        call(x).sum().backward()
    assert torch.equal(result, expected)
    assert counters["graphs"] == 1


@pytest.mark.slow
def test_kernels_lie_inside_the_ranges_forward_and_backward():
    """The witness: which Linear a matmul is shows in its shape, and which range it must be in in the code above."""
    model, x = Row(Ranged, same=False), torch.randn(3, PRIMES[0])
    with without_graph_caches(), torch.no_grad():
        bare = Row(Bare, same=False)
        bare.load_state_dict(model.state_dict())
        plain = torch.compile(bare, backend="inductor")(x)
        kernels = kernel_hashes()
    fxnvtx.instrument(model, "net")
    call = whole(model, "fxnvtx")
    with without_graph_caches(), torch.no_grad():
        assert torch.equal(call(x), plain)
    assert set(kernels) <= set(kernel_hashes())
    call(x).sum().backward()
    with witness() as launches, fxnvtx.record() as recording:
        call(x).sum().backward()
    assert recording.balanced
    wanted = {}
    blocks: Any = model.blocks
    for index, block in enumerate(blocks):
        wanted[frozenset((PRIMES[0], block.up.out_features))] = {"mine", f"net.blocks.{index}.up"}
        wanted[frozenset((block.up.out_features, block.mid.out_features))] = {"premade", f"net.blocks.{index}.mid"}
        wanted[frozenset((block.mid.out_features, PRIMES[0]))] = {"pushed", f"net.blocks.{index}.down"}
    checked = 0
    for launch in launches:
        sizes = frozenset(n for shape in launch.shapes for n in shape if n != 3)
        if launch.name in ("mm", "addmm") and sizes in wanted:
            around = {r.label for r in enclosing(recording, launch)}
            assert wanted[sizes] | {"all"} <= around, (launch, around)
            checked += 1
    assert checked >= 12  # six Linears, forward and backward


def test_compiled_code_of_a_forward_that_is_a_coroutine():
    class Async(Mlp):
        compiled: Any

        async def forward(self, x):
            await asyncio.sleep(0)
            x = self.compiled(x)
            await asyncio.sleep(0)
            return x

        def work(self, x):
            return Mlp.forward(self, x)

    model = fxnvtx.instrument(Async(PRIMES[1], 23, 29), "m", exclude=())
    model.compiled = torch.compile(model.work, backend="fxnvtx")

    async def both():
        x = torch.zeros(3, PRIMES[1])
        await asyncio.gather(model(x), model(x))

    with torch.no_grad(), fxnvtx.record() as recording:
        asyncio.run(both())
    calls = recording.tree()
    assert [call.label for call in calls] == ["m", "m"]
    for call in calls:
        assert {"m.up", "m.down"} <= {node.label for node in call.children}
    assert recording.balanced
