"""Intervals of scores over victims."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gia_jax.metrics import bootstrap_interval


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_all_draws_at_once_are_the_same_draws(statistic: Callable[..., Any]) -> None:
    values = np.random.default_rng(1).normal(size=17)
    assert bootstrap_interval(values, statistic) == bootstrap_interval(values, lambda drawn: statistic(drawn))


def test_an_interval_of_the_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(2).normal(size=400)
    error = 1.96 * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose(
        bootstrap_interval(values, np.mean), values.mean() + np.array([-error, error]), atol=0.01
    )


def test_an_infinite_score_may_end_an_interval() -> None:
    assert bootstrap_interval(np.array([7.0, 160.0, np.inf]), np.median) == (7.0, np.inf)
    assert bootstrap_interval(np.array([3.0, 3.0]), np.mean) == (3.0, 3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(bootstrap_interval(np.array([1.0, np.nan, 2.0]), np.median)).all()


def test_one_victim_has_no_interval() -> None:
    with pytest.raises(ValueError, match="values must have at least two victims, got 1"):
        bootstrap_interval(np.ones(1), np.mean)
