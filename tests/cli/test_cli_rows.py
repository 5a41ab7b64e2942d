"""The command line on data that are no images: rows of a table, and recorded updates of arrays."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gia_jax.cli import main
from gia_jax.report.arrays import unpack

WORK = ("Private", "State-gov", "Self-emp")


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """`main` chooses the precision of its process."""
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def adult(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files like those of Adult, of 60 and 30 rows."""
    rng = np.random.default_rng(0)

    def line(ending: str) -> str:
        numbers = {0: rng.integers(17, 90), 2: rng.integers(20_000, 400_000), 4: rng.integers(1, 16)}
        numbers |= {10: rng.integers(0, 5_000), 11: rng.integers(0, 900), 12: rng.integers(10, 80)}
        fields = [str(numbers[i]) if i in numbers else str(rng.choice(WORK)) for i in range(14)]
        return ", ".join([*fields, str(rng.choice(["<=50K", ">50K"])) + ending])

    folder = tmp_path / "sets" / "tabular"
    folder.mkdir(parents=True)
    for name, rows, ending in (("data", 60, ""), ("test", 30, ".")):
        content = "\n".join(["|1x3 Cross validator", *(line(ending) for _ in range(rows)), ""])
        (folder / f"adult.{name}.gz").write_bytes(gzip.compress(content.encode()))
    monkeypatch.setenv("GIA_JAX_DATA_DIR", str(tmp_path / "sets"))
    return tmp_path


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "results.json").read_text())


def test_rows_are_attacked_scored_and_shown_by_their_fields(adult: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--data", "adult", "--model", "linear", "--steps", "300", "--victims", "2", "--seed", "1"]
    assert main(["attack", *chosen, "--out", str(adult / "out")]) == 0
    printed, read = capsys.readouterr().out, _read(adult)
    assert "2 clients with 1 of adult test (30) each" in printed
    assert "fields right" in printed
    assert "PSNR" not in printed
    assert set(read["baselines_fields"]) == {"commonest values", "nearest row"}
    results = adult / "out" / "results.json"
    drawing = unpack(results.with_suffix(".npz"), results.read_bytes())[""]["drawing"]
    assert drawing.tobytes() == (adult / "out" / "reconstructions.txt").read_bytes()
    for victim, guess in zip(read["victims"], np.ravel(read["baselines_fields"]["commonest values"]), strict=False):
        assert set(victim) >= {"fields", "row", "fields_per_example", "label_correct"}
        assert victim["fields"] > guess
    assert np.mean(read["prior_only_fields"]) < np.mean([victim["fields"] for victim in read["victims"]]) - 0.2
    drawn = (adult / "out" / "reconstructions.txt").read_text()
    assert all(word in drawn for word in ("original", "inverting_gradients", "marital status", "% right"))
    assert not (adult / "out" / "reconstructions.png").exists()


def test_an_exact_attack_reads_a_row_off_and_noise_hides_it(adult: Path) -> None:
    chosen = ["--data", "adult", "--attack", "linear", "--model", "linear", "--victims", "3", "--no-prior-only"]
    assert main(["attack", *chosen, "--out", str(adult / "out")]) == 0
    assert [victim["row"] for victim in _read(adult)["victims"]] == [1, 1, 1]
    noise = ["--defense", "dpsgd:noise_multiplier=10,norm=1", "--out", str(adult / "out")]
    assert main(["attack", *chosen, *noise]) == 0
    assert max(victim["fields"] for victim in _read(adult)["victims"]) < 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "Adult"], "got 'Adult': names are in lower case"),
        (["--data", "adults"], "cifar100, got 'adults'"),
        (["--data", "photos", "--attack", "glg"], "--attack glg needs graphs, got --data photos"),
        (["--data", "photos", "--model", "gcn"], "got 'gcn': it is for graphs, which --data must be"),
        (["--model", "lenet"], "--model of --data adult must be one of linear, mlp, got 'lenet'"),
        (["--attack", "grad_inversion"], "--attack grad_inversion needs images, got --data adult"),
        (["--attack", "gias"], "--attack gias needs images, got --data adult"),
        (["--victims", "31"], "--victims times --batch-size must be at most 30 for adult, got 31"),
    ],
)
def test_what_rows_cannot_do_is_one_line(
    adult: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["attack", "--data", "adult", *arguments, "--out", str(adult / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_too_many_victims_are_refused_before_the_rest_is_read(adult: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (adult / "sets" / "tabular" / "adult.data.gz").unlink()
    assert main(["attack", "--data", "adult", "--victims", "100000", "--out", str(adult / "out")]) == 2
    assert "--victims times --batch-size must be at most 30 for adult, got 100000" in capsys.readouterr().err


def _save(folder: Path, name: str, **arrays: np.ndarray) -> str:
    np.savez(folder / name, **arrays)
    return str(folder / name)


def test_a_recorded_update_of_an_array_is_scored_against_its_truth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gradient of a dense layer by hand: softmax minus one-hot, times the input."""
    rng = np.random.default_rng(0)
    kernel, bias, signal = rng.normal(size=(5, 3)), np.zeros(3), rng.normal(size=5)
    residual = np.exp(signal @ kernel)
    residual = residual / residual.sum() - np.eye(3)[2]
    params = _save(tmp_path, "params.npz", **{"head.kernel": kernel, "head.bias": bias})
    update = _save(tmp_path, "update.npz", **{"head.kernel": np.outer(signal, residual), "head.bias": residual})
    truth = _save(tmp_path, "truth.npz", inputs=signal[None], labels=np.array([2]))
    files = ["--update", update, "--params", params, "--model", "linear", "--input-shape", "5"]
    out = ["--out", str(tmp_path / "out")]
    assert main(["attack", *files, "--attack", "linear", "--truth", truth, *out]) == 0
    printed, read = capsys.readouterr().out, _read(tmp_path)
    assert "SNR" in printed
    assert read["victims"][0]["snr"] > 80  # float32
    assert read["baselines_snr"] == {"zero": [[0.0]]}
    # Signed steps of Adam stay within bounds that the truth leaves, and fit less.
    bounded = ["--attack", "inverting_gradients", "--steps", "100", "--mean", "0.5", "--std", "1"]
    assert main(["attack", *files, *bounded, "--truth", truth, "--no-prior-only", *out]) == 0
    with np.load(tmp_path / "out" / "reconstruction.npz") as arrays:
        assert np.all(np.abs(arrays["inputs"]) <= 0.5)
    assert _read(tmp_path)["victims"][0]["snr"] < 20
