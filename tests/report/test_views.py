"""The same capture by request, step, component, module, class and kernel; folded, filtered, cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxnvtx.errors import ConfigError
from fxnvtx.recording import Range
from fxnvtx.report import VIEWS, Report, from_recording, load
from fxnvtx.report.labels import Name, clean, fold, fused_owners, infer_category, is_module

from .captures import Capture
from .samples import pipeline, recorded

BLOCK = 46_000  # ns of one block on the GPU
OUTSIDE = "outside every module"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return load(pipeline(tmp_path_factory.mktemp("views") / "pipeline.sqlite").close())


def by_name(report: Report, by: str, **options: object) -> dict[str, object]:
    return {row.name: row for row in report.rows(by=by, **options)}  # type: ignore[arg-type]


def test_requests_and_steps(report: Report) -> None:
    requests = {row.name: row for row in report.rows(by="request")}
    assert list(requests) == ["request#0", "request#1", "all 2 requests"]
    assert requests["request#0"].gpu == 4 * 3 * BLOCK + 30_000
    steps = {row.name: row for row in report.rows(by="step")}
    assert list(steps)[:4] == [f"denoising_step_{step}_t{1000 - step}" for step in range(4)]
    assert steps["denoising_step_2_t998"].gpu == 2 * 3 * BLOCK
    assert steps["denoising_step_2_t998"].calls == 2
    whole = steps["all 4 steps"]
    assert whole.each is not None
    assert (whole.kind, whole.gpu, whole.each.count, whole.each.middle) == ("summary", 8 * 3 * BLOCK, 8, 3 * BLOCK)


def test_components_and_modules(report: Report) -> None:
    components = {row.name: row for row in report.rows(by="component")}
    assert components["transformer"].gpu == 8 * 3 * BLOCK
    modules = {row.name: row for row in report.rows(by="module")}
    assert modules["transformer.blocks.1.attn"].gpu == 8 * 30_000
    assert modules["transformer.blocks.1"].gpu_self == 8 * 6_000, "what a fused range took belongs to the block"
    assert "fused(norm, attn)" not in modules


def test_modules_at_a_depth(report: Report) -> None:
    assert {row.name for row in report.rows(by="module", depth=1)} == {"transformer", OUTSIDE}
    three = {row.name: row for row in report.rows(by="module", depth=3)}
    assert set(three) == {"transformer", OUTSIDE, *(f"transformer.blocks.{block}" for block in range(3))}
    assert three["transformer.blocks.0"].gpu == 8 * BLOCK
    assert sum(row.gpu_self for name, row in three.items() if name != OUTSIDE) == 8 * 3 * BLOCK


def test_folded_blocks_and_steps(report: Report) -> None:
    rows = {"/".join(row.path): row for row in report.rows(fold=True)}
    attn = rows["request#*/denoising_step_*/transformer/transformer.blocks.*/transformer.blocks.*.attn"]
    assert (attn.calls, attn.gpu) == (24, 24 * 30_000)
    assert attn.each is not None
    assert (attn.each.count, attn.each.low, attn.each.high) == (24, 30_000, 30_000)
    step = rows["request#*/denoising_step_*"]
    assert step.each is not None
    assert (step.each.count, step.each.low, step.each.high) == (8, 3 * BLOCK, 3 * BLOCK)
    modules = {row.name for row in report.rows(by="module", fold=True)}
    blocks = "transformer.blocks.*"
    assert modules == {OUTSIDE, "transformer", blocks, f"{blocks}.norm", f"{blocks}.attn"}


def test_depth_of_the_tree(report: Report) -> None:
    rows = report.rows(depth=2)
    assert {row.depth for row in rows} == {0, 1}
    assert rows[0].gpu == 4 * 3 * BLOCK + 30_000, "what is cut away still counts for what is around it"


def test_include_and_exclude(report: Report) -> None:
    names = [row.name for row in report.rows(include=["*.attn"])]
    assert names.count("transformer.blocks.0.attn") == 8
    assert "transformer" in names, "the way to a match is shown"
    assert not any(name.endswith(".norm") for name in names)
    names = [row.name for row in report.rows(exclude=["transformer.blocks.*"])]
    assert "transformer" in names
    assert not any("blocks" in name for name in names)
    names = [row.name for row in report.rows(include=["request#1/*"], exclude=["*.norm"])]
    assert "request#0" not in names
    assert "transformer.blocks.2.attn" in names
    assert {row.name for row in report.rows(by="module", include=["*.attn"])} == {
        f"transformer.blocks.{block}.attn" for block in range(3)
    }


def test_kernels(report: Report) -> None:
    rows = {row.name: row for row in report.rows(by="kernel")}
    assert {name: (row.calls, row.gpu) for name, row in rows.items()} == {
        "attn_k": (24, 24 * 30_000),
        "norm_k": (24, 24 * 10_000),
        "fused_k": (24, 24 * 6_000),
        "[memcpy Host-to-Device]": (2, 60_000),
    }
    inside = [row for row in report.rows(kernels=True) if row.kind == "kernel"]
    assert len(inside) == 8 * 3 * 3 + 2
    assert all(row.path[-2] != "transformer" for row in inside)


def test_fused_kernels_keep_their_list_and_split_on_request(report: Report) -> None:
    fused = [row for row in report.rows() if row.fused]
    assert len(fused) == 24
    assert fused[0].fused == ("norm", "attn")
    assert fused[0].path[-2] == "transformer.blocks.0"
    split = {row.name: row for row in report.rows(by="module", split_fused=True)}
    assert split["transformer.blocks.0.attn"].gpu == 8 * 33_000
    assert split["transformer.blocks.0.norm"].gpu == 8 * 13_000
    assert split["transformer.blocks.0.attn"].estimate
    assert split["transformer.blocks.0"].gpu == 8 * BLOCK
    before, after = report.rows(), report.rows(split_fused=True)
    assert sum(row.gpu_self for row in before) == sum(row.gpu_self for row in after)
    assert sum(row.cpu_self for row in before) == sum(row.cpu_self for row in after)
    assert not any(row.fused for row in after)
    assert [row.cpu for row in before if row.depth == 0] == [row.cpu for row in after if row.depth == 0]


def test_residency_and_what_hides_it(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "hidden.sqlite")
    capture.range(0, 100, "residency.prefetch vae", "residency", tid=2, payload=512)
    capture.copy(200, 300, capture.call(10, 12, tid=2), 512)
    capture.range(0, 90, "transformer")
    capture.kernel(50, 260, capture.call(20, 22))
    row = next(row for row in load(capture.close()).rows() if row.category == "residency")
    assert (row.cpu, row.copies, row.copied_bytes, row.payload) == (100, 1, 512, 512)
    assert row.resident == 100 + 100, "the range, and its copy on the device"
    assert row.overlap == 50 + 60


def test_residency_without_a_gpu_is_hidden_by_other_threads(tmp_path: Path) -> None:
    recording = recorded(
        [
            Range("transformer", "module", None, 1, 0, 0, 60),
            Range("transformer.a", "module", None, 1, 1, 10, 20),
            Range("residency.prefetch vae", "residency", 7, 2, 0, 30, 100),
            Range("vae", "module", None, 2, 1, 40, 90),  # its own thread: that hides nothing
        ]
    )
    row = next(row for row in from_recording(recording).rows() if row.category == "residency")
    assert (row.resident, row.overlap) == (70, 30)


def test_launch_gaps_belong_to_the_range_around_both_launches(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "gaps.sqlite")
    capture.range(0, 1000, "model")
    capture.range(100, 400, "a")
    capture.range(500, 900, "b")
    for at, start, end in (
        (110, 2000, 2010),
        (200, 2015, 2030),
        (510, 2100, 2110),
        (600, 2107, 2120),
        (700, 2200, 2210),
    ):
        capture.kernel(start, end, capture.call(at, at + 5))
    rows = {row.name: row for row in load(capture.close()).rows()}
    assert rows["a"].gap == 5
    assert rows["b"].gap == 80
    assert rows["model"].gap == 5 + 70 + 80


def test_classes_come_from_recordings(tmp_path: Path) -> None:
    recording = recorded(
        [
            Range("m", "module", None, 1, 0, 0, 100),
            Range("m.0", "module", None, 1, 1, 10, 20),
            Range("m.1 in=[[2, 3]]", "module", None, 1, 1, 30, 60),
            Range("m.2", "module", None, 1, 1, 70, 80),
        ],
        classes={"m": "Model", "m.0": "Linear", "m.1": "Linear"},
    )
    rows = {row.name: row for row in from_recording(recording).rows(by="class")}
    assert {name: (row.calls, row.cpu) for name, row in rows.items()} == {
        "Model": (1, 100),
        "Linear": (2, 40),
        "class not recorded": (1, 10),
    }


def test_steps_told_apart_by_their_payload(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "payload.sqlite")
    for step in range(3):
        capture.range(step * 100, step * 100 + 50 + step, "step", "step", payload=step)
    rows = load(capture.close()).rows(by="step")
    assert [row.name for row in rows] == ["step[0]", "step[1]", "step[2]", "all 3 steps"]


def test_unknown_views_and_depths(report: Report) -> None:
    with pytest.raises(ConfigError, match="no view by 'colour': choose one of"):
        report.rows(by="colour")
    with pytest.raises(ConfigError, match="depth is 0"):
        report.rows(depth=0)


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_works_on_a_capture_without_fxnvtx(view: str, tmp_path: Path) -> None:
    capture = Capture(tmp_path / "torch.sqlite", domain=None)
    capture.range(0, 100, "aten::linear, op_id = 5", None, registered=False)
    capture.range(10, 90, "aten::addmm, seq = 4, op_id = 6", None, registered=False)
    capture.range(110, 150, "aten::linear, op_id = 7", None, registered=False)
    capture.kernel(1000, 1010, capture.call(20, 30), "gemm")
    rows = load(capture.close()).rows(by=view)
    if view in ("tree", "module", "range"):
        assert [row.name for row in rows] == ["aten::linear", "aten::addmm"]
        assert rows[0].calls == 2


def test_too_many_paths_are_told_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxnvtx.report.tree.Tree.__init__.__defaults__", (5,))
    capture = Capture(tmp_path / "many.sqlite")
    for index in range(20):
        capture.range(index * 10, index * 10 + 8, f"name {index}x", registered=False)
    rows = load(capture.close()).rows()
    assert len(rows) == 6
    assert rows[-1].kind == "unknown"
    assert "distinct ranges" in rows[-1].name
    assert sum(row.calls for row in rows) == 20


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("request#3", "request"),
        ("stage_denoise", "stage"),
        ("stage:vae.decode", "stage"),
        ("denoising_loop", "loop"),
        ("denoising_step_3_t881", "step"),
        ("step 4", "step"),
        ("stepper.net", "module"),
        ("residency.load vae", "residency"),
        ("aten::mm", "op"),
        ("AddmmBackward0", "op"),
        ("transformer.blocks.0.attn", "module"),
        ("transformer in=[[2, 3]]", "module"),
        ("fused(a, b)", "module"),
        ("cudaProfiler range!", "range"),
    ],
)
def test_categories_from_the_text(text: str, category: str) -> None:
    assert infer_category(text) == category


def test_texts() -> None:
    assert clean("aten::mm, seq = 4, op_id = 12, sizes = [[2]]") == "aten::mm in=[[2]]"
    assert fold("a.10.b.3", "module") == "a.*.b.*"
    assert fold("conv2d.3x3.1 in=[[2, 3]]", "module") == "conv2d.3x3.* in=[[2, 3]]"
    assert fold("denoising_step_4_t881", "step") == "denoising_step_*"
    assert fold("denoising_step_4_t937.5", "step") == "denoising_step_*"
    assert fold("step[3]", "step") == "step*"
    assert fold("request#12", "request") == "request#*"
    assert fused_owners("fused(norm1, attn.to_q)") == ("norm1", "attn.to_q")
    assert fused_owners("fused") == ()
    assert is_module(Name("blocks.0", "layer"))
    assert not is_module(Name("some text!", "layer"))


def test_a_cut_list_of_owners_leaves_the_rest_where_it_is_known_to_be(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "cut.sqlite")
    capture.range(0, 1000, "net")
    capture.range(100, 200, "net.a")
    capture.range(300, 400, "fused(a, b.0, self, 2 more)")
    capture.kernel(5000, 5100, capture.call(310, 320))
    rows = {row.path: row for row in load(capture.close()).rows(split_fused=True)}
    assert {path: (row.gpu, row.gpu_self) for path, row in rows.items()} == {
        ("net",): (100, 60),
        ("net", "net.a"): (20, 20),
        ("net", "net.b.0"): (20, 20),
    }
    assert rows["net", "net.a"].cpu == 100 + 20
    assert sum(row.cpu_self for row in rows.values()) == rows[("net",)].cpu == 1000


def test_the_compilers_unknown_owners_are_no_modules(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "unknown.sqlite")
    capture.range(0, 100, "net")
    capture.range(10, 20, "owner unknown (?)", "op")
    rows = load(capture.close()).rows()
    assert [row.kind for row in rows] == ["range", "unknown"]


def test_operators_are_no_modules_where_there_are_modules(tmp_path: Path) -> None:
    """`predict_noise` encloses the denoiser, `aten::mm` lies inside of it: neither is a component or a class."""
    capture = Capture(tmp_path / "ops.sqlite")
    capture.range(0, 1000, "predict_noise", "op")
    capture.range(100, 900, "denoising.dit")
    capture.range(200, 800, "denoising.dit.proj")
    capture.range(300, 400, "aten::mm", "op")
    capture.kernel(5000, 5100, capture.call(310, 320))
    report = load(capture.close())
    report.classes.update({"denoising.dit": "DiT", "denoising.dit.proj": "Linear"})
    assert [(row.name, row.gpu) for row in report.rows(by="component")] == [
        ("denoising.dit", 100),
        ("outside every component", 0),
    ]
    assert [(row.name, row.gpu_self) for row in report.rows(by="module")] == [
        ("denoising.dit", 0),
        ("denoising.dit.proj", 100),
        (OUTSIDE, 0),
    ]
    assert [row.name for row in report.rows(by="class")] == ["DiT", "Linear", "outside every class"]
