"""Scores of a sweep in a store, and the rows of a report that are read from it."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gia_jax import Batch, Observation, gradient_matching, modalities
from gia_jax.report.page import page
from gia_jax.report.runs import read
from gia_jax.sweep import best_restart, grid, open_sweep, score_sweep, stored_sweep

MODALITY = modalities.image((4, 4, 1))
TRUTH = Batch(np.asarray(jax.random.uniform(jax.random.key(0), (3, 1, 4, 4, 1))), np.zeros((3, 1), int))


def _client(params: Any, batch: Batch) -> Any:
    return jnp.mean(batch.inputs, 0)


def _stored(store: Path, **options: Any) -> Any:
    """The update is the image: a rate of 0.5 finds it at once, one of 0 stays where it starts."""
    seen = Observation(
        jnp.zeros((4, 4, 1)),
        jnp.asarray(TRUTH.inputs[:, 0]).at[2].set(jnp.nan),
        {"inputs_like": jnp.zeros((3, 1, 4, 4, 1)), "labels": jnp.asarray(TRUTH.labels)},
    )
    with pytest.warns(UserWarning, match="victims 2 are not finite"):
        return stored_sweep(
            store,
            lambda setting: gradient_matching(
                _client,
                objective_fn=lambda a, b: jnp.sum(jnp.square(a - b)),
                optimizer=optax.sgd(setting["rate"]),
            ),
            grid(rate=[0.5, 0.0]),
            jax.random.key(1),
            seen,
            num_steps=2,
            num_restarts=2,
            lanes=4,
            attributes={
                "title": "descent",
                "threat_model": "a server with <labels>",
                "command": "python x.py",
            },
            **options,
        )


def test_scores_are_those_of_the_best_restarts(tmp_path: Path) -> None:
    _stored(tmp_path)
    found = score_sweep(tmp_path, TRUTH, MODALITY)
    assert found.psnr.dims == ("setting", "victim", "example")
    assert (found.psnr.values[0, :2] > 60).all()
    assert np.isnan(found.psnr.values[:, 2]).all()
    best = best_restart(found)
    for i in range(2):
        own = Batch(best.inputs.values[i], best.labels.values[i])
        desired = MODALITY.score_fn(
            jax.tree.map(lambda leaf: leaf[:2], own), jax.tree.map(lambda leaf: leaf[:2], TRUTH)
        )
        np.testing.assert_allclose(found.psnr.values[i, :2], desired.scores["psnr"], rtol=1e-6)
    assert (best.loss.values[:, :2] == found.loss.values[:, :2].min(2)).all()
    again = score_sweep(tmp_path, TRUTH, MODALITY)
    assert again.identical(found)


def test_a_report_shows_what_is_in_the_store(tmp_path: Path) -> None:
    _stored(tmp_path / "folder" / "store", process=(0, 2))
    (row, other) = read(tmp_path)
    assert list(row.scores) == ["loss"]
    assert row.notes == ("2 of 6 lanes have not been run",) or "lanes have not been run" in " ".join(
        (*row.notes, *other.notes)
    )
    _stored(tmp_path / "folder" / "store")
    found = score_sweep(tmp_path / "folder" / "store", TRUTH, MODALITY)
    (row, other) = read(tmp_path)
    assert [row.title, other.title] == ["descent: rate 0.5", "descent: rate 0"]
    assert row.threat_model == "a server with <labels>"
    assert row.command == "python x.py"
    assert row.notes == ["2 of 6 lanes ended with a loss or reconstruction that is not finite"]
    np.testing.assert_allclose(row.scores["psnr"].values, found.psnr.values[0, :, 0])
    assert row.scores["psnr"].value == pytest.approx(np.median(found.psnr.values[0, :2, 0]))
    assert row.cost["running, s"] == found.attrs["run_seconds"] > 0
    assert row.versions["jax"] == jax.__version__
    loss, over = row.curves
    np.testing.assert_allclose(loss.lines["best victim"][1], best_restart(found).losses.values[0, :2].min(0))
    np.testing.assert_array_equal(over.lines["PSNR"][0], [0, 0.5])
    assert len(row.examples) == 3
    assert json.dumps(row.settings) == json.dumps({"rate": "0.5"})


def test_a_truth_of_other_victims_is_named(tmp_path: Path) -> None:
    _stored(tmp_path)
    with pytest.raises(ValueError, match=r"truth.inputs must have the shape \(3, 1, 4, 4, 1\), got \(2, 1, 4, 4, 1\)"):
        score_sweep(tmp_path, jax.tree.map(lambda leaf: leaf[:2], TRUTH), MODALITY)
    with pytest.raises(
        ValueError, match=r"truth.inputs.a must be one of the arrays of the reconstructions, \[.*'inputs'"
    ):
        score_sweep(tmp_path, Batch({"a": TRUTH.inputs}, TRUTH.labels), MODALITY)
    assert "psnr" not in open_sweep(tmp_path)


def test_scores_of_fewer_lanes_than_have_been_run_are_left_out(tmp_path: Path) -> None:
    _stored(tmp_path, process=(0, 2))
    assert "psnr" in score_sweep(tmp_path, TRUTH, MODALITY)
    with pytest.warns(UserWarning, match="the scores in '.*' are left out, for they are of 4 lanes, and 12 have been"):
        assert "psnr" not in _stored(tmp_path)
    with pytest.warns(UserWarning, match="are left out"):
        rows = read(tmp_path)
    assert [list(row.scores) for row in rows] == [["loss"], ["loss"]]
    assert (score_sweep(tmp_path, TRUTH, MODALITY).psnr.values[:1, :2] > 60).all()


def test_a_score_may_have_the_name_of_a_setting(tmp_path: Path) -> None:
    seen = Observation(
        jnp.zeros((4, 4, 1)), jnp.asarray(TRUTH.inputs[:, 0]), {"inputs_like": TRUTH.inputs, "labels": TRUTH.labels}
    )
    settings = {"psnr": np.array([123456, 123457]), "many": np.ones((2, 3, 3))}
    stored_sweep(tmp_path, lambda _: gradient_matching(_client), settings, jax.random.key(1), seen, num_steps=1)
    found = score_sweep(tmp_path, TRUTH, MODALITY)
    assert found["scores.psnr"].shape == (2, 3, 1)
    rows = read(tmp_path)
    assert [row.settings["psnr"] for row in rows] == ["123456", "123457"]
    assert rows[0].settings["many"] == "numbers of shape (3, 3)"
    np.testing.assert_array_equal(rows[1].scores["psnr"].values, found["scores.psnr"].values[1, :, 0])
    (tmp_path / "scores" / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match=r"store must be whole, got '.*/scores', which is broken"):
        read(tmp_path)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_report_of_nothing_finite_says_so(tmp_path: Path) -> None:
    seen = Observation(jnp.zeros((4, 4, 1)), TRUTH.inputs[:, 0], {"inputs_like": TRUTH.inputs, "labels": TRUTH.labels})
    settings = {"<script>alert": np.array([1.0, np.nan, 2.0])}
    stored_sweep(
        tmp_path, lambda setting: gradient_matching(_client, optimizer=optax.sgd(jnp.nan * setting["<script>alert"])),
        settings, jax.random.key(1), seen, num_steps=1,
    )  # fmt: skip
    score_sweep(tmp_path, TRUTH, MODALITY)
    rows = read(tmp_path)
    assert [list(row.notes) for row in rows] == [
        ["3 of 3 lanes ended with a loss or reconstruction that is not finite"]
    ] * 3
    assert not any("alert" in curve.title for row in rows for curve in row.curves)
    assert "<script>alert" not in page(rows)
