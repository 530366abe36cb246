"""`fxnvtx report` and `fxnvtx diff` as a user types them."""

from __future__ import annotations

import gc
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fxnvtx.cli import cli, main
from fxnvtx.recording import Recording
from fxnvtx.report import load, render_text
from fxnvtx.report.commands import Late
from fxnvtx.report.findings import headlines

from .samples import pipeline


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(tmp_path_factory.mktemp("commands") / "pipeline.sqlite").close()


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], env={"COLUMNS": "120"})
    assert done.exit_code == code, done.output
    return str(done.output)


def test_the_default_is_the_tree(capture: Path) -> None:
    first = headlines(load(capture), 120) + "\n"
    assert run("report", capture) == first + render_text(load(capture), width=120, fold=True)
    assert run("report", capture, "--no-fold") == first + render_text(load(capture), width=120)


@pytest.mark.parametrize("by", ["request", "step", "component", "module", "class", "kernel", "range"])
def test_views(capture: Path, by: str) -> None:
    assert run("report", capture, "--by", by) == render_text(load(capture), by=by, width=120)


def test_options_reach_the_view(capture: Path) -> None:
    text = run("report", capture, "--fold", "--depth", "2", "--exclude", "residency*")
    assert text == render_text(load(capture), depth=2, width=120, fold=True, exclude=("residency*",))
    text = run("report", capture, "--by", "module", "--include", "*.attn", "--split-fused", "--limit", "1")
    assert "~264.0 us" in text
    assert "... and 2 more rows" in text


@pytest.mark.parametrize("form", ["text", "json", "csv", "html", "chrome", "speedscope"])
def test_formats_to_a_file(capture: Path, tmp_path: Path, form: str) -> None:
    target = tmp_path / "out"
    said = run("report", capture, "--format", form, "-o", target)
    assert f"wrote {target}" in said
    text = target.read_text(encoding="utf-8")
    assert "transformer" in text
    if form in ("json", "chrome", "speedscope"):
        json.loads(text)
    if form == "text":
        assert "\x1b" not in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--by", "colour"], "Invalid value for '--by'"),
        (["--depth", "0"], "Invalid value for '--depth'"),
        (["--format", "html"], "--format html needs -o FILE"),
        (["--scrub"], "--scrub needs one capture"),
        (["--frobnicate"], "No such option"),
    ],
)
def test_usage_errors_are_exit_code_2(capture: Path, arguments: list[str], says: str) -> None:
    assert says in run("report", capture, *arguments, code=2)


def test_no_capture_is_a_usage_error() -> None:
    assert "Missing argument" in run("report", code=2)


def test_capture_errors_are_one_line_and_exit_code_1(tmp_path: Path) -> None:
    text = run("report", tmp_path / "none.sqlite", code=1)
    assert text.count("\n") == 1
    assert "No such file" in text
    assert "Traceback" not in text


def test_classes_of_a_capture_come_from_a_recording(capture: Path, tmp_path: Path) -> None:
    assert "class not recorded" in run("report", capture, "--by", "class")
    recording = Recording()
    recording.stop()
    recording.meta["classes"] = {
        "transformer": "DiT",
        **{f"transformer.blocks.{i}.attn": "Attention" for i in range(3)},
    }
    path = recording.save(tmp_path / "recording.json")
    text = run("report", capture, "--by", "class", "--classes", path)
    assert "Attention" in text
    assert "DiT" in text


def test_scrub(capture: Path, tmp_path: Path) -> None:
    run("report", capture, "--scrub", "-o", tmp_path / "copy.sqlite")
    assert load(tmp_path / "copy.sqlite").rows() == load(capture).rows()


def test_diff(capture: Path, tmp_path: Path) -> None:
    slower = pipeline(tmp_path / "slower.sqlite", scale=1.5).close()
    text = run("diff", capture, slower)
    assert "+50.0%" in text
    document = json.loads(run("diff", capture, slower, "--format", "json"))
    assert document["rows"][0]["name"] == "request#*"
    assert "transformer" in run("diff", capture, slower, "--format", "csv", "--depth", "1")
    run("diff", capture, tmp_path / "none.sqlite", code=1)


def test_progress_stays_away_from_pipes(capsys: pytest.CaptureFixture[str]) -> None:
    with Late("reading", after=0.0) as tick:
        tick(5)
    assert capsys.readouterr().err == ""


def test_progress_shows_itself_on_a_terminal() -> None:
    """In a real terminal, because that is what it asks for."""
    code = (
        "from fxnvtx.report.commands import Late\n"
        "with Late('reading x', after=0.0) as tick:\n"
        "    tick(1); tick(16384); tick._progress.refresh(); tick(16384)\n"
    )
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=follower, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(follower)
        seen = b""
        while True:
            try:
                more = os.read(leader, 4096)
            except OSError:
                break
            if not more:
                break
            seen += more
        assert process.wait() == 0
    os.close(leader)
    assert b"reading x" in seen
    assert b"16,385 rows" in seen


@pytest.mark.parametrize("own", [False, True])
def test_the_end_of_somebody_elses_process_is_not_touched(
    capture: Path, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    later: list[object] = []
    monkeypatch.setattr("atexit.register", lambda call, *_: later.append(call))
    if own:
        monkeypatch.setattr("sys.stdout", io.StringIO())
        with pytest.raises(SystemExit) as ended:
            main(["report", str(capture)])
        assert ended.value.code == 0
    else:
        run("report", capture)
    assert (gc.freeze in later) == own
