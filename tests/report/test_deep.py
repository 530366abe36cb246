"""The cost of a row does not grow with its depth: deep captures pass every format, or are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fxnvtx.cli import cli
from fxnvtx.recording import Range
from fxnvtx.report import load, render_text
from fxnvtx.report.rows import Row
from fxnvtx.report.selection import VIEWS

from .captures import Capture
from .samples import recorded

pytestmark = pytest.mark.slow
DEEP = 20_000


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    ranges = (Range(f"net.layer{level}", "module", None, 1, level, level, 10**9 - level) for level in range(DEEP))
    return recorded(ranges).save(folder / "deep.json")


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], env={"COLUMNS": "100"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize("by", [view for view in VIEWS if view != "kernel"])
def test_text_shows_every_level(deep: Path, by: str) -> None:
    code, text = run("report", deep, "--by", by)
    assert code == 0
    if by in ("tree", "module", "range"):
        assert len(text.splitlines()) == DEEP + 1 + 2 * (by == "tree")  # what to do, above the tree
        assert f"layer{DEEP - 1}" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("form", ["json", "csv", "html", "chrome", "speedscope"])
def test_other_formats_are_whole_or_refused_in_one_line(deep: Path, tmp_path: Path, form: str) -> None:
    code, said = run("report", deep, "--format", form, "-o", tmp_path / "out")
    assert said.count("\n") == 1
    if code:
        assert "levels deep" in said
        assert form in ("json", "csv")
        code, _ = run("report", deep, "--format", form, "--depth", "100", "-o", tmp_path / "out")
    assert code == 0
    assert "layer99" in (tmp_path / "out").read_text()


def test_a_comparison_and_a_filter(deep: Path) -> None:
    assert run("diff", deep, deep)[0] == 0
    assert run("report", deep, "--include", "*.layer19999")[0] == 0


def test_rendering_asks_no_row_for_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What grew with the square of the depth."""
    capture = Capture(tmp_path / "open.sqlite")
    for level in range(300):
        capture.range(level, None, f"level{level}")
    report = load(capture.close())
    asked = []
    path = Row.path.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Row, "path", property(lambda row: asked.append(row) or path(row)))  # type: ignore[func-returns-value]
    assert len(render_text(report, everything=True).splitlines()) == 302
    assert not asked
    rows = json.loads(run("report", tmp_path / "open.sqlite", "--format", "json")[1])["rows"]
    assert rows[-1]["path"] == [f"level{level}" for level in range(300)]
