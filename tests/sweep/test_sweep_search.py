"""Searches for settings: halving keeps what is best at every stage, and sees nothing but its scores."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax import Batch, Reconstruction
from gia_jax.sweep import Sweep, Timing, log_uniform, successive_halving
from gia_jax.sweep.search import mean_loss


def _sweep(settings: Any, losses: Any, is_finite: Any = True) -> Sweep:
    """A sweep of one victim that ends with given losses."""
    loss = np.asarray(losses, float)[:, None]
    batch = Batch(np.zeros((len(loss), 1, 1, 1)), np.zeros((len(loss), 1, 1), int))
    found = Reconstruction(batch, loss, np.broadcast_to(is_finite, loss.shape), loss[..., None])
    return Sweep(settings, found, loss[..., None, None], Timing(0.0, 0.0, 0.0))


def test_the_best_of_every_round_go_on() -> None:
    ran = []

    def sweep_fn(settings: Any, num_steps: int) -> Sweep:
        ran.append((settings["rate"].tolist(), num_steps))
        return _sweep(settings, np.abs(settings["rate"] - 4 - num_steps / 10))  # the best one moves with the steps

    settings = {"rate": np.arange(9.0)}
    found = successive_halving(sweep_fn, settings, num_steps=[2, 9, 10], factor=3)
    assert ran == [([0, 1, 2, 3, 4, 5, 6, 7, 8], 2), ([4, 5, 3], 9), ([5], 10)]
    assert found.best["rate"] == 5
    assert [kept.tolist() for kept in found.kept] == [[0, 1, 2, 3, 4, 5, 6, 7, 8], [4, 5, 3], [5]]
    np.testing.assert_allclose(found.scores[1], [0.9, 0.1, 1.9])


def test_what_is_not_finite_is_worst_and_no_round_may_have_nothing_else() -> None:
    def sweep_fn(settings: Any, num_steps: int) -> Sweep:
        return _sweep(settings, settings, np.arange(len(settings))[:, None] > 0)

    found = successive_halving(sweep_fn, np.array([1.0, 3.0, 2.0]), num_steps=[1], factor=3)
    assert found.best == 2
    np.testing.assert_array_equal(mean_loss(found.last), [np.inf, 3, 2])
    with pytest.raises(ValueError, match="score_fn must be finite for at least one setting, got none in a round of 7"):
        successive_halving(sweep_fn, np.ones(2), num_steps=[7], score_fn=lambda found: np.full(2, np.nan))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": [3, 3]}, r"num_steps must grow from round to round, got \[3, 3\]"),
        ({"num_steps": 3}, "num_steps must be a sequence of integers, got 3"),
        ({"num_steps": []}, r"num_steps must grow from round to round, got \[\]"),
        ({"num_steps": [0, 3]}, "num_steps must be .*, got 0"),
        ({"factor": 1}, "factor must be .*, got 1"),
        ({"score_fn": lambda found: np.zeros(3)}, r"score_fn must return one score for each of 2 settings, got \(3,\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_searches_that_are_none_are_named(options: Any, message: str) -> None:
    options = {"num_steps": [1]} | options
    with pytest.raises(ValueError, match=message):
        successive_halving(lambda settings, _: _sweep(settings, settings), np.ones(2), **options)


def test_a_search_leaves_out_no_setting_by_their_lengths() -> None:
    for first, second in ((2, 3), (3, 2)):
        settings = {"a": np.ones(first), "b": np.ones(second)}
        with pytest.raises(ValueError, match=r"settings must have leading axes of one length: settings\['a'\] has"):
            successive_halving(lambda settings, _: _sweep(settings, settings), settings, num_steps=[1])


def test_numbers_are_uniform_in_their_logarithms() -> None:
    found = log_uniform(jax.random.key(0), 4_000, rate=(1e-4, 1.0), weight=(1.0, 10.0))
    counts = np.histogram(np.log10(found["rate"]), bins=[-4, -3, -2, -1, 0])[0]
    assert counts.sum() == 4_000
    assert np.abs(counts - 1_000).max() < 4 * np.sqrt(1_000 * 0.75)
    assert abs(np.corrcoef(jnp.log(found["rate"]), jnp.log(found["weight"]))[0, 1]) < 0.06


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, {}), "ranges must have at least one name"),
        ((0, {"rate": (0.1, 1.0)}), "num_settings must be .*, got 0"),
        ((1, {"rate": (0.0, 1.0)}), r"rate must be a pair of a positive number and a larger one, got \(0.0, 1.0\)"),
        ((1, {"rate": 1.0}), "rate must be a pair of a positive number and a larger one, got 1.0"),
        ((1, {"rate": "ab"}), "rate must be a pair of a positive number and a larger one, got 'ab'"),
        ((1, {"rate": (1.0, 0.1)}), r"rate must be a pair of a positive number and a larger one, got \(1.0, 0.1\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_ranges_that_are_none_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_uniform(jax.random.key(0), arguments[0], **arguments[1])
