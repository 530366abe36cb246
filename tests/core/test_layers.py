"""The eager core imports downwards: no file needs, to be imported, one that needs it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fxnvtx

ROOT = Path(fxnvtx.__file__).parent


def needs(name):
    """Files of the package that `fxnvtx/<name>.py` imports when it is imported itself."""
    found = set()
    for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            home = (node.module or "").replace(".", "/")
            names = [home] if (ROOT / f"{home}.py").is_file() else [f"{home}/{a.name}".lstrip("/") for a in node.names]
            found |= {n for n in names if (ROOT / f"{n}.py").is_file()}
    return found


@pytest.mark.parametrize("start", ["control", "explain", "hooks", "instrument", "recording", "sight", "slot"])
def test_no_circle(start):
    done = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for needed in sorted(needs(name)):
                visit(needed, [*above, name])
            done.add(name)

    visit(start, [])
    assert len(done) > 2
