"""The notebook runs from top to bottom, as a reader would run it."""

from pathlib import Path

import pytest

from ..support.limits import CHILD_S

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


def test_the_quickstart_runs_and_shows_a_tree_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel draws into the notebook
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install 'fxnvtx[notebook]'")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'fxnvtx[notebook]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install 'fxnvtx[notebook]'")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'fxnvtx[notebook]'")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=int(CHILD_S), resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "request#1" in printed
    assert "dit.blocks.0" in printed
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2


def test_the_notebook_is_committed_without_outputs() -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install 'fxnvtx[notebook]'")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
