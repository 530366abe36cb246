"""Every block of code in the README and in docs/ does what it says: Python is run, commands are parsed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch import nn

import fxnvtx
from fxnvtx.cli import cli
from fxnvtx.cli.doctor import TORCH_2, findings
from fxnvtx.report.render.data import COLUMNS, row_fields
from fxnvtx.report.rows import Row
from fxnvtx.report.selection import VIEWS
from fxnvtx.report.tree import Spread

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("[A-Z]*.md")])
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[Any]:
    found: dict[Path, list[str]] = {}
    for document in dict.fromkeys(DOCUMENTS):
        for kind, text in _BLOCK.findall(document.read_text(encoding="utf-8")):
            if kind == language:
                found.setdefault(document, []).append(text)
    return [pytest.param(texts, id=str(document.relative_to(ROOT))) for document, texts in found.items()]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.mlp(self.norm(x)))


@pytest.mark.slow
@pytest.mark.parametrize("texts", blocks("python"))
def test_python_blocks_run_in_their_order(texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace a document, beside the `model` and its input `x` that the documents speak of."""
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(Block(), Block())
    x = torch.ones(2, 8)
    names: dict[str, Any] = {"__name__": "document", "model": model, "x": x, "torch": torch, "fxnvtx": fxnvtx}
    want = model(x)
    try:
        for text in texts:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(text, "document", "exec"), names)
        torch.testing.assert_close(names["model"](x), want)
    finally:
        fxnvtx.uninstrument(model)


def _commands(texts: list[str]) -> list[list[str]]:
    lines = [line for text in texts for line in text.splitlines()]
    words = [shlex.split(re.sub(r"\s#\s.*", "", part.strip())) for line in lines for part in line.split("&&")]
    named = [[Path(w[0]).name, *w[1:]] for w in words if w]
    return [w[1:] for w in named if w[0] == "fxnvtx"]


@pytest.mark.parametrize("texts", blocks("sh"))
def test_commands_have_the_options_that_are_shown(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in _commands(texts):
        for word in words:
            if re.fullmatch(r"[\w.-]+\.(sqlite|nsys-rep|json|py)", word):
                Path(word).touch()
        name, *rest = words
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, words
        command.make_context(name, rest)


def _named(document: str) -> set[str]:
    return set(re.findall(r"`([\w-]+)`", (ROOT / "docs" / document).read_text(encoding="utf-8")))


def test_every_field_and_column_of_a_report_is_explained() -> None:
    named = _named("report.md")
    fields = {field.name for field in dataclasses.fields(Row)} & set(row_fields(Row("x", 0, "range", "")))
    assert not (fields | set(COLUMNS)) - named
    assert not {field.name for field in dataclasses.fields(Spread)} - named
    assert not set(VIEWS) - named


@pytest.mark.slow
def test_every_line_of_the_doctor_is_explained() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert not {found.what for found in findings()} - set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE))


def test_every_public_name_is_in_the_api_page() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    packages = {"integrations", "models", "pipeline", "report"}
    assert not {f"::: fxnvtx.{name}" for name in fxnvtx.__all__ if name not in packages | {"FxnvtxError"}} - set(
        text.splitlines()
    )


def test_the_badges_say_what_is_declared_and_what_was_run() -> None:
    badges = re.findall(r">([^<>]+)</text>", (ROOT / "docs" / "badges.svg").read_text(encoding="utf-8"))
    said = dict(zip(badges[::2], badges[1::2], strict=True))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    run = re.findall(r"\b2\.(\d\d)\.\d\b", (ROOT / "docs" / "versions.md").read_text(encoding="utf-8"))
    pythons = sorted(map(int, re.findall(r"Python :: 3\.(\d+)", project)))
    assert said["python"] == f"3.{pythons[0]} to 3.{pythons[-1]}"
    assert said["torch"] == f"2.{min(run)} to 2.{max(run)}"
    assert (int(min(run)), int(max(run))) == TORCH_2
    declared = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert f"torch>=2.{min(run)},<2.{int(max(run)) + 1}" in declared
    assert said["licence"] in project
    assert "strict = true" in project
