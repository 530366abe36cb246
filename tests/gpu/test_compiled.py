"""The contract of the compiled path (C0 to C8) where it is meant to be used: Triton kernels, CUDA graphs, streams."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import fxnvtx
from fxnvtx import errors, ranges

from ..compile.generated import counted, forget_generated_code, kernel_hashes, without_graph_caches
from ..compile.launches import KernelError, empty_ranges, enclosing, innermost, witness
from ..compile.listeners.children import WIDTH
from ..gpuless.cases import GROUPS
from ..gpuless.check import Case, judged, made, problems
from ..gpuless.models import Deep, Dit, Reductions, Vae, Wide, user_kernel
from ..support.limits import CHILD_S
from .device import DEVICE, needs_device
from .models import Alike, Copied, Hooked, Residual
from .witness import device_witness

pytestmark = [pytest.mark.gpu, pytest.mark.slow, needs_device]

SHARED = {**GROUPS["interpreted"], **GROUPS["launches"], **GROUPS["layers"]}
DIT, VAE = SHARED["dit"], SHARED["vae"]
CASES = {
    **{name: SHARED[name] for name in ("dit", "vae", "dit trained", "vae trained", "nested", "branching", "kinds")},
    **{name: SHARED[name] for name in ("combo", "foreach", "user", "reductions", "cooperative", "partitions")},
    **{name: SHARED[name] for name in ("memory planned", "mixed order")},
    "multi-kernel": Case(Reductions, SHARED["reductions"].inputs, patches={"triton.multi_kernel": 1}),
    "residual": Case(Residual, lambda: (torch.ones(2, 16, 8, 8),), {"scaled_dot_product": "attn"}),
    "copied": Case(Copied, lambda: (torch.ones(5, 8),)),
}
UNORDERED = ("kinds", "dit trained", "vae trained", "mixed order")  # sums by atomic additions, in any order


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # to be compared with what eager computes
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def _model(make):
    torch.manual_seed(0)
    return fxnvtx.instrument(make().eval().to(DEVICE), "net", path="hooks")


def _inputs(case):
    return tuple(x.to(DEVICE) for x in case.inputs())


def _labels(recording, category="module"):
    return [r.label for r in recording.ranges if r.category == category]


# -------------------- C0: who listens since when


def _first_line(mode):
    command = [sys.executable, "-m", "tests.gpu.first_line", mode, DEVICE.type]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CHILD_S)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mode", ["silent", "recorder"])
def test_c0_a_listener_from_the_first_line_changes_nothing(mode):
    plain, found = _first_line("plain"), _first_line(mode)
    assert plain["facts"]["graphs"] == 1
    assert found["facts"] == plain["facts"]
    assert {"net.layers.forward_hook", "net.layers.own_call", "net.layers.weight_norm"} <= set(found["labels"])


def test_c0_listeners_come_and_go_without_a_recompile():
    model, x = _model(Hooked), torch.ones(3, WIDTH).to(DEVICE)
    with torch.no_grad(), counted() as counters:
        compiled = torch.compile(model, backend="fxnvtx")
        for _ in range(2):
            compiled(x)
            with fxnvtx.record() as recording:
                compiled(x)
            assert "net.layers.instance_forward" in _labels(recording)
    assert counters["graphs"] == 1


# -------------------- C1: every launch, its owner


@pytest.mark.parametrize("name", CASES)
def test_c1_every_launch_is_in_the_range_of_who_computes(name):
    case = CASES[name]
    # which modules share a kernel is for this device's Inductor to say; that all of them are named is the witness's
    own = tuple(label for label in case.expected if not label.startswith("fused("))
    found, _ = problems(replace(case, expected=own), values=name not in UNORDERED, device=DEVICE)
    assert found == []


@pytest.mark.parametrize("name", ["dit", "vae", "residual", "dit trained", "cooperative", "multi-kernel", "copied"])
def test_c1_as_the_device_sees_it(name, tmp_path):
    """Kernels, copies and zeroing: each launched inside a range of the model, and none of its ranges without any."""
    case = CASES[name]
    with torch._inductor.config.patch(case.patches), torch.set_grad_enabled(case.grad):
        model, inputs = made(case, DEVICE)
        fxnvtx.instrument(model, "net", path="hooks")
        compiled = torch.compile(model, backend="fxnvtx")

        def once():
            result = compiled(*inputs)
            return torch.autograd.grad(result.sum(), list(model.parameters())) if case.grad else result

        once()
        with witness() as launches, fxnvtx.record() as recording:
            once()
        with device_witness(tmp_path) as seen:
            once()
    assert seen, "torch.profiler saw nothing: is CUPTI there?"
    wanted = {innermost(recording, launch) for launch in launches}
    got = {launch.labels[-1] for launch in seen if launch.labels}
    assert wanted - got == set(), "named, and nothing was launched"
    regions = [launch for launch in seen if "net" in launch.labels]
    assert {launch.labels[-1] for launch in regions} <= wanted
    outside = [launch for launch in seen if "net" not in launch.labels]
    assert case.grad or not outside, outside  # in training: autograd's own work around the compiled graphs
    kinds = {launch.work.split()[0] for launch in regions}
    if name == "copied":
        copies = [launch.labels[-1] for launch in regions if launch.work.startswith("Memcpy")]
        assert copies == ["net.out", "net.back"]
    if name == "cooperative":
        assert any(k.startswith(("Memset", "void at::native::vectorized_elementwise")) for k in kinds), kinds


# -------------------- C2, C3: the same code and graphs


@pytest.mark.parametrize("case", [DIT, VAE, CASES["residual"]], ids=["dit", "vae", "residual"])
def test_c2_same_triton_kernels_same_bits(case):
    def run(backend):
        model, inputs = made(case, DEVICE)
        if backend == "fxnvtx":
            fxnvtx.instrument(model, "net")
        forget_generated_code()
        with counted() as counters, without_graph_caches():
            result = torch.compile(model, backend=backend)(*inputs)
            result.sum().backward()
        return result, [p.grad for p in model.parameters()], kernel_hashes(), counters

    with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        plain, ours = run("inductor"), run("fxnvtx")
    assert torch.equal(plain[0], ours[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], ours[1], strict=True))
    assert plain[2] == ours[2]
    assert plain[2]
    assert plain[3] == ours[3]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_c3_one_graph_many_names(mode):
    model, x = _model(Alike), torch.ones(2, 5, 16).to(DEVICE)
    for block in model.blocks:
        block.compile(backend="fxnvtx", mode=mode)
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
    if mode is None:
        assert {f"net.blocks.{i}.attn" for i in range(3)} <= set(_labels(recording))


# -------------------- C4, C5: exceptions, switches, cached graphs


def test_c4_a_raising_kernel_and_a_switch():
    model, inputs = _model(Dit), _inputs(DIT)
    compiled = torch.compile(model, backend="fxnvtx")
    with torch.no_grad(), counted() as counters:
        compiled(*inputs)
        with witness() as launches:
            compiled(*inputs)
        for position in range(len(launches)):
            with fxnvtx.record() as recording, witness(fail_at=position), pytest.raises(KernelError):
                compiled(*inputs)
            assert recording.balanced
            assert ranges.local.stack == []
        fxnvtx.set_enabled(model, False)
        with fxnvtx.record() as recording:
            compiled(*inputs)
        assert recording.ranges == []
        fxnvtx.set_enabled(model, True)
        with fxnvtx.record() as recording:
            compiled(*inputs)
        assert "net.blocks.0.attn" in _labels(recording)
    assert counters["graphs"] == 1


def test_c5_a_cached_graph_keeps_its_ranges():
    inputs = _inputs(VAE)

    def run():
        torch._dynamo.reset()
        model = _model(Vae)
        with torch.no_grad():
            compiled = torch.compile(model, backend="fxnvtx")
            compiled(*inputs)
            with fxnvtx.record() as recording:
                compiled(*inputs)
        return _labels(recording)

    first = run()
    counters = torch._dynamo.utils.counters
    before = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    assert run() == first
    assert counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] > before
    assert {"net.conv1", "net.conv2", "net.conv3"} <= set(first)


# -------------------- C6: training


def test_c6_backward_on_its_own_thread():
    model, inputs = _model(Dit), _inputs(DIT)
    compiled = torch.compile(model, backend="fxnvtx")
    compiled(*inputs).sum().backward()
    with witness() as launches, fxnvtx.record() as recording:
        result = compiled(*inputs).sum()
        forward = len(launches)
        result.backward()
        torch.cuda.synchronize()
    assert recording.balanced
    assert len({n.thread_id for n in launches}) == 2  # autograd runs a device's nodes on a thread of that device
    assert launches[forward:]
    for launch in launches[forward:]:
        labels = [r.label for r in enclosing(recording, launch)]
        assert labels[:2] == ["backward", "net"], labels


# -------------------- C7: modes, graphs and streams


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("case", [DIT, VAE], ids=["dit", "vae"])
def test_c7_modes(case, mode):
    """Whoever wins an autotuning may have fused others in: a layer is asked for by name, alone or not."""
    model, inputs = _model(case.make), _inputs(case)
    plain = torch.compile(copy.deepcopy(fxnvtx.uninstrument(model)), mode=mode)
    fxnvtx.instrument(model, "net", path="hooks")
    compiled = torch.compile(model, backend="fxnvtx", mode=mode)
    seen: list[str] = []
    with torch.no_grad():
        for _ in range(4):  # warm up, capture, replay
            torch.compiler.cudagraph_mark_step_begin()
            with fxnvtx.record() as recording:
                result = compiled(*inputs).clone()
            assert recording.balanced
            assert _labels(recording)[0] == "net"  # a replay runs no generated code, the region's range stays
            seen += _labels(recording)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            expected = plain(*inputs).clone()
    assert torch.allclose(result, expected, atol=1e-3)
    mentioned = " ".join(seen)
    wanted = ("attn", "to_out", "up", "head") if case is DIT else ("conv1", "conv2", "conv3")
    assert [name for name in wanted if name not in mentioned] == []


@pytest.mark.parametrize("make", [Wide, Deep])
def test_c7_templates_are_their_layers(make):
    """Triton's own matrix products: a launch that is handed a layer's weight names this layer, fused or not."""
    shape = (256, 64) if make is Wide else (32, 8192)
    case = Case(make, lambda: (torch.ones(shape),))
    patches = {"max_autotune": True, "max_autotune_gemm_backends": "TRITON"}
    with torch.no_grad(), torch._inductor.config.patch(patches):
        model, inputs = made(case, DEVICE)
        fxnvtx.instrument(model, "net", path="hooks")
        compiled = torch.compile(model, backend="fxnvtx")
        compiled(*inputs)
        with witness() as launches, fxnvtx.record() as recording:
            compiled(*inputs)
    assert any("tem" in launch.name or "triton" in launch.name for launch in launches)
    assert judged(case, model, launches, recording)[0] == []


def test_c7_replays_lie_in_the_range_of_their_region(tmp_path):
    model, inputs = _model(Dit), _inputs(DIT)
    compiled = torch.compile(model, backend="fxnvtx", mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            compiled(*inputs)
        with device_witness(tmp_path) as seen:
            torch.compiler.cudagraph_mark_step_begin()
            compiled(*inputs)
    replayed = [launch for launch in seen if "GraphLaunch" in launch.call]
    assert len(replayed) > 1
    assert {launch.labels for launch in seen} == {("net",)}


def test_c7_layers_are_named_while_a_graph_is_captured_even_in_a_silent_warm_up():
    """The report attributes replays to what was open at capture, and serving captures in a warm-up."""
    model, inputs = _model(Vae), _inputs(VAE)
    compiled = torch.compile(model, backend="fxnvtx", mode="reduce-overhead")
    fxnvtx.set_enabled(model, False)
    with fxnvtx.record() as warm_up, torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            compiled(*inputs)
    assert warm_up.balanced
    assert {"net.conv1", "net.conv2", "net.conv3"} <= set(_labels(warm_up))
    with fxnvtx.record() as replay, torch.no_grad():
        torch.compiler.cudagraph_mark_step_begin()
        compiled(*inputs)
    assert _labels(replay) == []


def test_c7_training_under_cuda_graphs():
    model, inputs = _model(Dit), _inputs(DIT)
    compiled = torch.compile(model, backend="fxnvtx", mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        with fxnvtx.record() as recording:
            compiled(*inputs).sum().backward()
            torch.cuda.synchronize()
        assert recording.balanced
        assert _labels(recording).count("backward") == 1
        model.zero_grad()


def test_c7_streams_and_dynamic_shapes():
    model = _model(Dit)
    compiled = torch.compile(model, backend="fxnvtx", dynamic=True)
    side = torch.cuda.Stream()
    with torch.no_grad():
        compiled(torch.ones(2, 5, 6).to(DEVICE))
        for length in (3, 9):
            x = torch.ones(2, length, 6).to(DEVICE)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), witness() as launches, fxnvtx.record() as recording:
                compiled(x)
            torch.cuda.synchronize()
            assert judged(replace(DIT, expected=("net.blocks.0.attn",)), model, launches, recording)[0] == []


def test_c7_a_triton_kernel_of_the_users_own():
    model, x = _model(user_kernel), torch.ones(5, 8).to(DEVICE)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fxnvtx", fullgraph=True)
        compiled(x)
        with witness() as launches, fxnvtx.record() as recording:
            compiled(x)
    owners = {n.name: innermost(recording, n) for n in launches}
    assert next(o for n, o in owners.items() if n.startswith("double")) == "net.doubling"
    assert empty_ranges(recording, launches) == []


# -------------------- C8: what is not supported


def test_c8_a_cpp_wrapper_still_runs_and_says_once_what_is_missing(caplog, monkeypatch):
    monkeypatch.setattr(errors, "_said", set())
    model, inputs = _model(Vae), _inputs(VAE)
    compiled = torch.compile(model, backend="fxnvtx", options={"cpp_wrapper": True})
    with torch.no_grad(), caplog.at_level("WARNING", logger="fxnvtx"):
        compiled(*inputs)
        with fxnvtx.record() as recording:
            compiled(*inputs)
    assert _labels(recording) == ["net"]
    assert len([r for r in caplog.records if "cpp_wrapper" in r.getMessage()]) == 1
