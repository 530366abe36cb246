"""Which requests and steps count: compilation is left out and said, requests and steps are chosen, shares follow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fxnvtx.categories import Numbers
from fxnvtx.cli import cli
from fxnvtx.errors import ConfigError
from fxnvtx.recording import Range
from fxnvtx.report import Report, from_recording, load
from fxnvtx.report.part import Window

from .captures import Capture
from .samples import pipeline, recorded


def timeline(
    requests: int = 4, compiling: tuple[int, ...] = (0,), steps: int = 3, wrapped: bool = False
) -> list[Range]:
    """Requests of 100 ns, in which steps take 10 ns each; the compiling ones take 10,000 more."""
    ranges: list[Range] = []
    now = 5
    depth = 1 if wrapped else 0
    for request in range(requests):
        start, place = now, len(ranges)
        ranges.append(Range(f"request#{request}", "request", None, 1, depth, start, None))
        for step in range(steps):
            begin = now
            if step == 0 and request in compiling:
                ranges.append(Range("compile", "compile", None, 1, depth + 2, now, now + 10_000))
                now += 10_000
            ranges.append(Range("net", "module", None, 1, depth + 2, now, now + 10))
            now += 10
            ranges.append(Range(f"denoising_step_{step}_t{step}", "step", None, 1, depth + 1, begin, now))
        now = start + 100 + 10_000 * (request in compiling)
        ranges[place] = Range(f"request#{request}", "request", None, 1, depth, start, now)
        now += 7
    if wrapped:
        ranges.append(Range("whole run", "op", None, 1, 0, 0, now))
    return ranges


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return recorded(timeline()).save(tmp_path / "recording.json")


def names(report: Report, by: str = "request") -> list[str]:
    return [row.name for row in report.rows(by) if row.kind == "range"]


DEFAULT = Window()


@pytest.mark.parametrize("wrapped", [False, True])
def test_requests_that_compile_are_left_out_and_said(tmp_path: Path, wrapped: bool) -> None:
    path = recorded(timeline(compiling=(0, 2), wrapped=wrapped)).save(tmp_path / "r.json")
    report = load(path, window=DEFAULT)
    assert names(report) == ["request#1", "request#3"]
    assert any(note.startswith("2 requests in which something was compiled are left out") for note in report.notes)
    assert not any("compile" in row.name for row in report.rows())
    assert sum(row.cpu for row in report.rows("request") if row.kind == "range") == 200
    whole = load(path)
    assert len(names(whole)) == 4
    assert not whole.notes


@pytest.mark.parametrize(("requests", "compiling"), [(1, (0,)), (2, (0, 1))])
def test_what_compiled_every_time_is_shown_and_said(tmp_path: Path, requests: int, compiling: tuple[int, ...]) -> None:
    report = load(recorded(timeline(requests, compiling)).save(tmp_path / "r.json"), window=DEFAULT)
    assert len(names(report)) == requests
    assert any("compilation is part of the times" in note for note in report.notes)


def test_first_calls_without_requests(tmp_path: Path) -> None:
    ranges = [Range("load", "op", None, 1, 0, 0, 5)]
    for call in range(3):
        ranges.append(Range("net", "module", None, 1, 0, 100 + 100 * call, 190 + 100 * call))
        if not call:
            ranges.append(Range("compile", "compile", None, 1, 1, 110, 180))
    report = load(recorded(ranges).save(tmp_path / "r.json"), window=DEFAULT)
    assert [(row.name, row.calls) for row in report.rows()] == [("load", 1), ("net", 2)]
    alone = [item for item in ranges if item.start_ns < 200]
    report = load(recorded(alone).save(tmp_path / "alone.json"), window=DEFAULT)
    assert [(row.name, row.calls) for row in report.rows()] == [("load", 1), ("net", 1), ("compile", 1)]
    assert any("compilation is part" in note for note in report.notes)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--steps", "1-2"], [1, 2]),
        (["--steps", "0,3:"], [0, 3, 4]),
        (["--steps", "1", "--skip-first", "2"], [3]),
        (["--steps", "0", "--requests", "3:"], [3]),
    ],
)
def test_without_requests_and_steps_the_calls_of_models_are_the_steps(
    tmp_path: Path, options: list[str], shown: list[int]
) -> None:
    """As for `fxnvtx run --steps`, which numbers them so."""
    ranges = []
    for call in range(5):
        ranges.append(Range("net", "module", None, 1, 0, 100 * call, 100 * call + 2**call))
        ranges.append(Range("layer", "module", None, 1, 1, 100 * call, 100 * call + 1))
    path = recorded(ranges).save(tmp_path / "r.json")
    rows = json.loads(run("report", path, "--format", "json", *options))["rows"]
    assert [(row["name"], row["calls"]) for row in rows] == [("net", len(shown)), ("layer", len(shown))]
    assert rows[0]["cpu"] == sum(2**call for call in shown)
    assert f"{len(shown)} of " in run("report", path, *options)


def test_steps_of_what_has_none(tmp_path: Path) -> None:
    ranges = [Range("stage_text", "stage", None, 1, 0, 0, 5), Range("net", "module", None, 1, 0, 10, 15)]
    path = recorded(ranges).save(tmp_path / "r.json")
    assert "there are no steps, and 1 outermost ranges" in run("report", path, "--steps", "7", code=1)
    assert "there are no steps" in run("report", path, "--steps", "0", code=1), "a stage is no step"
    assert "stage_text" not in run("report", path, "--steps", "1")


def test_a_capture_whose_first_request_compiles_leaves_its_kernels_out(tmp_path: Path) -> None:
    capture = pipeline(tmp_path / "c.sqlite", requests=3)
    capture.range(1_050_000, 1_050_100, "compile", "compile")
    path = capture.close()
    report, whole = load(path, window=DEFAULT), load(path)
    assert names(report) == ["request#1", "request#2"]
    assert report.root.gpu * 3 == whole.root.gpu * 2
    rows = [row for row in report.rows("step") if row.kind != "summary"]
    assert sum(row.share for row in rows) == pytest.approx(1.0)


def test_requests_and_steps_are_chosen(path: Path) -> None:
    def chosen(requests: str | None = None, steps: str | None = None, warm: bool = False) -> Report:
        wish = Window(requests and Numbers.read(requests), steps and Numbers.read(steps), warm, True)  # type: ignore[arg-type]
        return load(path, window=wish)

    assert names(chosen("1:3")) == ["request#1", "request#2"]
    assert names(chosen("0,3:")) == ["request#0", "request#3"]
    assert names(chosen(warm=True)) == ["request#1", "request#2", "request#3"]
    report = chosen("1", "1:")
    assert names(report, "step") == ["denoising_step_1_t1", "denoising_step_2_t2"]
    assert set(report.notes) == {
        "1 of 4 requests are shown", "2 of 3 steps of a request are shown, and what is outside of steps",
    }  # fmt: skip
    for requests, steps in (("9", None), (None, "7:")):
        with pytest.raises(ConfigError, match="leaves nothing"):
            chosen(requests, steps)


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1:1", "3:2", "1,,2", "1:2:3", "1" * 30, "1;2", "0.5", "-", "-3", "5-4", "1-2-3", "1:2-3"]
)
def test_numbers_that_are_none(text: str, path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Numbers.read(text)
    assert "\n" not in str(caught.value)
    done = CliRunner().invoke(cli, ["report", str(path), f"--requests={text}"])
    assert done.exit_code == 1
    assert done.output.count("\n") == 1


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=4), st.integers(0, 70))
def test_numbers_are_pythons_slices(parts: list[tuple[int, int]], number: int) -> None:
    text = ",".join(f"{start}:{start + size}" for start, size in parts)
    found = number in Numbers.read(text)
    assert found == any(number in range(start, start + size) for start, size in parts)
    both_ends = ",".join(f"{start}-{start + size - 1}" for start, size in parts)
    assert (number in Numbers.read(both_ends)) == found
    assert all((number in Numbers.read(f"{start}{sign}")) == (number >= start) for start, _ in parts for sign in ":-")


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], env={"COLUMNS": "120"})
    assert done.exit_code == code, done.output
    return str(done.output)


def test_the_commands(path: Path, tmp_path: Path) -> None:
    assert "note: 1 requests in which something was compiled are left out" in run("report", path, "--by", "request")
    assert "request#0" in run("report", path, "--by", "request", "--keep-compile")
    assert "request#1" not in run("report", path, "--by", "request", "--requests", "2:")
    other = recorded(timeline(compiling=())).save(tmp_path / "other.json")
    assert "left out" not in run("diff", other, other)
    assert "compile" not in run("diff", path, other).replace("compiled are left out (--keep-compile", "")
    assert "--requests leaves nothing" in run("report", path, "--requests", "7", code=1)


def test_filter_then_fold_then_rebase(tmp_path: Path) -> None:
    report = load(pipeline(tmp_path / "p.sqlite").close())
    for pattern in ("transformer.blocks.1.attn", "transformer.blocks.*.attn", "*.attn"):
        rows = report.rows(include=[pattern], fold=True)
        (attn,) = [row for row in rows if row.name == "transformer.blocks.*.attn"]
        blocks = 1 if ".1." in pattern else 3
        assert attn.gpu == 8 * blocks * 30_000
        assert attn.share == pytest.approx(1.0), "of what was asked for"
        assert all(row.gpu == attn.gpu for row in rows), "the way to it holds nothing else"
        steps = [row for row in report.rows("step", include=[pattern]) if row.kind == "range"]
        assert [row.gpu for row in steps] == [2 * blocks * 30_000] * 4
    rest = report.rows(exclude=["residency*", "*.norm"], fold=True)
    assert rest[0].gpu == 8 * 3 * 36_000
    assert rest[0].share == pytest.approx(1.0)


def test_a_graph_captured_in_a_request_that_is_left_out_still_names_layers(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "graph.sqlite")
    capture.range(0, 1000, "request#0", "request")
    capture.range(10, 20, "compile", "compile")
    capture.range(100, 300, "net")
    capture.graph_node(150, 5)
    capture.graph_node(400, 6, 5)
    capture.range(2000, 3000, "request#1", "request")
    capture.kernel(5000, 5100, capture.call(2100, 2110, name="cudaGraphLaunch_v10000"), node=6)
    report = load(capture.close(), window=DEFAULT)
    assert names(report) == ["request#1"]
    assert [(row.name, row.gpu) for row in report.rows("component") if row.gpu] == [("net", 100)]


def test_a_recording_in_memory_is_whole() -> None:
    assert len(names(from_recording(recorded(timeline())))) == 4
