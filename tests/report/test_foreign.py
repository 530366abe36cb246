"""Captures that fxnvtx did not make: without NVTX, with other programs' labels, and traces of other formats."""

from __future__ import annotations

import copy
import gzip
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import fxnvtx
from fxnvtx.cli import cli
from fxnvtx.errors import CaptureError
from fxnvtx.report import Report, diff, from_recording, load, render_text, scrub, write_chrome, write_speedscope
from fxnvtx.report.labels import clean, fold, infer_category

from .captures import VERSIONS, Capture
from .samples import pipeline, recorded


def table(report: Report) -> list[tuple[tuple[str, ...], int, int, int, int]]:
    return sorted((row.path, row.calls, row.cpu, row.cpu_self, row.kernels) for row in report.rows())


# ------------------------------------------------------------------------------------------------ without NVTX


@pytest.fixture(params=VERSIONS)
def bare(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    capture = Capture(tmp_path / "bare.sqlite", request.param)
    for start in (0, 100):
        capture.kernel(1000 + start, 1040 + start, capture.call(start, start + 5), "gemm")
    capture.copy(2000, 2010, capture.call(200, 210), 64)
    capture.database.execute("DROP TABLE NVTX_EVENTS")
    return capture.close()


def test_a_capture_without_ranges_is_one_tree_and_a_note(bare: Path, tmp_path: Path) -> None:
    report = load(bare)
    (row,) = report.rows()
    assert (row.name, row.kind, row.gpu, row.kernels, row.copies) == (
        "cannot attribute: launched outside every range", "unknown", 90, 2, 1,
    )  # fmt: skip
    assert any("holds no NVTX ranges" in note for note in report.notes)
    assert "nsys profile --trace=nvtx" in " ".join(render_text(report).split())  # at any width of the terminal
    assert {(row.name, row.gpu) for row in report.rows("kernel")} >= {("gemm", 80)}
    for by in ("request", "step", "stage", "component", "module", "class", "range"):
        assert sum(row.gpu_self for row in report.rows(by)) == 90, by
    found = diff(report, load(bare))
    assert [row.delta for row in found.rows] == [0]
    copy = scrub(bare, tmp_path / "copy.sqlite")
    assert table(load(copy)) == table(report)
    assert json.loads(write_chrome(bare, tmp_path / "t.json").read_text())["traceEvents"]


def test_a_capture_with_neither_ranges_nor_device_work_says_so(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "none.sqlite")
    capture.call(0, 1)
    capture.database.execute("DROP TABLE NVTX_EVENTS")
    path = capture.close()
    with pytest.raises(CaptureError, match="neither NVTX ranges nor work of a device"):
        load(path)


def test_tables_that_were_cut_down_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    """As tools leave them that keep what they need of an export: without process and return value."""
    capture = Capture(tmp_path / "slim.sqlite")
    capture.range(0, 100, "a")
    capture.kernel(1000, 1040, capture.call(10, 15), "gemm")
    for table, column in (
        ("CUPTI_ACTIVITY_KIND_KERNEL", "globalPid"), ("CUPTI_ACTIVITY_KIND_RUNTIME", "returnValue"),
        ("CUPTI_ACTIVITY_KIND_MEMCPY", "globalPid"),
    ):  # fmt: skip
        capture.database.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
    report = load(capture.close())
    assert [(row.name, row.gpu) for row in report.rows()] == [("a", 40)]
    assert not report.notes


def test_shares_of_overlapping_work_sum_to_the_whole(tmp_path: Path) -> None:
    """Work outside of ranges and work without a launch overlap on the device: together they are all of it."""
    capture = Capture(tmp_path / "overlap.sqlite")
    capture.kernel(1000, 1100, capture.call(10, 15))
    capture.kernel(1050, 1200, 999, stream=8)
    report = load(capture.close())
    assert sum(row.share for row in report.rows()) == pytest.approx(1.0)
    assert any(note.startswith("100.0% of the GPU time") for note in report.notes)


# ------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    ("text", "category", "folded"),
    [
        ("iteration 10", "step", "iteration *"),
        ("Step 10 to 20", "step", "Step * to *"),
        ("_forward_step 12: 3 ctx reqs, 5 gen reqs", "step", "_forward_step *: * ctx reqs, * gen reqs"),
        ("[Executor] _forward_step 12: 3 gen reqs", "step", "[Executor] _forward_step *: * gen reqs"),
        ("ProfilerStep#7", "step", "ProfilerStep#*"),
        ("denoising_step_3_t750", "step", "denoising_step_*"),
        ("layer_0_x", "module", "layer_*_x"),
        ("layer_12_attention", "module", "layer_*_attention"),
        ("model.layers.3.self_attn", "module", "model.layers.*.self_attn"),
        ("fc_1", "module", "fc_1"),
        ("stepwise", "module", "stepwise"),
        ("iterator", "module", "iterator"),
    ],
)  # fmt: skip
def test_steps_and_layers_of_other_programs(text: str, category: str, folded: str) -> None:
    assert infer_category(text) == category
    assert fold(text, category) == folded


@pytest.mark.parametrize(
    ("text", "cleaned", "category"),
    [
        (
            "{'Module': 'model.layers.0.self_attn', 'TrainableParams': {'w': [4, 4]}, 'Inputs': [[1, 5, 4], [1, 5]]}",
            "model.layers.0.self_attn in=[[1, 5, 4], [1, 5]]", "module",
        ),
        ("{'Module': 'Qwen2Model'}", "Qwen2Model", "module"),
        (
            "aten::addmm, seq = 12, op_id = 345, sizes = [[10], [2, 3], []], input_op_ids = [(4,0), (5,1)]",
            "aten::addmm in=[[10], [2, 3], []]", "op",
        ),
        ("aten::mm, op_id = 7, input_op_ids = []", "aten::mm", "op"),
        ("autograd::engine::x: MmBackward0, op_id = 3, seq = 4", "autograd::engine::x: MmBackward0", "op"),
        ("{not ours}", "{not ours}", "range"),
    ],
)  # fmt: skip
def test_texts_with_fields_in_them(text: str, cleaned: str, category: str) -> None:
    assert clean(text) == cleaned
    assert infer_category(cleaned) == category


def test_a_capture_of_another_program_has_steps_and_folds(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "other.sqlite", domain=None)
    for step in range(4):
        base = step * 1000
        capture.range(base, base + 900, f"iteration {step}", None)
        for layer in range(3):
            at = base + 100 + layer * 200
            capture.range(at, at + 150, f"{{'Module': 'model.layers.{layer}', 'Inputs': [[2, 3]]}}", None)
            capture.range(at + 10, at + 50, f"aten::mm, seq = {step}, op_id = {layer}, input_op_ids = [(4,0)]", None)
    report = load(capture.close())
    assert len([row for row in report.rows("step") if row.kind == "range"]) == 4
    folded = {row.path: row.calls for row in report.rows(fold=True)}
    layers = "model.layers.* in=[[2, 3]]"
    assert folded == {
        ("iteration *",): 4, ("iteration *", layers): 12, ("iteration *", layers, "aten::mm"): 12,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ traces


def kineto(rank: int = 0) -> dict[str, Any]:
    """As torch.profiler exports it: a module's range, its operators, launches, and kernels on the device."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 42, "args": {"name": "python"}}]

    def event(cat: str, name: str, ts: float, dur: float, pid: Any = 42, tid: Any = 7, **args: Any) -> None:
        events.append({"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args})

    base = 1_700_000_000_000_000.125
    event("user_annotation", "ProfilerStep#1", base, 1000)
    event("python_function", "nn.Module: Linear_0", base + 10, 500)
    event("python_function", "torch/nn/modules/linear.py(1): forward", base + 11, 400)
    event("cpu_op", "aten::addmm", base + 20, 100, **{"External id": 3})
    event("cuda_runtime", "cudaLaunchKernel", base + 30, 5, correlation=11)
    event("kernel", "gemm", base + 60, 250.5, pid=0, tid=7, device=0, stream=7, correlation=11)
    event("cuda_runtime", "cudaMemcpyAsync", base + 300, 5, correlation=12)
    event("gpu_memcpy", "Memcpy HtoD", base + 400, 10, pid=0, tid=20, device=0, stream=20, correlation=12, bytes=64)
    event("gpu_user_annotation", "ProfilerStep#1", base, 1000, pid=0, tid=7)
    event("overhead", "Iteration", base, 2)
    events.append({"ph": "s", "id": 11, "pid": 42, "tid": 7, "ts": base + 30, "cat": "ac2g", "name": "ac2g"})
    return {"schemaVersion": 1, "deviceProperties": [{"id": 0}], "traceEvents": events}


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz", "trace.pt.trace.json"])
def test_a_trace_of_the_profiler(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = json.dumps(kineto()).encode()
    path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    report = load(path)
    step, module, op = report.rows()
    assert (step.name, step.category, step.cpu) == ("ProfilerStep#1", "step", 1_000_000)
    assert (module.name, module.category, module.cpu, module.depth) == ("Linear_0", "module", 500_000, 1)
    assert (op.name, op.category, op.cpu, op.depth) == ("aten::addmm", "op", 100_000, 2)
    assert (op.gpu, op.kernels) == (250_500, 1), "joined by correlation, to the nanosecond"
    assert (module.gpu, module.copies, module.copied_bytes) == (260_500, 1, 64)
    assert {row.name for row in report.rows("kernel")} == {"gemm", "[memcpy HtoD]"}
    assert report.parts[0].pid == 42
    assert not report.notes
    with pytest.raises(CaptureError, match="--scrub"):
        scrub(path, tmp_path / "x.sqlite")


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def test_a_trace_that_the_profiler_really_wrote(tmp_path: Path) -> None:
    net, x = Net(), torch.randn(2, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for step in range(3):
            with torch.profiler.record_function(f"denoising_step_{step}"):
                net(x)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    report = load(tmp_path / "trace.json")
    calls = {item.key: item.count for item in profiler.key_averages()}
    found = {row.name: row.calls for row in report.rows("range")}
    assert found == {name: calls[name] for name in found}
    assert found["aten::linear"] == 6
    assert len([row for row in report.rows("step") if row.kind == "range"]) == 3
    assert {row.path[0] for row in report.rows() if row.name == "aten::addmm"} == {
        "denoising_step_0", "denoising_step_1", "denoising_step_2",
    }  # fmt: skip


def test_our_own_trace_reads_back_as_the_recording(tmp_path: Path) -> None:
    net = fxnvtx.instrument(Net(), "net")
    with fxnvtx.record() as recording:
        for step in range(2):
            with fxnvtx.range("step", category="step", payload=step):
                net(torch.randn(2, 4))
    wanted = table(from_recording(recording))
    back = load(write_chrome(recording, tmp_path / "trace.json"))
    assert table(back) == wanted
    assert {row.category for row in back.rows()} == {"step", "module"}
    plain = load(write_speedscope(recording, tmp_path / "speedscope.json"))
    assert [row.cpu for row in plain.rows("component") if row.kind == "range"] == [
        row.cpu for row in from_recording(recording).rows("component") if row.kind == "range"
    ]


@pytest.mark.parametrize("writer", [write_chrome, write_speedscope], ids=["chrome", "speedscope"])
def test_a_capture_written_as_a_trace_reads_back(tmp_path: Path, writer: Any) -> None:
    path = pipeline(tmp_path / "pipeline.sqlite").close()
    back, wanted = load(writer(path, tmp_path / "trace.json")), load(path)
    assert back.root.gpu == wanted.root.gpu, "device work is there, though no launch tells where it belongs"
    ranges = {row.path: (row.calls, row.cpu) for row in wanted.rows() if row.kind == "range"}
    assert {row.path: (row.calls, row.cpu) for row in back.rows() if row.kind == "range"} == ranges


def test_begins_and_ends(tmp_path: Path) -> None:
    events = [
        {"ph": "B", "name": "a", "pid": 1, "tid": 1, "ts": 0}, {"ph": "B", "name": "b", "pid": 1, "tid": 1, "ts": 1},
        {"ph": "E", "pid": 1, "tid": 1, "ts": 3}, {"ph": "E", "pid": 1, "tid": 1, "ts": 10},
        {"ph": "B", "name": "left open", "pid": 1, "tid": 1, "ts": 20}, {"ph": "E", "pid": "x", "tid": "y", "ts": 20},
    ]  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps(events))
    report = load(tmp_path / "list.json")
    assert [(row.path, row.cpu) for row in report.rows()] == [
        (("a",), 10_000), (("a", "b"), 2_000), (("left open",), 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "[", "{}", "[1]", '{"traceEvents": 3}', '{"traceEvents": [3]}', '{"traceEvents": [{"ph": "X"}]}', "[" * 100_000,
        '{"traceEvents": [{"ph": "X", "name": "a", "ts": "soon"}]}',
        '{"traceEvents": [{"ph": "X", "name": 1, "ts": 1e400}]}',
        '{"$schema": "speedscope", "shared": {}}', '{"a": 1}', '[{"ph": "X", "name": "a", "ts": NaN}]',
        '{"$schema": "speedscope", "shared": {"frames": []}, "profiles": [{"type": "sampled"}]}',
        '{"$schema": "speedscope", "shared": {"frames": [{"name": "a"}]}, "profiles": [{"type": "evented",'
        ' "unit": "seconds", "events": [{"type": "C", "frame": 0, "at": 1}]}]}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_traces_are_one_line(tmp_path: Path, text: str, zipped: bool) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    for arguments in ([], ["--format", "chrome", "-o", str(tmp_path / "out.json")]):
        done = CliRunner().invoke(cli, ["report", str(path), *arguments])
        assert isinstance(done.exception, SystemExit), done.exception
        assert (done.exit_code, done.output.count("\n")) == (1, 1), done.output
    path.write_bytes(gzip.compress(text.encode())[:-6])
    with pytest.raises(CaptureError):
        load(path)


ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        2**70,
        -(2**70),
        1e308,
        -0.5,
        "",
        "x",
        "\x1b",
        [],
        {},
        [[]],
        {"correlation": "x"},
        5_000_000_000,
    ]
)
PLACES = st.tuples(st.integers(0, 11), st.sampled_from(["ph", "cat", "name", "pid", "tid", "ts", "dur", "args", ""]))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(PLACES, ODD), min_size=1, max_size=4), st.sampled_from(["trace", "args", "speedscope"]))
def test_changed_traces_are_read_or_refused(changes: list[tuple[tuple[int, str], Any]], kind: str) -> None:
    """Whatever stands in a trace: a report, or one line."""
    document: dict[str, Any] = kineto()
    events = document["traceEvents"]
    if kind == "speedscope":
        events = [{"type": "O", "frame": 0, "at": 1}, {"type": "C", "frame": 0, "at": 5}]
        profile = {"type": "evented", "unit": "seconds", "name": "process 7, thread 1", "events": events}
        document = {"$schema": "speedscope", "shared": {"frames": [{"name": "a"}]}, "profiles": [profile]}
    for (place, key), odd in changes:
        value = copy.deepcopy(odd)  # hypothesis gives the same object again, and a document must not hold itself
        if kind == "speedscope" and place > 5:
            profile[("type", "unit", "name", "events")[place % 4]] = value
        elif not key:
            events[place % len(events)] = value
        else:
            event = events[place % len(events)]
            if isinstance(event, dict) and kind == "args" and isinstance(event.get("args"), dict):
                event["args"][("correlation", "device", "stream", "bytes", "payload")[place % 5]] = value
            elif isinstance(event, dict):
                event[key] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        path.write_text(json.dumps(document))
        try:
            report = load(path)
        except CaptureError as error:
            assert "\n" not in str(error)  # noqa: PT017 - most are no errors
            return
        render_text(report)
        for row in report.rows():
            assert row.cpu >= 0
            assert row.gpu >= 0
        write_chrome(path, Path(folder) / "again.json")


def test_a_pipe_as_input_does_not_hang(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "fifo.sqlite")
    with pytest.raises(CaptureError, match="is a pipe"):
        load(tmp_path / "fifo.sqlite")


# ------------------------------------------------------------------------------------------------ twice


def test_the_same_file_twice_does_not_add_up(tmp_path: Path) -> None:
    path = pipeline(tmp_path / "a.sqlite", requests=1).close()
    (tmp_path / "link.sqlite").symlink_to(path)
    once = load(path)
    twice = load(path, tmp_path / "link.sqlite", tmp_path / ".." / tmp_path.name / "a.sqlite")
    assert table(twice) == table(once)
    assert sum("was named twice" in note for note in twice.notes) == 2
    shutil.copy(path, tmp_path / "rank1.sqlite")
    assert load(path, tmp_path / "rank1.sqlite").root.gpu == 2 * once.root.gpu, "another file is another rank"


def test_text_is_folded_and_sorted(tmp_path: Path) -> None:
    path = pipeline(tmp_path / "a.sqlite").close()

    def shown(*arguments: str) -> list[str]:
        done = CliRunner().invoke(cli, ["report", str(path), *arguments], env={"COLUMNS": "140"})
        assert done.exit_code == 0, done.output
        return [line.split()[0] for line in done.output.split("\n\n")[-1].splitlines()[1:]]

    assert shown()[0] == "request#*"
    assert len(shown()) == 8
    assert len(shown("--no-fold")) > 40
    assert "denoising_step_1_t999" in shown("--by", "step"), "a view by step shows steps"
    assert shown("--by", "module", "--sort", "gpu-self")[0].endswith(".attn")
    rows = load(path).rows(sort="gpu")
    for row in rows:
        below = [other.gpu for other in rows if other.above is row]
        assert below == sorted(below, reverse=True)
    assert sorted(map(repr, rows)) == sorted(map(repr, load(path).rows()))


def test_a_recording_of_nothing_is_no_error() -> None:
    assert "no ranges to show" in render_text(from_recording(recorded([])))
