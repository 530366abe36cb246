"""What an import brings along: reading captures without torch, public names on demand, no circle, one direction."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fxnvtx

from ..support.limits import CHILD_S


def _loaded(code: str) -> set[str]:
    """The modules that a new interpreter holds after running `code`."""
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=CHILD_S,
    )
    return set(out.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import fxnvtx; fxnvtx.FxnvtxError; fxnvtx.record; fxnvtx.range; dir(fxnvtx)",
        "from fxnvtx import Recording, report",
        "import fxnvtx.report.commands, fxnvtx.cli.doctor",
        "from fxnvtx.cli import cli\nfor name in cli.list_commands(None)[2:]: cli.get_command(None, name)",
    ],
)
def test_reading_needs_no_torch(code: str) -> None:
    assert "torch" not in _loaded(code)


def test_a_launched_program_meets_no_library_of_the_command_line() -> None:
    """It may be another environment than ours, with torch and without click."""
    loaded = _loaded("import torch, fxnvtx.integrations.launched")
    assert "fxnvtx.integrations.launched" in loaded
    assert not {"click", "rich"} & loaded - _loaded("import torch")


def test_instrumenting_needs_no_dynamo() -> None:
    loaded = _loaded("import fxnvtx, torch; fxnvtx.instrument(torch.nn.Linear(2, 2))")
    assert "torch" in loaded
    assert "torch._dynamo" not in loaded


def test_every_public_name_is_there_and_is_no_module_of_the_same_name() -> None:
    code = "\n".join(
        [
            "import fxnvtx.modules.explain, importlib, types, fxnvtx",
            "importlib.import_module('fxnvtx.compile.backend')",
            "for name in fxnvtx.__all__: getattr(fxnvtx, name)",
            "assert isinstance(fxnvtx.explain, types.FunctionType), fxnvtx.explain",
            "assert isinstance(fxnvtx.instrument, types.FunctionType), fxnvtx.instrument",
            "from fxnvtx import explain; assert explain is fxnvtx.explain",
        ]
    )
    _loaded(code)
    assert set(fxnvtx.__all__) <= set(dir(fxnvtx))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'instrumnet'"):
        fxnvtx.instrumnet  # noqa: B018
