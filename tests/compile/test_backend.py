"""The backend's other forms: inner backends, strict boundaries, what it refuses, what it says."""

from __future__ import annotations

import logging

import pytest
import torch

import fxnvtx
from fxnvtx import errors
from fxnvtx.compile import inductor
from fxnvtx.errors import CompileError
from fxnvtx.modules.explain import regions

from ..support.limits import CHILD_S
from .generated import counted, without_graph_caches
from .launches import empty_ranges, enclosing, witness
from .models import Same, Unique, linear_shapes

pytestmark = pytest.mark.slow


def _labels(recording, category="module"):
    return [r.label for r in recording.ranges if r.category == category]


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(errors, "_said", set())
    caplog.set_level(logging.WARNING, logger="fxnvtx")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "fxnvtx"]


def _compiled(backend, model=None, **options):
    model = fxnvtx.instrument(Unique(2) if model is None else model, "net")
    call = torch.compile(model, backend=backend, **options)
    x = model.inputs()
    expected = model(x)
    first = call(x)
    with fxnvtx.record() as recording:
        result = call(x)
        result.sum().backward()
    assert recording.balanced
    assert torch.equal(first, result)
    assert torch.allclose(expected, result, atol=1e-5)
    return model, recording


def test_every_layer_under_the_eager_backend():
    model, recording = _compiled(fxnvtx.backend("eager"))
    with fxnvtx.record() as eager:
        model(model.inputs())
    assert _labels(recording) == _labels(eager)
    assert regions()[-1].path == "nodes"


def test_one_graph_of_the_eager_backend_serves_all_blocks():
    model = fxnvtx.instrument(Same(3), "net")
    for block in model.blocks:
        block.compile(backend=fxnvtx.backend("eager"))
    x = model.inputs().requires_grad_()
    with counted() as counters:
        model(x)
    assert counters["graphs"] == 1
    with fxnvtx.record() as recording:
        model(x)
    assert [n for n in _labels(recording) if n.endswith(".mid")] == [f"net.blocks.{i}.mid" for i in range(3)]


def test_range_nodes_unwind_when_a_node_raises():
    fails = False

    def spoiled(x):
        if fails:
            raise ValueError("spoiled")
        return x

    torch._dynamo.allow_in_graph(spoiled)

    class Spoiled(Unique):
        def forward(self, x):
            return self.head(spoiled(self.blocks[0](self.embed(x))))

    model = fxnvtx.instrument(Spoiled(1), "net")
    call = torch.compile(model, backend=fxnvtx.backend("eager"))
    x = model.inputs()
    call(x)
    fails = True
    with fxnvtx.record() as recording, pytest.raises(ValueError, match="spoiled"):
        call(x)
    assert recording.balanced
    assert fxnvtx.ranges.local.stack == []
    assert _labels(recording)[-1] == "net.blocks.0.down"


@pytest.mark.parametrize("inner", ["aot_eager", lambda graph, inputs: graph.forward], ids=["aot_eager", "callable"])
def test_one_range_where_more_cannot_be_had(inner):
    _, recording = _compiled(fxnvtx.backend(inner))
    labels = _labels(recording)
    assert labels[0] == "net"
    assert set(labels) <= {"net", "backward"}
    assert regions()[-1].path == "region"
    assert "would drop or move" in regions()[-1].reason


@pytest.mark.parametrize("depth", [1, None])
def test_strict_boundaries_hold(depth):
    """No kernel belongs to two modules at the chosen depth, and every matmul is in its own."""
    model = fxnvtx.instrument(Unique(2), "net")
    call = torch.compile(model, backend=fxnvtx.backend(boundaries="strict", depth=depth))
    x = model.inputs()
    call(x).sum().backward()
    with witness() as launches, fxnvtx.record() as recording:
        call(x).sum().backward()
    assert recording.balanced
    assert empty_ranges(recording, launches) == []
    names = linear_shapes(model)
    for launch in launches:
        around = [r.label for r in enclosing(recording, launch)]
        assert around
        if launch.name in ("mm", "addmm"):
            sizes = {n for shape in launch.shapes for n in shape}
            assert around[-1] in {f"net.{o}" for pair, found in names.items() if pair <= sizes for o in found}
        if around[-1].startswith("fused("):
            modules = [a for a in around[:-1] if a.startswith("net.")]
            assert depth is not None
            assert len(modules) >= depth, around  # fused below the depth only
    assert regions()[-1].path == "pieces"
    whole = {f"net.{n}" for n, m in model.named_modules() if n and not isinstance(m, torch.nn.ModuleList)}
    forward = recording.ranges[: _labels(recording).index("backward")]
    assert whole <= {r.label for r in forward}


def test_modes_and_options_are_inductors():
    _, recording = _compiled("fxnvtx", mode="max-autotune-no-cudagraphs")
    assert "net.blocks.0.up" in _labels(recording)
    _, recording = _compiled("fxnvtx", options={"epilogue_fusion": False})
    assert "net.blocks.0.up" in _labels(recording)
    _, recording = _compiled(fxnvtx.backend(mode="reduce-overhead"), fullgraph=True, dynamic=False)
    assert "net.blocks.0.up" in _labels(recording)
    model = Unique(1)
    with pytest.raises(Exception, match="Unexpected optimization option nonsense"):
        torch.compile(model, backend="fxnvtx", options={"nonsense": 1})(model.inputs())


def test_a_pass_of_the_users_own_still_runs():
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Seen(CustomGraphPass):
        graphs = 0

        def __call__(self, graph):
            Seen.graphs += 1

        def uuid(self):
            return "fxnvtx tests: Seen"

    with without_graph_caches():
        _, recording = _compiled("fxnvtx", Unique(1), options={"post_grad_custom_post_pass": Seen()})
    assert Seen.graphs == 2  # forward and backward
    assert "net.blocks.0.up" in _labels(recording)


def test_reset_drops_cuda_graphs_as_inductor_does(monkeypatch):
    from torch._inductor import cudagraph_trees

    dropped = []
    monkeypatch.setattr(cudagraph_trees, "reset_cudagraph_trees", lambda: dropped.append(1))
    _compiled("fxnvtx", Unique(1), mode="reduce-overhead")
    torch._dynamo.reset()
    assert dropped == [1]
    _compiled("fxnvtx", Unique(1))
    torch._dynamo.reset()
    assert dropped == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "nonsense"}, "no Dynamo backend; known ones: .*inductor"),
        ({"inner": 5}, "must be the name of a Dynamo backend or a callable"),
        ({"inner": "fxnvtx"}, "its own inner backend"),
        ({"boundaries": "loose"}, "'fused', 'strict'"),
        ({"inner": "eager", "boundaries": "strict"}, "leave boundaries out"),
        ({"boundaries": "strict", "depth": 0}, "from 1 on"),
        ({"mode": "reduce-overhead", "options": {"max_autotune": True}}, "either a mode or options"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    with pytest.raises(CompileError, match=message) as caught:
        fxnvtx.backend(**options)
    assert "\n" not in str(caught.value)


def test_equal_options_make_equal_backends():
    assert fxnvtx.backend("eager") == fxnvtx.backend("eager") != fxnvtx.backend("inductor")
    model = fxnvtx.instrument(Unique(1), "net")
    with counted() as counters:
        for _ in range(2):
            torch.compile(model, backend=fxnvtx.backend("eager"))(model.inputs())
    assert counters["graphs"] == 1


def test_compiling_has_a_range_of_its_own():
    model = fxnvtx.instrument(Unique(1), "net")
    with fxnvtx.record() as recording:
        torch.compile(model, backend="fxnvtx")(model.inputs())
    assert _labels(recording, "compile") == ["compile"]
    compiling = next(r for r in recording.ranges if r.category == "compile")
    first = next(r for r in recording.ranges if r.label == "net.embed")
    assert compiling.end_ns <= first.start_ns  # type: ignore[operator]


def test_a_cpp_wrapper_compiles_and_says_once_what_is_missing(said):
    for _ in range(2):
        torch._dynamo.reset()
        _, recording = _compiled("fxnvtx", Unique(1), options={"cpp_wrapper": True})
        assert set(_labels(recording)) == {"net", "backward"}
    assert [m for m in said() if "cpp_wrapper" in m] == said()
    assert len(said()) == 1
    assert regions()[-1].path == "region"


def test_an_unknown_torch_compiles_and_says_once_what_is_missing(said, monkeypatch):
    monkeypatch.setattr(inductor, "missing", lambda: "codegen.wrapper.SomethingNew")
    for _ in range(2):
        torch._dynamo.reset()
        _, recording = _compiled("fxnvtx", Unique(1))
        assert _labels(recording)[0] == "net"
        assert "net.embed" not in _labels(recording)
    assert len(said()) == 1
    assert "SomethingNew" in said()[0]


def test_this_torch_is_known():
    assert inductor.missing() is None


def test_explain_knows_the_regions():
    with without_graph_caches():  # launch sites are counted while code is generated
        model, _ = _compiled("fxnvtx", Unique(1))
    text = str(fxnvtx.explain(model))
    assert "path kernels" in text
    assert "blocks.0" in text
    region = regions()[-1]
    assert region.owners[:2] == ["embed", "blocks.0"]
    assert region.unknown == 0
    assert region.launches > 8


def test_importing_fxnvtx_does_not_import_dynamo():
    import subprocess
    import sys

    script = "import fxnvtx, sys; sys.exit('torch._dynamo' in sys.modules or 'torch._inductor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=CHILD_S).returncode == 0
