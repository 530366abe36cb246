"""The contract of the compiled path (C1 to C8) where it is meant to be used: Triton kernels, CUDA graphs, streams."""

from __future__ import annotations

import copy

import pytest
import torch

import fxnvtx
from fxnvtx import ranges

from ..compile.generated import counted, forget_generated_code, kernel_hashes, without_graph_caches
from ..compile.launches import KernelError, empty_ranges, enclosing, innermost, witness
from ..compile.models import Same, Unique, linear_shapes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MATMULS = ("mm", "addmm", "triton_tem")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def _model(make=Unique, *args):
    return fxnvtx.instrument(make(*args).cuda(), "net")


def _labels(recording, category="module"):
    return [r.label for r in recording.ranges if r.category == category]


def test_c1_every_launch_is_in_its_own_range():
    model = _model()
    names = linear_shapes(model)
    compiled = torch.compile(model, backend="fxnvtx")
    x = model.inputs().cuda()
    compiled(x).sum().backward()
    with witness() as launches, fxnvtx.record() as recording:
        compiled(x).sum().backward()
    assert recording.balanced
    assert any(n.name.startswith("triton_") for n in launches)
    assert empty_ranges(recording, launches) == []
    checked = 0
    for launch in launches:
        assert enclosing(recording, launch), launch.name
        if launch.name in ("mm", "addmm"):
            sizes = {n for shape in launch.shapes for n in shape}
            owners = {f"net.{o}" for pair, found in names.items() if pair <= sizes for o in found}
            assert innermost(recording, launch) in owners
            checked += 1
    assert checked >= 3 * len(names) - 1


def test_c2_same_triton_kernels_same_bits():
    model = Unique().cuda()
    x = model.inputs().cuda()

    def run(backend):
        mine = copy.deepcopy(model)
        if backend == "fxnvtx":
            fxnvtx.instrument(mine, "net")
        forget_generated_code()
        with counted() as counters, without_graph_caches():
            result = torch.compile(mine, backend=backend)(x)
            result.sum().backward()
        return result, [p.grad for p in mine.parameters()], kernel_hashes(), counters

    plain, ours = run("inductor"), run("fxnvtx")
    assert torch.equal(plain[0], ours[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], ours[1], strict=True))
    assert plain[2] == ours[2]
    assert plain[2]
    assert plain[3] == ours[3]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_c3_one_graph_many_names(mode):
    model = _model(Same, 3)
    for block in model.blocks:
        block.compile(backend="fxnvtx", mode=mode)
    x = model.inputs().cuda()
    with torch.no_grad():
        with counted() as counters:
            for _ in range(4):
                torch.compiler.cudagraph_mark_step_begin()
                model(x)
        assert counters["graphs"] == 1
        with fxnvtx.record() as recording:
            torch.compiler.cudagraph_mark_step_begin()
            model(x)
    blocks = [n for n in _labels(recording) if n.count(".") == 2]
    assert blocks == [f"net.blocks.{i}" for i in range(3)]


def test_c4_a_raising_kernel_and_a_switch():
    model = _model()
    compiled = torch.compile(model, backend="fxnvtx")
    x = model.inputs().cuda()
    with torch.no_grad(), counted() as counters:
        compiled(x)
        with witness() as launches:
            compiled(x)
        for position in range(len(launches)):
            with fxnvtx.record() as recording, witness(fail_at=position), pytest.raises(KernelError):
                compiled(x)
            assert recording.balanced
            assert ranges.local.stack == []
        fxnvtx.set_enabled(model, False)
        with fxnvtx.record() as recording:
            compiled(x)
        assert recording.ranges == []
        fxnvtx.set_enabled(model, True)
        with fxnvtx.record() as recording:
            compiled(x)
        assert "net.blocks.0.up" in _labels(recording)
    assert counters["graphs"] == 1


def test_c5_a_cached_graph_keeps_its_ranges():
    x = Unique().inputs().cuda()

    def run():
        torch._dynamo.reset()
        model = _model()
        with torch.no_grad():
            compiled = torch.compile(model, backend="fxnvtx")
            compiled(x)
            with fxnvtx.record() as recording:
                compiled(x)
        return _labels(recording)

    first = run()
    before = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
    assert run() == first
    cached = torch._dynamo.utils.counters
    assert cached["inductor"]["fxgraph_cache_hit"] > before or cached["aot_autograd"]["autograd_cache_hit"] > 0
    assert "net.blocks.0.up" in first


def test_c6_backward_on_its_own_thread():
    model = _model()
    compiled = torch.compile(model, backend="fxnvtx")
    x = model.inputs().cuda()
    compiled(x).sum().backward()
    with witness() as launches, fxnvtx.record() as recording:
        result = compiled(x).sum()
        forward = len(launches)
        result.backward()
        torch.cuda.synchronize()
    assert recording.balanced
    assert len({n.thread_id for n in launches}) == 2  # autograd runs a device's nodes on a thread of that device
    for launch in launches[forward:]:
        labels = [r.label for r in enclosing(recording, launch)]
        assert labels[:2] == ["backward", "net"], labels


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_c7_modes(mode):
    model = _model()
    plain = torch.compile(copy.deepcopy(model), mode=mode)
    compiled = torch.compile(model, backend="fxnvtx", mode=mode)
    x = model.inputs().cuda()
    seen = set()
    with torch.no_grad():
        for _ in range(4):  # warm up, capture, replay
            torch.compiler.cudagraph_mark_step_begin()
            with fxnvtx.record() as recording:
                result = compiled(x).clone()
            assert recording.balanced
            assert _labels(recording)[0] == "net"  # a replay runs no generated code, the region's range stays
            seen |= set(_labels(recording))
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            expected = plain(x).clone()
    assert torch.allclose(result, expected, atol=1e-3)
    assert {f"net.{n}" for n in ("embed", "blocks.0.up", "blocks.1.down", "head")} <= seen


def test_c7_layers_are_named_while_a_graph_is_captured_even_in_a_silent_warm_up():
    """The report attributes replays to what was open at capture, and serving captures in a warm-up."""
    model = _model()
    compiled = torch.compile(model, backend="fxnvtx", mode="reduce-overhead")
    x = model.inputs().cuda()
    fxnvtx.set_enabled(model, False)
    with fxnvtx.record() as warm_up, torch.no_grad():
        for _ in range(4):
            compiled(x)
    shown = {label.rpartition(".")[0] or label for label in _labels(warm_up)}
    assert warm_up.balanced
    assert any(label.startswith("net") for label in shown)
    with fxnvtx.record() as replay, torch.no_grad():
        compiled(x)
    assert _labels(replay) == []


def test_c7_training_under_cuda_graphs():
    model = _model()
    compiled = torch.compile(model, backend="fxnvtx", mode="reduce-overhead")
    x = model.inputs().cuda()
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        with fxnvtx.record() as recording:
            compiled(x).sum().backward()
            torch.cuda.synchronize()
        assert recording.balanced
        assert _labels(recording).count("backward") == 1
        model.zero_grad()


def test_c7_streams_and_dynamic_shapes():
    model = _model()
    compiled = torch.compile(model, backend="fxnvtx", dynamic=True)
    names = linear_shapes(model)
    side = torch.cuda.Stream()
    with torch.no_grad():
        compiled(model.inputs(5).cuda())
        for batch in (3, 9):
            x = model.inputs(batch).cuda()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), witness() as launches, fxnvtx.record() as recording:
                compiled(x)
            torch.cuda.synchronize()
            assert recording.balanced
            matmuls = [n for n in launches if n.name in ("mm", "addmm")]
            assert len(matmuls) == len(names)
            for launch in matmuls:
                sizes = {n for shape in launch.shapes for n in shape}
                owners = {f"net.{o}" for pair, found in names.items() if pair <= sizes for o in found}
                assert innermost(recording, launch) in owners


def test_c7_a_triton_kernel_of_the_users_own():
    triton = pytest.importorskip("triton")
    import triton.language as tl

    @triton.jit
    def double(source, target, size, BLOCK: tl.constexpr):  # noqa: N803
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < size)
        tl.store(target + at, value * 2, mask=at < size)

    class Doubling(torch.nn.Module):
        def forward(self, x):
            result = torch.empty_like(x)
            double[(triton.cdiv(x.numel(), 64),)](x, result, x.numel(), BLOCK=64)
            return result

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.before = torch.nn.Linear(8, 11)
            self.doubling = Doubling()
            self.after = torch.nn.Linear(11, 13)

        def forward(self, x):
            return self.after(self.doubling(self.before(x)))

    model = _model(Around)
    x = torch.randn(5, 8, device="cuda")
    with torch.no_grad():
        compiled = torch.compile(model, backend="fxnvtx", fullgraph=True)
        compiled(x)
        with witness() as launches, fxnvtx.record() as recording:
            compiled(x)
    owners = {n.name: innermost(recording, n) for n in launches}
    assert next(o for n, o in owners.items() if n.startswith("double")) == "net.doubling"


def test_c8_a_cpp_wrapper_still_runs():
    model = _model()
    compiled = torch.compile(model, backend="fxnvtx", options={"cpp_wrapper": True})
    x = model.inputs().cuda()
    with torch.no_grad():
        compiled(x)
        with fxnvtx.record() as recording:
            compiled(x)
    assert _labels(recording) == ["net"]
