"""The command line on graphs: a search that is exact, one by descent, and what both are told."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gia_jax.cli import main

# Molecules: the labels of their atoms, and their bonds.
MOLECULES = (
    ((0, 0, 1, 0, 2), ((0, 1), (1, 2), (2, 3), (3, 4))),
    ((0, 0, 0, 1, 2), ((0, 1), (1, 2), (2, 0), (2, 3), (3, 4))),
    ((0, 1, 0, 2, 0, 0), ((0, 1), (1, 2), (2, 3), (3, 0), (3, 4), (4, 5))),
    ((0, 0, 2), ((0, 1), (1, 2))),
    ((1, 0, 0, 2), ((0, 1), (1, 2), (1, 3))),
)


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """`main` chooses the precision of its process."""
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def mutag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file like that of MUTAG, of five molecules."""
    bonds, places, labels, first = [], [], [], 1
    for number, (atoms, pairs) in enumerate(MOLECULES, 1):
        bonds += [f"{first + i}, {first + j}\n{first + j}, {first + i}\n" for i, j in pairs]
        places += [f"{number}\n" for _ in atoms]
        labels += [f"{atom}\n" for atom in atoms]
        first += len(atoms)
    files = {"A": bonds, "graph_indicator": places, "node_labels": labels}
    files["graph_labels"] = [f"{1 - 2 * (number % 2)}\n" for number in range(len(MOLECULES))]
    folder = tmp_path / "sets" / "graphs"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "MUTAG.zip", "w") as archive:
        for part, lines in files.items():
            archive.writestr(f"MUTAG/MUTAG_{part}.txt", "".join(lines))
    monkeypatch.setenv("GIA_JAX_DATA_DIR", str(tmp_path / "sets"))
    return tmp_path


def _attack(folder: Path, *arguments: str) -> int:
    return main(["attack", "--data", "mutag", *arguments, "--out", str(folder / "out")])


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "results.json").read_text())


def test_spans_find_molecules_exactly_and_noise_stops_them(mutag: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--attack", "graph_spans", "--victims", "2"]
    assert _attack(mutag, *chosen) == 0
    printed, read = capsys.readouterr().out, _read(mutag)
    assert "2 clients with 1 of MUTAG, graphs of at most 30 nodes with one-hot labels and degrees" in printed
    assert "number of nodes" in printed
    for victim in read["victims"]:
        assert (victim["exact"], victim["nodes"], victim["is_finite"], victim["label_correct"]) == (1, 1, True, 1)
    assert (mutag / "out" / "reconstructions.png").exists()
    assert _attack(mutag, *chosen, "--no-prior-only", "--defense", "gaussian:scale=1e-3") == 0
    printed, read = capsys.readouterr().out, _read(mutag)
    assert not any(victim["is_finite"] for victim in read["victims"])
    assert "graph_spans (2 of 2 not finite)" in printed


def test_glg_matches_gradients_of_molecules(mutag: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--attack", "glg", "--victims", "1", "--steps", "30", "--no-prior-only"]
    assert _attack(mutag, *chosen, "--defense", "soteria:ratio=0.3") == 0
    printed, read = capsys.readouterr().out, _read(mutag)
    assert "number of nodes" in printed
    assert "soteria prunes" in printed
    assert "edge AUC" in printed
    victim = read["victims"][0]
    assert np.isfinite([victim["edges"], victim["nodes"], victim["node_mse"]]).all()
    assert victim["label_correct"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lenet"], "--model of --data mutag must be one of gcn, graphsage, gin, got 'lenet'"),
        (["--attack", "graph_spans", "--model", "gin"], "--attack graph_spans needs one of the models gcn, got 'gin'"),
        (["--attack", "grad_inversion"], "--attack grad_inversion needs images, got --data mutag"),
        (["--attack", "glg", "--defense", "mixup"], "mixup:k=4 mixes inputs that are one array, got --data mutag"),
        (["--attack", "dlg", "--solver", "levenberg_marquardt"], "needs inputs that are one array, got --data mutag"),
        (["--attack", "graph_spans", "--batch-size", "2"], "graph_spans needs a batch of one example, got 2"),
        (["--attack", "glg", "--victims", "6"], "--victims times --batch-size must be at most 5 for mutag, got 6"),
        (["--data", "digits", "--attack", "glg"], "--attack glg needs graphs, got --data digits"),
    ],
)
def test_what_graphs_cannot_do_is_one_line(
    mutag: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert _attack(mutag, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
