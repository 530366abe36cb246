"""Other programs' text on its way to a terminal, a spreadsheet, a JSON file."""

from __future__ import annotations

import csv
import io
import json
import sys
import unicodedata
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fxnvtx.cli import cli
from fxnvtx.output import csv_cell, cut, json_text, pad, printable, printable_lines, width_of
from fxnvtx.recording import Range, Recording
from fxnvtx.report import diff, from_recording, render_csv, render_json, render_text
from fxnvtx.report.diff import diff_csv, diff_json, diff_text

from .samples import recorded

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
EVIL = "\x1b[2J\x1b]0;owned\x07 \x9b31m\x00\r\n\u202egnp.exe\u2028\u200bx\ud800"
FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", " =1")


def hidden(text: str) -> list[str]:
    return [character for character in text if character != "\n" and unicodedata.category(character) in HIDDEN]


def test_every_unprintable_character_of_unicode_is_escaped() -> None:
    everything = [chr(code) for code in range(sys.maxunicode + 1)]
    wanted = [character for character in everything if unicodedata.category(character) in HIDDEN]
    assert not hidden(printable("".join(wanted)))
    assert "\n" not in printable("a\nb")
    assert printable_lines("a\nb\x1b") == "a\nb\\x1b"
    shown = "".join(character for character in everything if unicodedata.category(character) not in {*HIDDEN, "Cn"})
    assert printable(shown) == shown


def evil(labels: tuple[str, ...]) -> Recording:
    ranges = [Range(text, "module", None, 1, 0, 10 * at, 10 * at + 5) for at, text in enumerate(labels)]
    return recorded(ranges, classes={text: text for text in labels})


@pytest.mark.parametrize("by", ["tree", "module", "class", "range"])
def test_no_output_carries_what_a_terminal_would_obey(by: str) -> None:
    report = from_recording(evil((EVIL, "ok")))
    report.notes.append(EVIL)
    for text in (
        render_text(report, by, width=80),
        render_json(report, by),
        render_csv(report, by).replace("\r\n", ""),
    ):
        assert not hidden(text), text
        assert "gnp.exe" in text
    assert EVIL in [row["name"] for row in json.loads(render_json(report, by))["rows"]], "JSON keeps what it escapes"


def test_a_comparison_carries_none_either() -> None:
    found = diff(from_recording(evil((EVIL, "ok"))), from_recording(evil((EVIL, "ok"))))
    found.notes.append(EVIL)
    found.rows[0].name = EVIL
    for text in (diff_text(found, 80), diff_json(found), diff_csv(found).replace("\r\n", "")):
        assert not hidden(text)


def test_a_file_name_reaches_the_terminal_as_text(tmp_path: Path) -> None:
    path = tmp_path / "\x1b]0;owned\x07.sqlite"
    for arguments in ([str(path)], [str(path), "-o", str(path)]):
        done = CliRunner().invoke(cli, ["report", *arguments])
        assert done.exit_code == 1
        assert not hidden(done.output)
        assert "\\x1b]0;owned" in done.output
    evil(("ok",)).save(path)
    done = CliRunner().invoke(cli, ["report", str(path), "-o", str(tmp_path / "\x1b[2J.csv")])
    assert done.exit_code == 0
    assert not hidden(done.output)


@pytest.mark.parametrize("formula", FORMULAS)
def test_no_cell_is_a_formula(formula: str) -> None:
    report = from_recording(evil((formula,)))
    for row in list(csv.DictReader(io.StringIO(render_csv(report)))):
        assert row["name"] == f"'{formula}"
        assert row["path"].startswith("'")
        assert row["cpu_ns"] == "5"
    found = diff(report, report)
    found.rows[0].name = formula
    found.rows[0].b = 1
    (line,) = csv.DictReader(io.StringIO(diff_csv(found)))
    assert line["name"] == f"'{formula}"
    assert line["delta_ns"] == "-4", "a number stays a number"


@given(st.text())
def test_text_fits_its_column(text: str) -> None:
    shown = printable(text)
    assert not hidden(shown)
    assert "\n" not in shown
    assert width_of(cut(shown, 7)) <= 7
    assert width_of(pad(cut(shown, 7), 7)) == 7
    assert json.loads(json_text([text])) == [text]
    assert not csv_cell(text).lstrip().startswith(("=", "+", "-", "@"))


def test_colour_is_ours_only() -> None:
    text = render_text(from_recording(evil((EVIL, "cannot attribute: x"))), width=80, color=True)
    sequences = {part.partition("m")[0] for part in text.split("\x1b[")[1:]}
    assert sequences <= {"0", "1", "2", "33"}
    assert "\x1b]" not in text
