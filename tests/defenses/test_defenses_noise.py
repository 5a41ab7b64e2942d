"""Noise of the stated distribution; quantisers without bias."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from gia_jax.defenses import clip, gaussian_noise, laplace_noise, quantize, sign, ternary


def shared(transformation, update):
    return transformation.update(update, transformation.init(update))[0]


@pytest.mark.parametrize(
    ("make", "law"), [(gaussian_noise, stats.norm(scale=0.3)), (laplace_noise, stats.laplace(scale=0.3))]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_noise_has_the_stated_law(make, law, dtype):
    noise = shared(make(jax.random.key(0), 0.3), {"w": jnp.zeros(20_000, dtype)})["w"].astype(jnp.float32)
    assert np.abs(noise).max() > 3.5 * 0.3
    assert abs(np.mean(noise)) < 4 * law.std() / np.sqrt(20_000)
    # Rounding to half precision makes steps of 2^-8; a finer law cannot be told.
    noise = np.asarray(noise) * np.random.default_rng(0).uniform(1 - 2**-9, 1 + 2**-9, 20_000)
    assert stats.kstest(np.asarray(noise), law.cdf).pvalue > 1e-3
    # A case it must refuse: twice the scale.
    assert stats.kstest(2 * np.asarray(noise), law.cdf).pvalue < 1e-6


@pytest.mark.parametrize("make", [gaussian_noise, laplace_noise])
def test_noise_of_scale_zero_is_none(make):
    update = jnp.arange(5.0)
    np.testing.assert_array_equal(shared(make(jax.random.key(0), 0.0), update), update)


@pytest.mark.parametrize("make", [gaussian_noise, laplace_noise])
def test_a_negative_scale_is_named(make):
    with pytest.raises(ValueError, match=r"scale must not be negative, got -1\.0"):
        make(jax.random.key(0), -1.0)


def test_noise_keeps_the_type_for_any_kind_of_scale():
    for scale in (np.float64(0.1), jnp.float32(0.1), 0.1):
        noisy = shared(gaussian_noise(jax.random.key(0), scale), jnp.zeros(3, jnp.bfloat16))
        assert noisy.dtype == jnp.bfloat16


def test_an_infinite_scale_is_named():
    with pytest.raises(ValueError, match="scale must be finite, got inf"):
        gaussian_noise(jax.random.key(0), float("inf"))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_stochastic_rounding_is_unbiased(bits):
    values = jax.random.normal(jax.random.key(0), (40,))
    keys = jax.random.split(jax.random.key(1), 4_000)
    drawn = np.asarray(jax.vmap(lambda key: shared(quantize(key, bits), values))(keys), np.float64)
    true = np.asarray(values, np.float64)
    spread = drawn.std(0) / np.sqrt(len(keys))
    varies = spread > 1e-6
    assert varies.sum() >= 39
    assert np.abs((drawn.mean(0) - true)[~varies]).max() < 1e-5

    def pooled(drawn, direction):
        """One z for all entries together: they are drawn independently."""
        error = direction * (drawn.mean(0) - true)
        return error[varies].sum() / np.sqrt(np.sum(spread[varies] ** 2))

    # Away from 0, and upwards.
    for direction in (np.sign(true), np.ones_like(true)):
        assert abs(pooled(drawn, direction)) < 4
    # Cases it must refuse: rounding to nearest, values that shrink by a thirtieth, and a shift.
    step = np.abs(values).max() / (2 ** (bits - 1) - 1)
    biased = np.round(np.asarray(values) / step) * step - np.asarray(values)
    assert np.sum(biased**2) > 20 * np.sum((drawn.mean(0) - true) ** 2)
    assert pooled(0.97 * drawn, np.sign(true)) < -4
    assert pooled(drawn + 0.03 * np.abs(true).max(), np.ones_like(true)) > 4


@pytest.mark.parametrize("bits", [2, 3, 5, 16])
def test_levels_are_as_many_as_the_bits_hold(bits):
    values = jax.random.normal(jax.random.key(0), (5_000,))
    drawn = np.asarray(shared(quantize(jax.random.key(1), bits), values), np.float64)
    unit = np.abs(np.asarray(values)).max() / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(drawn / unit, np.round(drawn / unit), atol=2e-2)
    assert np.abs(np.round(drawn / unit)).max() <= 2 ** (bits - 1) - 1
    # Not further than one level from what it stands for.
    assert np.abs(drawn - np.asarray(values)).max() <= unit * (1 + 1e-5)


def test_rounding_of_tiny_and_of_no_values():
    tiny = jnp.array([1e-35, 0.0, 5e-36, -2e-36])
    drawn = np.asarray(shared(quantize(jax.random.key(0), 16), tiny))
    np.testing.assert_allclose(drawn, tiny, rtol=1e-3)
    np.testing.assert_array_equal(shared(quantize(jax.random.key(0), 4), jnp.zeros(3)), 0)


def test_the_derivative_of_rounding_is_the_identity_and_that_of_signs_is_of_their_scale():
    values = jnp.array([0.3, -1.0, 0.7])
    through = jax.jacobian(lambda v: shared(quantize(jax.random.key(0), 3), v))(values)
    np.testing.assert_array_equal(through, np.eye(3))
    through = jax.jacobian(lambda v: shared(sign(), v))(values)
    np.testing.assert_allclose(through, np.outer([1, -1, 1], [1, -1, 1]) / 3, rtol=1e-6)


def test_ternary_is_two_bits():
    values, key = jax.random.normal(jax.random.key(0), (50,)), jax.random.key(1)
    np.testing.assert_array_equal(shared(ternary(key), values), shared(quantize(key, 2), values))
    largest = np.abs(values).max()
    assert set(np.unique(np.asarray(shared(ternary(key), values)) / largest)) <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("bits", [1, 0, 17])
def test_bits_that_are_not_a_width_are_named(bits):
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 16, got"):
        quantize(jax.random.key(0), bits)


def test_signs_keep_the_mean_magnitude():
    np.testing.assert_allclose(shared(sign(), jnp.array([1.0, -2.0, 0.0, 5.0])), [2, -2, 0, 2])


def test_clipping_bounds_the_norm_and_leaves_short_updates():
    update = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    np.testing.assert_allclose(jax.tree.leaves(shared(clip(1.0), update)), [[0.6], [0.8]], rtol=1e-6)
    np.testing.assert_allclose(jax.tree.leaves(shared(clip(6.0), update)), [[3.0], [4.0]])


def test_clipping_is_optax_where_they_overlap():
    update = {"a": jax.random.normal(jax.random.key(0), (5,)), "b": jax.random.normal(jax.random.key(1), (2, 3))}
    for norm in (0.5, 100.0):
        theirs = shared(optax.clip_by_global_norm(norm), update)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), shared(clip(norm), update), theirs)


def test_clipping_by_a_huge_norm_changes_nothing():
    np.testing.assert_array_equal(shared(clip(1e20), jnp.arange(3.0)), jnp.arange(3.0))
    half = jnp.arange(3.0).astype(jnp.float16)
    np.testing.assert_array_equal(shared(clip(300.0), half), half)


@pytest.mark.parametrize(("norm", "must"), [(0.0, "positive"), (-1.0, "positive"), (float("inf"), "finite")])
def test_clipping_by_no_length_is_named(norm, must):
    with pytest.raises(ValueError, match=f"norm must be {must}, got {norm}"):
        clip(norm)
