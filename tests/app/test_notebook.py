"""The notebooks run from top to bottom, as a reader would run them, and are kept with what they showed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ..support.limits import CHILD_S

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# what a reader must have seen at the end, and how many pictures
SHOWN = {
    "quickstart": (("request#1", "dit.blocks.0"), 2),
    "eager_against_compiled": (("fused(", "requests ", "relative"), 1),
    "reading_a_capture": (("aten::copy_", "memcpy", "copies take"), 1),
    "diffusers_offload": (("denoising_step_0", "transformer.transformer_blocks", "residency.load"), 0),
}
WANTED = {"diffusers_offload": ("diffusers",)}
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


def _read(path: Path) -> Any:
    for needed in ("nbformat", "nbclient", "ipykernel", "matplotlib", *WANTED.get(path.stem, ())):
        pytest.importorskip(needed, reason=f"{needed} is not installed: pip install 'fxnvtx[notebook,diffusers]'")
    import nbformat

    return nbformat.read(path, as_version=4)


def _shown(notebook: Any) -> tuple[str, int]:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    return _STYLE.sub("", "".join(texts)), len(pictures)


def test_each_notebook_is_known_here() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(SHOWN)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_speaks_of(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = _read(path)
    if path.stem == "eager_against_compiled" and not shutil.which("g++"):
        pytest.skip("Inductor needs a C++ compiler")
    import nbclient

    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel draws into the notebook
    monkeypatch.setenv("HOME", str(tmp_path))
    nbclient.NotebookClient(notebook, timeout=int(CHILD_S), resources={"metadata": {"path": str(FOLDER)}}).execute()
    text, pictures = _shown(notebook)
    wanted, drawn = SHOWN[path.stem]
    assert all(word in text for word in wanted), text
    assert pictures >= drawn


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_is_what_was_shown_and_names_no_machine(path: Path) -> None:
    notebook = _read(path)
    text, pictures = _shown(notebook)
    wanted, drawn = SHOWN[path.stem]
    assert all(word in text for word in wanted), text
    assert pictures >= drawn
    assert not re.search(r"/(root|home|opt|work|Users)/", text), text
