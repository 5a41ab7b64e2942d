"""Tests of the span of a gradient: what is in it, and how often chance decides otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax.attacks import subspace


def _low_rank(rng, d=40, m=30, rank=5):
    return rng.normal(size=(d, rank)), rng.normal(size=(rank, m))


def test_a_true_vector_is_lost_as_often_as_is_said(x64):
    rng = np.random.default_rng(0)
    rows, mixing = _low_rank(rng)
    plausibility = jax.jit(subspace.plausibility)
    values = []
    for _ in range(60):
        noisy = jnp.asarray(rows @ mixing + 1e-4 * rng.normal(size=(40, 30)))
        space = subspace.column_space(noisy, noise=1e-4)
        assert int(space.rank) == 5
        values.append(plausibility(space, jnp.asarray(rows @ rng.normal(size=(5, 1))).T)[0])
    # uniform on [0, 1]: its deciles, within what 60 draws allow
    assert np.abs(np.quantile(values, np.linspace(0.1, 0.9, 9)) - np.linspace(0.1, 0.9, 9)).max() < 0.2


def test_the_kept_fraction_of_random_directions_is_that_of_the_beta_distribution(x64):
    rng = np.random.default_rng(1)
    rows, mixing = _low_rank(rng, d=6, rank=3)
    space = subspace.column_space(jnp.asarray(rows @ mixing), noise=1e-12)
    found = np.asarray(subspace.residuals(space, jnp.asarray(rng.normal(size=(4000, 6)))))
    for limit in (0.3, 0.6, 0.9):
        assert abs((found < limit).mean() - subspace.false_alarm(limit, 6, 3)) < 0.03


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_rounding_keeps_true_rows_and_drops_others(x64, dtype):
    rng = np.random.default_rng(2)
    rows, mixing = _low_rank(rng, d=60, m=50, rank=8)
    mixing *= np.logspace(0, -3, 50)  # columns of different lengths
    matrix, noise = subspace.equalized(
        jnp.asarray((rows @ mixing).astype(dtype), jnp.float64), spacing=jnp.finfo(dtype).eps
    )
    space = subspace.column_space(matrix, noise=noise)
    assert int(space.rank) == 8
    assert subspace.contains(space, jnp.asarray(rows.T)).all()
    assert not subspace.contains(space, jnp.asarray(rows.T + 0.01 * rng.normal(size=(8, 60)))).any()


def test_float32_and_float64_agree_under_jit(x64):
    rng = np.random.default_rng(3)
    rows, mixing = _low_rank(rng)
    vectors = rng.normal(size=(7, 40))
    run = jax.jit(lambda m, v: subspace.residuals(subspace.column_space(m, noise=1e-5), v))
    double = run(jnp.asarray(rows @ mixing), jnp.asarray(vectors))
    single = run(jnp.asarray(rows @ mixing, jnp.float32), jnp.asarray(vectors, jnp.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, double, atol=1e-5)


def test_noise_alone_has_no_dimension():
    matrix = 0.1 * jax.random.normal(jax.random.key(0), (20, 30))
    space = subspace.column_space(matrix, noise=0.1)
    assert int(space.rank) == 0
    assert jnp.allclose(subspace.residuals(space, jnp.eye(20)), 1)


def test_a_full_space_contains_everything():
    space = subspace.column_space(jnp.eye(4), noise=1e-6)
    assert subspace.contains(space, jnp.ones((1, 4)))[0]
    assert subspace.false_alarm(0.0, 4, 4) == 1


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"miss must be in \(0, 1\), got 1.5"):
        subspace.column_space(jnp.eye(2), noise=0.1, miss=1.5)
    with pytest.raises(ValueError, match="noise must not be negative, got -1"):
        subspace.column_space(jnp.eye(2), noise=-1.0)
    with pytest.raises(ValueError, match=r"residual must be in \[0, 1\], got 2"):
        subspace.false_alarm(2.0, 3, 1)
    with pytest.raises(ValueError, match="rank must be an integer from 0 to 3, got 4"):
        subspace.false_alarm(0.5, 3, 4)
