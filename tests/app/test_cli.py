"""The command line as a user meets it: what it prints, what it leaves behind, how it fails."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fxnvtx.cli.doctor import findings
from fxnvtx.recording import Recording

from ..support.limits import CHILD_S
from ..support.nsys import with_capture


def fxnvtx(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in {"FXNVTX", "NVTX_INJECTION64_PATH"}}
    return subprocess.run(
        [sys.executable, "-m", "fxnvtx", *words],
        cwd=cwd,
        env={**clean, "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=CHILD_S,
    )


def one_line_error(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("fxnvtx: ")
    return lines[0]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("profile")
    done = fxnvtx("profile", "--no-nsys", "--steps", "2", "--rows", "200", "-o", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout


def test_profile_prints_request_stage_step_component_block_and_layer(profiled: tuple[Path, str]) -> None:
    _, printed = profiled
    for level in ("request#", "stage_", "denoising_loop", "denoising_step_*", "predict_noise"):
        assert level in printed
    recording = Recording.load(profiled[0] / "recording.json")
    labels = {r.label for r in recording.ranges}
    assert "scheduler_step" in labels  # in print where it costs enough
    assert any(label.startswith("denoising_step_1_t") for label in labels)
    assert any(label.endswith("blocks.0.attn.to_q") for label in labels)
    assert any("vae" in label and label.endswith("conv_out") for label in labels)


def test_profile_leaves_a_balanced_recording_a_trace_and_an_image(profiled: tuple[Path, str]) -> None:
    folder, _ = profiled
    recording = Recording.load(folder / "recording.json")
    assert recording.balanced
    assert len([r for r in recording.ranges if r.category == "request"]) == 1, "the warm-up request must not show"
    assert len([r for r in recording.ranges if r.category == "step"]) == 2
    events = json.loads((folder / "trace.json").read_text())
    assert len(events["traceEvents"]) >= len(recording.ranges)
    assert (folder / "image.png").read_bytes().startswith(b"\x89PNG")
    assert "denoising_step_1" in (folder / "report.html").read_text()


@pytest.mark.nsys
@pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys is not on the PATH")
def test_profile_under_nsys_captures_exactly_what_the_recorder_saw(tmp_path: Path) -> None:
    done = with_capture(
        lambda: fxnvtx("profile", "--steps", "2", "-o", "out", cwd=tmp_path), tmp_path / "out" / "capture.sqlite"
    )
    assert done.returncode == 0, done.stderr
    recording = Recording.load(tmp_path / "out" / "recording.json")
    with sqlite3.connect(tmp_path / "out" / "capture.sqlite") as file:
        domain = file.execute("SELECT domainId FROM NVTX_EVENTS WHERE eventType = 75 AND text = 'fxnvtx'").fetchall()
        assert len(domain) == 1
        captured = file.execute(
            "SELECT coalesce(e.text, s.value), e.start, e.end, e.globalTid FROM NVTX_EVENTS e "
            "LEFT JOIN StringIds s ON s.id = e.textId WHERE e.eventType = 59 AND e.domainId = ?",
            domain[0],
        ).fetchall()
    begun = list(recording.ranges)
    first = min(start for label, start, _, _ in captured if label.startswith("request#"))
    shown = [row for row in captured if row[1] >= first]
    assert Counter(label for label, *_ in shown) == Counter(r.label for r in begun)
    assert sorted(paths(shown)) == sorted(paths([(r.label, r.start_ns, r.end_ns, r.thread_id) for r in begun]))  # type: ignore[misc]


def paths(rows: list[tuple[str, int, int, int]]) -> list[tuple[str, ...]]:
    """The label path of every range, from times alone."""
    found = []
    open_by_thread: dict[int, list[tuple[str, int]]] = {}
    for label, start, end, thread in sorted(rows, key=lambda row: (row[1], -row[2])):
        above = open_by_thread.setdefault(thread, [])
        while above and above[-1][1] <= start:
            above.pop()
        above.append((label, end))
        found.append(tuple(text for text, _ in above))
    return found


def test_doctor_names_versions_and_says_what_follows(tmp_path: Path) -> None:
    done = fxnvtx("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("torch", "nvtx", "listener", "compiled layers", "nsys"):
        assert word in done.stdout


@pytest.mark.slow
def test_doctor_knows_other_stacks_where_they_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explained = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    names = {"vllm_omni": "vllm-omni", "xfuser": "xfuser", "fastvideo": "fastvideo", "cache_dit": "cache-dit"}
    names["lightx2v"] = "lightx2v"
    before = {finding.what for finding in findings()}
    for module in names:
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text("raise ImportError('the doctor only looks')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {finding.what: finding for finding in findings() if finding.what not in before}
    assert set(found) == set(names.values()) - before
    assert all(f"| `{name}` | {found[name].state} |" in explained for name in found)
    assert "no modules" in found["lightx2v"].found


def test_doctor_says_that_off_is_off_and_fails(tmp_path: Path) -> None:
    done = fxnvtx("doctor", cwd=tmp_path, FXNVTX="off")
    assert done.returncode == 1
    assert "FXNVTX=off" in done.stdout


def test_an_unwritable_output_folder_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = fxnvtx("profile", "--no-nsys", "-o", "file/inside", cwd=tmp_path)
    assert done.returncode == 1
    assert "cannot write to file/inside" in one_line_error(done)


def test_an_nsys_that_fails_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    fake = tmp_path / "nsys"
    fake.write_text("#!/bin/sh\necho 'no perf counters for you' >&2\nexit 3\n")
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    done = fxnvtx("profile", "--nsys", cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "no perf counters for you" in one_line_error(done)
    assert "--no-nsys" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--pipeline", "nonsense"), "unknown"),
        (("--pipeline", "diffusers:Nonsense"), "Nonsense"),
        (("--pipeline", "missing.py:make"), "no file"),
        (("--residency", "dit"), "COMPONENT=MODE"),
        (("--residency", "dit=upstairs"), "upstairs"),
        (("--residency", "nobody=resident"), "nobody"),
        (("--size", "gigantic"), "gigantic"),
    ],
)
def test_bad_words_are_one_line_and_exit_code_1(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    done = fxnvtx("profile", "--no-nsys", *words, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert says in one_line_error(done)


@pytest.mark.parametrize("words", [("nonsense",), ("profile", "--steps", "0"), ("profile", "--what")])
def test_usage_errors_exit_with_2(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert fxnvtx(*words, cwd=tmp_path).returncode == 2


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = fxnvtx("--debug", "profile", "--no-nsys", "--residency", "dit", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_two_stages_with_weights_that_come_and_go(tmp_path: Path) -> None:
    words = ("--pipeline", "two-stage", "--residency", "dit=layerwise-offload", "--steps", "1", "--depth", "1")
    done = fxnvtx("profile", "--no-nsys", *words, "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    recording = Recording.load(tmp_path / "out" / "recording.json")
    stages = [r.label for r in recording.ranges if r.category == "stage"]
    assert len(stages) == len(set(stages)), "no two stages may share a name"
    assert {"stage_lora_on", "stage_lora_off"} <= set(stages)
    moved = [r for r in recording.ranges if r.category == "residency"]
    assert all(isinstance(r.payload, int) and r.payload > 0 for r in moved)
    assert {r.label.split()[0] for r in moved} >= {"residency.load", "residency.offload"}
    assert (tmp_path / "out" / "video.png").read_bytes().startswith(b"\x89PNG")
