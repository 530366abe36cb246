"""Every producer's vocabulary in every view: nothing nests in a flat view, nothing is lost, nothing counts twice."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fxnvtx
from fxnvtx import record
from fxnvtx.categories import CATEGORIES
from fxnvtx.recording import Range, Recording
from fxnvtx.report import VIEWS, Report, diff, from_recording, load, write_chrome
from fxnvtx.report.labels import fold
from fxnvtx.report.rows import FLAT

from .captures import Capture
from .samples import recorded

# (label, category) as the pipeline package, the diffusers integration, the compiled path, the residency manager, and
# programs that know no categories (SGLang, emit_nvtx) write them
VOCABULARY = (
    ("request#0", "request"), ("request#1", "request"), ("request_group", "request"), ("rank_0", "op"),
    ("stage_denoising", "stage"), ("stage_decoding", "stage"), ("encode_prompt", "stage"), ("vae.decode", "stage"),
    ("vae.decode", "op"), ("prior_pipe", "stage"), ("denoising_loop", "loop"), ("upscaling", "loop"),
    ("denoising_step_0_t999", "step"), ("denoising_step_1_t500", "step"), ("step_0", "step"),
    ("scheduler_step", "op"), ("scheduler_step", "step"), ("predict_noise", "op"), ("predict_noise.conditional", "op"),
    ("vae_tile_y0_x64", "op"), ("vae_tile call 3", "step"), ("transformer", "module"),
    ("transformer.blocks.0", "module"), ("transformer.blocks.0", "piece"), ("transformer.blocks.1.attn", "module"),
    ("transformer.blocks.1.attn", "piece"), ("fused(blocks.0.ff, blocks.1.norm)", "op"), ("owner unknown (?)", "op"),
    ("backward", "module"), ("residency.load transformer", "residency"), ("compile", "compile"),
    ("stage_vae", ""), ("denoising_step_3", ""), ("aten::mm", ""), ("iteration 10", ""), ("anything else", ""),
)  # fmt: skip

Item = tuple[tuple[str, str], list[Any]]
items: st.SearchStrategy[Item] = st.recursive(
    st.tuples(st.sampled_from(VOCABULARY), st.just([])),
    lambda below: st.tuples(st.sampled_from(VOCABULARY), st.lists(below, max_size=4)),
    max_leaves=15,
)


def recording_of(threads: list[list[Item]]) -> Recording:
    ranges: list[Range] = []
    for thread, roots in enumerate(threads):
        now = 0

        def write(item: Item, depth: int, thread: int = thread) -> None:
            nonlocal now
            (text, category), inside = item
            place, start = len(ranges), now
            ranges.append(Range(text, category, None, thread, depth, start, None))
            now += 1 + len(text)
            for child in inside:
                write(child, depth + 1, thread)
                now += 3
            now += 1
            ranges[place] = Range(text, category, None, thread, depth, start, now)

        for item in roots:
            write(item, 0)
            now += 5
    classes = {"transformer": "DiT", "transformer.blocks.0": "B", "transformer.blocks.1.attn": "A"}
    return recorded(ranges, classes=classes)


def check(report: Report, by: str, **options: Any) -> None:
    rows = [row for row in report.rows(by, **options) if row.kind not in ("summary", "side")]
    whole = report.tree(options.get("include", ()), options.get("exclude", ()))
    assert sum(row.cpu_self for row in rows) == whole.cpu
    assert sum(row.gpu_self for row in rows) == whole.gpu
    if by in FLAT:
        assert sum(row.cpu for row in rows) == whole.cpu
        if (whole.gpu if report.has_gpu else whole.cpu) > 0:
            assert sum(row.share for row in rows) == pytest.approx(1.0)
    for row in rows:
        assert 0 <= row.share <= 1
        each = row.each
        if each is not None:
            assert each.low <= each.middle <= each.most <= each.high
    summaries = [row for row in report.rows(by, **options) if row.kind == "summary"]
    assert all(row.share <= 1.000001 for row in summaries)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(items, max_size=4), min_size=1, max_size=2),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(), ("*.attn",), ("denoising_step_*",), ("nothing",)]),
    st.sampled_from([(), ("residency*", "compile"), ("transformer.blocks.*",)]),
)
def test_rows_and_the_outside_sum_to_the_whole(
    threads: list[list[Item]], folded: bool, split: bool, include: tuple[str, ...], exclude: tuple[str, ...]
) -> None:
    report = from_recording(recording_of(threads))
    for by in VIEWS:
        if by != "kernel":
            check(report, by, fold=folded, split_fused=split and not include and not exclude)
            check(report, by, fold=folded, include=include, exclude=exclude)


@pytest.mark.parametrize("by", sorted(FLAT))
def test_device_time_of_flat_views_sums_to_the_whole(by: str, tmp_path: Path) -> None:
    """Kernels of two steps overlap on the device: each instant counts for one of them."""
    capture = Capture(tmp_path / "overlap.sqlite")
    for number, category in enumerate(("request", "stage", "loop", "step", "module")):
        capture.range(number, 1000 - number, f"{category}{number}", category)
        capture.range(2000 + number, 3000 - number, f"{category}{number}b", category)
    for stream, (call, start, end) in enumerate([(100, 5000, 5100), (2100, 5050, 5200), (4000, 5150, 5300)]):
        capture.kernel(start, end, capture.call(call, call + 1), stream=stream)
    check(load(capture.close()), by)


@pytest.mark.slow
def test_every_category_in_the_sources_is_in_the_vocabulary() -> None:
    """Producers write literals; one that no view knows would be lost."""
    found: dict[str, str] = {}
    for path in sorted(Path(fxnvtx.__file__).parent.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            given = [word.value for word in call.keywords if word.arg == "category"]
            if name == "label" and len(call.args) > 1:
                given.append(call.args[1])
            found.update({c.value: str(path) for c in given if isinstance(c, ast.Constant) and type(c.value) is str})
    assert {"op", "residency", "stage", "request"} <= set(found), "this test reads nothing"
    assert not {category: where for category, where in found.items() if category not in CATEGORIES}


# ------------------------------------------------------------------------------------------------ calls


def pieces(calls: int = 3) -> Recording:
    """A compiled block: each call opens its range three times; its neighbour runs between the pieces."""
    ranges: list[Range] = []
    now = 0
    for _ in range(calls):
        start = now
        place = len(ranges)
        ranges.append(Range("net", "module", None, 1, 0, start, None))
        for number in range(3):
            ranges.append(Range("net.a", "piece" if number else "module", None, 1, 1, now, now + 10 + number))
            ranges.append(Range("net.a.x", "piece" if number else "module", None, 1, 2, now, now + 5))
            ranges.append(Range("net.b", "module" if not number else "piece", None, 1, 1, now + 20, now + 21))
            now += 30
        ranges[place] = Range("net", "module", None, 1, 0, start, now)
    return recorded(ranges, classes={"net": "Net", "net.a": "A", "net.a.x": "X", "net.b": "B"})


@pytest.mark.parametrize(("by", "name"), [("tree", "net.a"), ("module", "net.a"), ("class", "A"), ("range", "net.a")])
def test_a_call_in_pieces_is_one_call(by: str, name: str) -> None:
    row = next(row for row in from_recording(pieces()).rows(by) if row.name == name)
    assert (row.calls, row.cpu, row.category) == (3, 99, "module")
    assert row.each is not None
    assert (row.each.count, row.each.low, row.each.middle, row.each.high) == (3, 33, 33, 33)


def test_pieces_in_a_capture_count_the_same_with_device_time(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "pieces.sqlite")
    for call in range(2):
        base = call * 1000
        capture.range(base, base + 500, "net")
        for number in range(3):
            at = base + 100 * number
            capture.range(at + 10, at + 60, "net.a", "piece" if number else "module")
            capture.kernel(9000 + at, 9000 + at + 20 + call, capture.call(at + 20, at + 30))
    (row,) = [row for row in load(capture.close()).rows("module") if row.name == "net.a"]
    assert (row.calls, row.cpu, row.gpu, row.cpu_min, row.cpu_max) == (2, 300, 123, 150, 150)
    assert row.each is not None
    assert (row.each.count, row.each.low, row.each.high) == (2, 60, 63)


def test_a_trace_of_pieces_reads_back_as_calls(tmp_path: Path) -> None:
    back = load(write_chrome(pieces(), tmp_path / "trace.json"))
    assert {row.name: row.calls for row in back.rows("module") if row.kind == "range"} == {
        "net": 3, "net.a": 3, "net.a.x": 3, "net.b": 3,
    }  # fmt: skip


def test_a_piece_without_its_beginning_is_no_call() -> None:
    ranges = [Range("net.a", "piece", None, 1, 0, 0, 10), Range("net.a", "module", None, 1, 0, 20, 25)]
    (row,) = from_recording(recorded(ranges)).rows()
    assert (row.calls, row.cpu) == (1, 15)


# ------------------------------------------------------------------------------------------------ fused


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("fused(blocks.3.ff, blocks.4.norm1)", "fused(blocks.i.ff, blocks.i+1.norm1)"),
        ("fused(blocks.3, blocks.3.norm1)", "fused(blocks.*, blocks.*.norm1)"),
        ("fused(blocks.4.norm1, blocks.3.ff.2)", "fused(blocks.i.norm1, blocks.i-1.ff.*)"),
        ("fused(norm, attn)", "fused(norm, attn)"),
        ("fused(a.0.x, b.5.y)", "fused(a.*.x, b.*.y)"),
        ("fused(self, blocks.1.ff, 3 more)", "fused(self, blocks.*.ff, 3 more)"),
    ],
)
def test_folded_fused_kernels_say_which_neighbours(text: str, folded: str) -> None:
    assert fold(text, "op") == folded


def compiled(fused: bool) -> Report:
    ranges = [
        Range("net", "module", None, 1, 0, 0, 100),
        Range("net.a", "module", None, 1, 1, 0, 10 if fused else 40),
        Range("net.b", "module", None, 1, 1, 40, 80),
    ]
    if fused:
        ranges.insert(2, Range("fused(a, b.norm)", "op", None, 1, 1, 10, 35))
    return from_recording(recorded(ranges))


def test_a_comparison_says_where_work_moved() -> None:
    found = diff(compiled(False), compiled(True))
    rows = {row.name: row for row in found.rows}
    assert rows["net.a"].moved == ("net fused(a, b.norm)",)
    assert rows["net.b"].moved == ("net fused(a, b.norm)",), "a part of it"
    assert rows["net"].moved == ()
    assert any("fused kernels that only one side has" in note for note in found.notes)
    split = {row.name: row for row in diff(compiled(False), compiled(True), split=True).rows}
    assert (split["net.a"].a, split["net.a"].b) == (40, 10 + 13)
    assert not any("fused" in name for name in split)
    same = diff(compiled(True), compiled(True))
    assert not any(row.moved for row in same.rows)
    assert not same.notes


def test_what_is_recorded_here_has_steps_and_stages_that_do_not_nest() -> None:
    """A real pipeline of ours, four steps."""
    from fxnvtx import pipeline

    args = pipeline.ServerArgs.from_kwargs(enable_layerwise_nvtx_marker=True, enable_stage_nvtx_marker=True)
    built = pipeline.PIPELINES["reference"](args, size="tiny", compile=False)
    with record() as recording:
        pipeline.run("reference", prompt="x", steps=4, seed=0, pipeline=built, on_step=None)
    report = from_recording(recording)
    assert len([row for row in report.rows("step") if row.kind == "range"]) == 4
    for by in VIEWS:
        if by != "kernel":
            check(report, by)
