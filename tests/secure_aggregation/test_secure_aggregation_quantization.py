import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gia_jax.secure_aggregation import Quantizer

P31 = 2**31 - 1


@settings(deadline=None, max_examples=200)
@given(bits=st.integers(2, 31), clients=st.integers(1, 2000), modulus=st.sampled_from([2**32, P31, 4293918721, 97]))
def test_a_quantizer_exists_if_and_only_if_no_sum_can_wrap(bits, clients, modulus):
    extreme = clients * (2 ** (bits - 1) - 1)
    wraps = extreme - modulus >= -extreme  # the largest sum and the smallest are then the same residue, or overlap
    if wraps:
        with pytest.raises(ValueError, match="bits must be small enough"):
            Quantizer(1.0, bits, clients, modulus)
    else:
        assert Quantizer(1.0, bits, clients, modulus).largest == 2 ** (bits - 1) - 1


@pytest.mark.parametrize(("clients", "bits"), [(100, 25), (1024, 22), (128, 25), (64, 26)])
def test_the_bound_is_the_one_of_the_specification(clients, bits):
    quantizer = Quantizer(1.0, bits, clients)
    values = jnp.ones(1)
    encoded = int(quantizer.encode(jax.random.key(0), values)[0])
    assert encoded == quantizer.largest
    assert quantizer.decode(jnp.array([clients * encoded], jnp.uint32))[0] == pytest.approx(clients)
    with pytest.raises(ValueError, match=f"sum of {2 * clients + 2} clients modulo 4294967296, got {bits}"):
        Quantizer(1.0, bits, 2 * clients + 2)


@settings(deadline=None, max_examples=25)
@given(clip=st.floats(1e-6, 1e6), bits=st.integers(2, 31), modulus=st.sampled_from([2**32, P31]))
def test_extremes_stay_in_range_in_float32(clip, bits, modulus):
    # clip * scale rounds above the largest integer for some clips: it must be clamped as an integer.
    bits = min(bits, 31 if modulus == 2**32 else 30)
    quantizer = Quantizer(clip, bits, 1, modulus)
    values = jnp.array([clip, -clip, 2 * clip, -2 * clip, 0.0], jnp.float32)
    with jax.disable_jit():
        encoded = np.asarray(quantizer.encode(jax.random.key(0), values)).astype(np.int64)
    signed = np.where(encoded > modulus // 2, encoded - modulus, encoded)
    assert np.all(np.abs(signed) <= quantizer.largest)
    assert signed[-1] == 0
    np.testing.assert_allclose(signed[:4], quantizer.largest * np.array([1, -1, 1, -1]), rtol=1e-6, atol=1)
    assert encoded.max() < modulus


@pytest.mark.parametrize("modulus", [2**32, P31])
def test_rounding_is_unbiased_where_an_offset_would_bias_it(modulus):
    quantizer = Quantizer(1.0, 24, 1, modulus)
    truth, count = 3.3e-7, 400_000
    encoded = quantizer.encode(jax.random.key(1), jnp.full(count, truth))
    decoded = np.asarray(quantizer.decode(encoded), np.float64)
    standard_error = decoded.std() / np.sqrt(count)
    assert abs(decoded.mean() - truth) < 5 * standard_error
    assert standard_error < 1e-9


def test_values_on_the_grid_are_exact_and_rounding_moves_less_than_one_step(x64):
    quantizer = Quantizer(2.0, 12, 3)
    grid = jnp.arange(-quantizer.largest, quantizer.largest + 1) / quantizer.scale
    np.testing.assert_allclose(quantizer.decode(quantizer.encode(jax.random.key(0), grid)), grid, atol=1e-12)
    values = jax.random.uniform(jax.random.key(1), (3, 1000), minval=-2, maxval=2)
    encoded = jax.vmap(quantizer.encode)(jax.random.split(jax.random.key(2), 3), values)
    total = encoded.sum(0, dtype=jnp.uint32)
    error = np.abs(quantizer.decode(total) - values.sum(0))
    assert error.max() < 3 / quantizer.scale
    assert error.std() < np.sqrt(3) / quantizer.scale / 2 * 1.1


def test_clipping_is_counted():
    assert Quantizer(1.0, 8, 1).clipped(jnp.array([0.5, -1.0, 1.5, -3.0])) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 8, 1), "clip must be positive and finite, got 0.0"),
        ((1e300, 8, 1), "clip must leave the sum and its steps in the range of float32, got 1e\\+300"),
        ((1e38, 8, 4), "clip must leave the sum and its steps in the range of float32, got 1e\\+38"),
        ((1e-39, 8, 1), "clip must leave the sum and its steps in the range of float32, got 1e-39"),
        ((float("nan"), 8, 1), "clip must be positive and finite, got nan"),
        ((1.0, 1, 1), "bits must be an integer from 2 to 31, got 1"),
        ((1.0, 32, 1), "bits must be an integer from 2 to 31, got 32"),
        ((1.0, 8, 0), "num_clients must be an integer of at least 1, got 0"),
        ((1.0, 8, 1, 2**32 + 1), "modulus must be an integer from 3 to 4294967296, got 4294967297"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Quantizer(*arguments)
