"""The notebooks run from top to bottom, and are committed with their pictures, small and free of machine's traces."""

import json
import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("skimage")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def _pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    committed = _pictures(notebook)
    for cell in notebook.cells:  # the committed outputs are of all steps; that every cell runs shows in a few
        cell.source = re.sub(r"(NUM_STEPS\b[^=\n]* = |num_(?:latent_)?steps=)[\d_]+", r"\g<1>60", cell.source)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()  # raises where a cell does
    assert _pictures(notebook) == committed > 0
    assert not list(tmp_path.iterdir())  # it leaves nothing behind


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_executed_small_and_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert _pictures(notebook) > 0
    assert path.stat().st_size < 600_000
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    text = json.dumps(notebook.cells)
    for trace in (os.sep + "home", os.sep + "root", os.sep + "tmp", "Traceback", '"stderr"'):
        assert trace not in text
    # A number never stands without the threat model that it was measured under.
    assert "threat model: honest-but-curious server; knows parameters, update" in text
