"""Fake gradients: ranks are kept, magnitudes are not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gia_jax.defenses import fake_gradients


@functools.partial(jax.jit, static_argnames=("scale", "count"))
def shared(update, scale=1.0, count=3, seed=0):
    transformation = fake_gradients(jax.random.key(seed), scale, count=count)
    return transformation.update(update, transformation.init(update))[0]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-10, 10, width=16), min_size=12, max_size=12, unique=True))
def test_the_order_of_the_entries_is_kept(values):
    update = {"kernel": jnp.asarray(values, jnp.float32).reshape(3, 4)}
    assert (np.argsort(shared(update)["kernel"], axis=None) == np.argsort(values)).all()


@pytest.mark.usefixtures("x64")
def test_magnitudes_are_those_of_the_scale_alone():
    update = {"kernel": jax.random.normal(jax.random.key(1), (200, 50))}
    same = shared(update, 0.5)["kernel"]
    np.testing.assert_allclose(same, shared({"kernel": update["kernel"] ** 3}, 0.5, count=1)["kernel"], atol=0.2)
    for q in (0.05, 0.25, 0.5, 0.9):  # against the quantiles of the normal distribution
        np.testing.assert_allclose(np.quantile(same, q), 0.5 * jax.scipy.stats.norm.ppf(q), atol=0.03)


@pytest.mark.usefixtures("x64")
def test_more_draws_come_nearer():
    update = {"kernel": jax.random.normal(jax.random.key(1), (8,)), "bias": jax.random.normal(jax.random.key(2), (3,))}

    def distance(count):
        found = [shared(update, count=count, seed=seed) for seed in range(10)]
        return np.mean([sum(float(jnp.sum((f[name] - update[name]) ** 2)) for name in update) for f in found])

    assert distance(50) < 0.6 * distance(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, r"scale must be positive, got 0\.0"),
        ({"scale": float("inf")}, "scale must be finite, got inf"),
        ({"scale": 1.0, "count": 0}, "count must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named_with_their_value(options, message):
    with pytest.raises(ValueError, match=message):
        fake_gradients(jax.random.key(0), **options)
