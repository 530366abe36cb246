"""What a comparison says first, in a pull request, and to a CI job."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fxnvtx.cli import cli
from fxnvtx.recording import Range
from fxnvtx.report import diff, from_recording, load
from fxnvtx.report.diff import diff_markdown

from .samples import pipeline, recorded


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("headline")
    return pipeline(folder / "a.sqlite").close(), pipeline(folder / "b.sqlite", scale=1.5).close()


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], env={"COLUMNS": "140"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_the_headline_tells_of_requests_and_steps(pair: tuple[Path, Path]) -> None:
    found = diff(load(pair[0]), load(pair[1]))
    assert [(unit.kind, unit.a, unit.b, unit.count_a, unit.count_b) for unit in found.units] == [
        ("request", 582_000, 858_000, 2, 2), ("step", 138_000, 207_000, 8, 8),
    ]  # fmt: skip
    assert found.headline == (
        "requests 1.47x slower (582.0 us -> 858.0 us; 2 and 2 of them, too few to be sure);"
        " steps 1.50x slower (138.0 us -> 207.0 us; 8 and 8 of them)"
    )
    back = diff(load(pair[1]), load(pair[0]))
    assert "steps 1.50x faster (207.0 us -> 138.0 us" in back.headline
    assert "steps as fast" in diff(load(pair[0]), load(pair[0])).headline
    assert run("diff", *pair)[1].startswith("requests 1.47x slower")
    document = json.loads(run("diff", *pair, "--format", "json")[1])
    assert document["headline"] == found.headline
    assert [unit["slower"] for unit in document["units"]] == pytest.approx([0.4742, 0.5], abs=1e-4)


def test_components_where_there_is_nothing_else() -> None:
    def model(time: int) -> list[Range]:
        return [Range("net", "module", None, 1, 0, 1000 * n, 1000 * n + time) for n in range(4)]

    found = diff(from_recording(recorded(model(100))), from_recording(recorded(model(150))))
    assert [(unit.kind, unit.a, unit.b) for unit in found.units] == [("component", 100, 150)]
    nothing = diff(from_recording(recorded([])), from_recording(recorded(model(5))))
    assert nothing.headline == ""


@pytest.mark.parametrize(("limit", "code"), [("60", 0), ("50", 0), ("49", 1), ("0", 1)])
def test_a_regression_ends_with_one(pair: tuple[Path, Path], limit: str, code: int) -> None:
    found, said = run("diff", *pair, "--fail-on", limit)
    assert found == code
    assert "requests 1.47x slower" in said, "the comparison is written all the same"
    assert ("steps are 50.0% slower than in A, more than" in said) == bool(code)
    assert run("diff", *reversed(pair), "--fail-on", "0")[0] == 0, "faster is no regression"


def test_a_check_that_compares_nothing_does_not_pass(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    empty = recorded([]).save(tmp_path / "empty.json")
    code, said = run("diff", empty, pair[0], "--fail-on", "5")
    assert code == 1
    assert "finds no requests, steps or components" in said
    for value in ("-1", "x", "inf", "1e9"):
        assert run("diff", *pair, "--fail-on", value)[0] == 2


def test_markdown_is_a_table(pair: tuple[Path, Path], tmp_path: Path) -> None:
    text = run("diff", *pair, "--format", "markdown")[1]
    lines = text.splitlines()
    assert lines[0].startswith("**requests 1.47x slower \\(")
    assert lines[2] == "| range | A gpu | B gpu | change | relative | verdict |"
    table = [line for line in lines[2:] if line.startswith("|")]
    assert len(table) == 2 + len(diff(load(pair[0]), load(pair[1])).rows)
    assert {len(re.findall(r"(?<!\\\\)\|", line)) for line in table} == {7}
    run("diff", *pair, "-o", tmp_path / "x.md")
    assert (tmp_path / "x.md").read_text() == text
    assert "... and" in run("diff", *pair, "--format", "markdown", "--limit", "2")[1]


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_no_label_breaks_the_table(text: str) -> None:
    found = diff(from_recording(recorded([])), from_recording(recorded([])))
    found.notes.clear()
    other = diff(
        from_recording(recorded([Range("a", "module", None, 1, 0, 0, 9)])),
        from_recording(recorded([Range("a", "module", None, 1, 0, 0, 9)])),
    )
    other.rows[0].name = text
    (row,) = [line for line in diff_markdown(other).split("\n") if line.startswith("| ")][1:]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 7
    assert "<" not in row
    assert html.unescape(row)
