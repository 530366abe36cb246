"""What the renderers write, to the letter.

`pytest tests/report/test_golden.py --rewrite-golden` takes what they write now: look at the difference that git shows
before committing it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fxnvtx.report import Report, diff, load, render_csv, render_json, render_text
from fxnvtx.report.diff import diff_csv, diff_json, diff_markdown, diff_text
from fxnvtx.report.findings import findings_text, first_screen

from .samples import pipeline

GOLDEN = Path(__file__).parent / "golden"
WIDTH = 140

ONE: dict[str, Callable[[Report], str]] = {
    "tree.txt": lambda report: render_text(report, width=WIDTH, fold=True),
    "first.txt": lambda report: first_screen(report, WIDTH),
    "tree-narrow.txt": lambda report: render_text(report, width=72, fold=True),
    "tree-coloured.txt": lambda report: render_text(report, width=WIDTH, fold=True, color=True, limit=8),
    "steps.txt": lambda report: render_text(report, "step", width=WIDTH),
    "modules-split.txt": lambda report: render_text(report, "module", width=WIDTH, fold=True, split_fused=True),
    "kernels.txt": lambda report: render_text(report, "kernel", width=WIDTH),
    "findings.txt": findings_text,
    "stages.csv": lambda report: render_csv(report, "component"),
    "modules.csv": lambda report: render_csv(report, "module", fold=True),
    "tree.json": lambda report: render_json(report, fold=True, findings=True),
}
TWO = {
    "diff.txt": lambda found: diff_text(found, width=WIDTH),
    "diff.md": diff_markdown,
    "diff.csv": diff_csv,
    "diff.json": diff_json,
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Report]:
    folder = tmp_path_factory.mktemp("golden")
    for name, scale in (("before", 1.0), ("after", 0.5)):
        pipeline(folder / f"{name}.sqlite", scale=scale).close()
    return load(folder / "before.sqlite"), load(folder / "after.sqlite")


def _compare(name: str, text: str, folder: Path, rewrite: bool) -> None:
    text = text.replace(str(folder), "FOLDER").replace("\r\n", "\n")
    path = GOLDEN / name
    if rewrite:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "pytest --rewrite-golden, if this is what it should be"


@pytest.mark.parametrize("name", ONE)
def test_a_report_is_written_as_ever(name: str, reports: tuple[Report, Report], request: pytest.FixtureRequest) -> None:
    folder = Path(reports[0].sources[0]).parent
    _compare(name, ONE[name](reports[0]), folder, request.config.getoption("--rewrite-golden"))


@pytest.mark.parametrize("name", TWO)
def test_a_comparison_is_written_as_ever(
    name: str, reports: tuple[Report, Report], request: pytest.FixtureRequest
) -> None:
    folder = Path(reports[0].sources[0]).parent
    _compare(name, TWO[name](diff(*reports)), folder, request.config.getoption("--rewrite-golden"))


def test_nothing_lies_there_that_no_test_reads() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {*ONE, *TWO}
