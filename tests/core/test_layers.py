"""One direction of imports through the whole product, and no circle.

Every import counts: at the top of a file, inside a function, and for type checkers only. One inside a function defers
what it costs, and says nothing about who may know whom.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fxnvtx

ROOT = Path(fxnvtx.__file__).parent

# part -> the parts that it may import, besides itself; from the ground up
DIRECTION = {
    "ground": (),
    "torch": ("ground",),
    "ranges": ("ground", "torch"),
    "report": ("ground", "recording"),
    "modules": ("ground", "torch", "ranges", "recording"),
    "compile": ("ground", "torch", "ranges", "recording", "modules"),
    "models": ("ground",),
    "recording": ("ground", "torch", "ranges"),
    "pipeline": ("ground", "torch", "ranges", "recording", "modules", "compile", "models"),
    "integrations": ("ground", "torch", "ranges", "recording", "modules", "compile"),
}
PROGRAMS = "programs"  # the command line and what it runs: may import everything, and nothing below imports it

# files at the top of the package, and files that lie in another folder than the part they are of
PARTS = {"ground": ["categories", "errors", "output"], "torch": ["compile/torch_private"]}


def part_of(name: str) -> str:
    for part, members in PARTS.items():
        if name in members:
            return part
    folder = name.partition("/")[0]
    return folder if folder in DIRECTION and (ROOT / folder).is_dir() else PROGRAMS


@cache
def imports() -> dict[str, set[str]]:
    """file -> the product's files that it imports, both as `folder/name`; a package goes by its folder's name."""
    files = {_named(path): path for path in ROOT.rglob("*.py") if "_site" not in path.parts}
    return {name: _imported(name, path, files) - {name} for name, path in files.items() if name}


def _named(path: Path) -> str:
    name = path.relative_to(ROOT).with_suffix("").as_posix()
    return "" if name == "__init__" else name.removesuffix("/__init__")


def _imported(name: str, path: Path, files: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            dotted = [alias.name.partition("fxnvtx.")[2] for alias in node.names if alias.name.startswith("fxnvtx.")]
            found |= {text.replace(".", "/") for text in dotted}
        elif isinstance(node, ast.ImportFrom):
            home = _home(name, path, node)
            if home is None:
                continue
            for alias in node.names:
                whole = f"{home}/{alias.name}".lstrip("/")
                found.add(whole if whole in files else home)
    return found & set(files) - {""}


def _home(name: str, path: Path, node: ast.ImportFrom) -> str | None:
    """What `from ... import` imports from; None where that is none of ours."""
    named = (node.module or "").replace(".", "/")
    if not node.level:
        own = named == "fxnvtx" or named.startswith("fxnvtx/")
        return named.removeprefix("fxnvtx").lstrip("/") if own else None
    here = name.split("/") if path.name == "__init__.py" else name.split("/")[:-1]
    return "/".join([*here[: len(here) - node.level + 1], *named.split("/")]).strip("/")


def test_the_product_was_read():
    found = imports()
    assert len(found) > 80
    assert {"ranges/emit", "modules/selection"} <= found["modules/call_slot"]
    assert "modules/call_slot" in found["compile"]  # inside a function
    assert {part_of(name) for name in found} == {*DIRECTION, PROGRAMS}
    assert [name for members in PARTS.values() for name in members if name not in found] == []


@pytest.mark.parametrize("part", DIRECTION)
def test_one_direction(part):
    allowed = {part, *DIRECTION[part]}
    wrong = [
        f"{who} -> {whom}"
        for who, needed in sorted(imports().items())
        for whom in sorted(needed)
        if part_of(who) == part and part_of(whom) not in allowed
    ]
    assert wrong == []


def test_no_circle():
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_the_document_of_the_house_names_what_is_there():
    text = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`([\w/]+\.py)`", text) if "<" not in name}
    there = [
        path.relative_to(ROOT.parent).as_posix()
        for folder in (ROOT, ROOT.parent / "tests")
        for path in folder.rglob("*.py")
    ]
    assert len(named) > 60
    assert [name for name in sorted(named) if not any(f"/{path}".endswith(f"/{name}") for path in there)] == []
