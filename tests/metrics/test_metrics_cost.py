"""The expected cost of one recovered example."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from gia_jax import metrics


def test_the_expected_cost_is_that_of_an_attacker_who_tries_until_one_succeeds():
    share, cost, rng = 0.2, 3.0, np.random.default_rng(0)
    success = np.arange(50) < 10
    # Number of attempts until the first success, drawn 200,000 times.
    simulated = 5.0 + cost * rng.geometric(share, 200_000).mean()
    assert metrics.expected_cost(np.full(50, cost), success, once=5.0).value == pytest.approx(simulated, rel=5e-3)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.01, 1e6))
def test_the_interval_is_that_of_clopper_and_pearson(counts, cost):
    number, total = counts
    found = metrics.expected_cost(np.full(total, cost), np.arange(total) < number)
    # Quantiles of beta distributions, from their own definition.
    low = special.betaincinv(number, total - number + 1, 0.025) if number else 0.0
    high = special.betaincinv(number + 1, total - number, 0.975) if number < total else 1.0
    assert found.share_interval == pytest.approx((low, high), abs=1e-9)
    assert found.interval == pytest.approx((cost / high, cost / low if low else np.inf), rel=1e-6)
    assert found.interval[0] <= found.value <= found.interval[1]


def test_without_a_success_only_a_lower_end_is_known():
    found = metrics.expected_cost(np.full(32, 2.0), np.zeros(32, bool))
    assert found.value == np.inf
    assert found.interval[1] == np.inf
    assert found.interval[0] == pytest.approx(2 / (1 - 0.025 ** (1 / 32)))  # "rule of three" of 97.5 %


@pytest.mark.parametrize(
    ("cost", "success", "once", "message"),
    [
        (np.zeros(0), np.zeros(0, bool), 0.0, r"cost and success must have one shape"),
        (np.ones(2), np.zeros(3, bool), 0.0, r"got \(2,\) and \(3,\)"),
        (np.ones(1), np.array([0.5]), 0.0, "success must be boolean, got float64"),
        (-np.ones(1), np.array([True]), 0.0, "cost must be finite and at least 0"),
        (np.full(1, np.nan), np.array([True]), 0.0, "cost must be finite and at least 0"),
        (np.ones(1), np.array([True]), -1.0, "once"),
    ],
)
def test_bad_costs_are_refused(cost, success, once, message):
    with pytest.raises(ValueError, match=message):
        metrics.expected_cost(cost, success, once=once)
