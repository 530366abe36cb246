"""What the command shows first: what to do, and the rows worth a look, with nothing lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fxnvtx.cli import cli
from fxnvtx.recording import Range
from fxnvtx.report import Report, from_recording, load, render_text
from fxnvtx.report.findings import FIRST, RULES, findings, headlines
from fxnvtx.report.rows import significant
from fxnvtx.report.selection import VIEWS

from .captures import Capture
from .samples import recorded

LABELS = (("request", "request"), ("stage", "stage"), ("denoising_step_3", "step"), ("net.", "module"), ("thing ", ""))


def run(*arguments: object) -> str:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    return str(done.output)


def many(sizes: list[tuple[int, int, int]], path: Path | None = None) -> Report:
    """Ranges one after the other, with two inside each, and as much device work where there is a path."""
    ranges, now = [], 0
    capture = Capture(path) if path is not None else None
    for number, (size, kind, work) in enumerate(sizes):
        name, category = LABELS[kind]
        inside: tuple[Range, ...] = (Range(f"net.{chr(97 + number % 26)}", "module", None, 1, 1, now, now + size // 2),)
        inside += (Range(f"net.{chr(97 + number % 26)}.up", "module", None, 1, 2, now, now + size // 3),)
        for made in (
            Range(f"{name}{chr(97 + number // 26)}{chr(97 + number % 26)}", category, None, 1, 0, now, now + size),
            *inside,
        ):
            ranges.append(made)
            if capture is not None:
                capture.range(made.start_ns, made.end_ns, made.label, made.category or None)
        if capture is not None and work:
            at = 10**7 + 10**5 * number
            capture.kernel(at, at + work, capture.call(now, now + 1), f"kernel_{number}")
        now += size + number % 2
    return load(capture.close()) if capture is not None else from_recording(recorded(ranges))


SIZES = st.lists(
    st.tuples(st.integers(4, 9) | st.integers(100, 9999), st.integers(0, 4), st.sampled_from((0, 5, 5, 9000))),
    min_size=1,
    max_size=120,
)


@given(SIZES, st.booleans(), st.booleans(), st.sampled_from((None, "calls", "gap")))
def test_what_is_shown_and_what_is_left_out_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int, int]], gpu: bool, fold: bool, sort: str | None
) -> None:
    report = many(sizes, tmp_path_factory.mktemp("first") / "a.sqlite" if gpu else None)
    for by in VIEWS:
        rows = report.rows(by, fold=fold, sort=sort)
        shown, left = significant(rows, by, sort, report.has_gpu)
        if left is None:
            assert shown == rows
            continue
        kept = {id(row) for row in shown}
        gone = [row for row in rows if id(row) not in kept]
        assert len(gone) == left.rows and all(row.weight <= left.under < 0.05 for row in gone)
        assert all(row.above is None or id(row.above) in kept for row in shown), "what is around a row is shown"
        assert not [row for row in gone if row.kind in ("summary", "outside")]
        counted = [row for row in rows if row.kind not in ("summary", "side")]
        whole = report.root.gpu if report.has_gpu else report.root.cpu
        if by == "tree":
            shares = [row.share for row in counted if row.above is None]
            lost = sum(row.share for row in gone if row.above is None or id(row.above) in kept)
        else:
            shares = [row.part for row in counted]
            lost = sum(row.part for row in gone)
        assert not whole or sum(shares) == pytest.approx(1)
        assert left.share == pytest.approx(lost)
        assert left.ns == pytest.approx(left.share * whole, abs=1)
        text = render_text(report, by, width=200, fold=fold, sort=sort)
        assert f"left out: {left.rows:,} rows" in text
        assert "left out" not in render_text(report, by, width=200, fold=fold, sort=sort, everything=True)


def test_a_row_is_not_left_out_for_the_device_where_the_cpu_took_long(tmp_path: Path) -> None:
    report = many([(100, 4, 9000), (5000, 4, 0), *[(10, 4, 100)] * 30], tmp_path / "a.sqlite")
    shown, left = significant(report.rows("range"), "range", None, True)
    assert left is not None and "thing ab" in [row.name for row in shown]


def test_the_first_screen(tmp_path: Path) -> None:
    times = [(900_000, 0, 90_000), *[(9_000 if number else 90_000, 2, 900) for number in range(25)], *[(9, 4, 9)] * 60]
    report = many(times, tmp_path / "a.sqlite")
    found, _ = findings(report)
    text = run("report", tmp_path / "a.sqlite")
    head, table = text.split("\n\n", 1)
    assert head + "\n" == headlines(report, 120)
    assert head.startswith("what to do first")
    assert 0 < sum(line[0].isdigit() for line in head.splitlines()) == min(len(found), FIRST)
    assert len(head.splitlines()) <= 2 * FIRST + 1 and max(map(len, head.splitlines())) <= 120
    assert len(text.splitlines()) <= 60 and "left out: " in table
    run("report", tmp_path / "a.sqlite", "-o", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == text, "the same in a file"
    assert "left out" not in run("report", tmp_path / "a.sqlite", "--all")
    assert "thing dg" in run("report", tmp_path / "a.sqlite", "--all")
    assert "more rows" in run("report", tmp_path / "a.sqlite", "--limit", "3")
    every = run("report", tmp_path / "a.sqlite", "--findings")
    assert every.startswith("1. ") and "not enough in this capture" in every and "what to do first" not in every
    for asked in (["--by", "module"], ["--include", "net*"], ["--exclude", "net*"]):
        assert "what to do" not in run("report", tmp_path / "a.sqlite", *asked), "a question of its own is answered"


def test_one_line_where_nothing_stands_out() -> None:
    report = many([(100, 3, 0)])
    assert not findings(report)[0]
    assert headlines(report, 200).count("\n") == 1
    assert f"of {len(RULES)} rules" in headlines(report, 200)


def test_where_no_range_is_the_operations_are_named(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "a.sqlite")
    capture.kernel(0, 100, capture.call(0, 10), "gemm")
    capture.close()
    text = run("report", tmp_path / "a.sqlite")
    assert "gemm" in text and "no range lies around the device's work" in text


def test_what_lies_around_a_row_that_is_large_in_the_order_is_shown() -> None:
    ranges = [Range(f"net.{chr(97 + n)}", "module", None, 1, 0, 10_000 * n, 10_000 * n + 9_999) for n in range(24)]
    ranges.append(Range("outer", "module", None, 1, 0, 500_000, 500_200))
    ranges += [Range("inner", "module", None, 1, 1, 500_000 + 2 * n, 500_001 + 2 * n) for n in range(50)]
    ranges += [Range(f"small.{chr(97 + n)}", "module", None, 1, 0, 600_000 + n, 600_001 + n) for n in range(24)]
    report = from_recording(recorded(ranges))
    by_calls = [row.name for row in significant(report.rows(sort="calls"), "tree", "calls", False)[0]]
    assert by_calls[by_calls.index("inner") - 1] == "outer"
    by_time, left = significant(report.rows(), "tree", None, False)
    assert left is not None and left.rows == 26 and len(by_time) == 24
