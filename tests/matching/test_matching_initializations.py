"""Initialisations: what the draw looks like, which key it depends on, and that only the granted shape is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax import Observation
from gia_jax.matching import initializations

SHAPE = (2, 10, 9, 3)
DRAWN = {
    "normal": initializations.normal,
    "near_grey": initializations.near_grey,
    "truncated_normal": initializations.truncated_normal,
    "uniform": initializations.uniform,
    "patterned": initializations.patterned,
}
FIXED = {"constant": initializations.constant}


def observed(shape=SHAPE, dtype=jnp.float32):
    params = {"head": jnp.zeros(3, dtype)}
    return Observation(params, params, {} if shape is None else {"inputs_like": jnp.zeros(shape, dtype)})


@pytest.mark.parametrize("name", [*DRAWN, *FIXED])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_shape_and_dtype_are_the_granted_ones(x64, name, dtype):
    inputs = {**DRAWN, **FIXED}[name]()(jax.random.key(0), observed(dtype=dtype))
    assert inputs.shape == SHAPE
    assert inputs.dtype == dtype


@pytest.mark.parametrize("name", [*DRAWN, *FIXED])
def test_a_guessed_shape_needs_no_grant_and_has_the_parameters_dtype(x64, name):
    init_fn = {**DRAWN, **FIXED}[name](shape=(4, 6, 6, 1))
    inputs = init_fn(jax.random.key(0), observed(shape=None, dtype=jnp.float64))
    assert inputs.shape == (4, 6, 6, 1)
    assert inputs.dtype == jnp.float64
    # The guess also stands where the true shape is granted.
    assert init_fn(jax.random.key(0), observed()).shape == (4, 6, 6, 1)


@pytest.mark.parametrize("name", [*DRAWN, *FIXED])
def test_a_missing_grant_is_named(name):
    with pytest.raises(ValueError, match=r"does not grant 'inputs_like'; observation\.extra has nothing"):
        {**DRAWN, **FIXED}[name]()(jax.random.key(0), observed(shape=None))


@pytest.mark.parametrize("name", DRAWN)
def test_the_key_decides_the_draw(name):
    init_fn = DRAWN[name]()
    one, again, other = (np.asarray(init_fn(jax.random.key(seed), observed())) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.mean(one != other) > 0.5
    assert np.mean(one[0] != one[1]) > 0.5  # the images of a batch start apart


@pytest.mark.parametrize("init_fn", [initializations.constant(0.5), initializations.given(jnp.ones(SHAPE))])
def test_fixed_starts_ignore_the_key(init_fn):
    np.testing.assert_array_equal(*(init_fn(jax.random.key(seed), observed()) for seed in (0, 1)))


def test_restarts_under_vmap_start_apart():
    lanes = jax.vmap(initializations.normal(), in_axes=(0, None))(jax.random.split(jax.random.key(0), 3), observed())
    assert len({float(lane.sum()) for lane in lanes}) == 3


@pytest.mark.parametrize(("scale", "mean"), [(1.0, 0.0), (0.2, 3.0)])
def test_normal_has_its_moments(scale, mean):
    inputs = initializations.normal(scale=scale, mean=mean, shape=(1, 200, 200, 1))(jax.random.key(0), observed())
    # Five standard errors of 40,000 draws.
    assert np.mean(inputs) == pytest.approx(mean, abs=5 * scale / 200)
    assert np.std(inputs) == pytest.approx(scale, rel=5 / 282)


def test_normal_of_scale_zero_is_its_mean():
    assert np.all(initializations.normal(scale=0.0, mean=2.0)(jax.random.key(0), observed()) == 2)


def test_ranges():
    key, many = jax.random.key(1), observed((1, 100, 100, 1))
    uniform = np.asarray(initializations.uniform(low=-2.0, high=0.5)(key, many))
    assert -2 <= uniform.min() < -1.99
    assert 0.49 < uniform.max() < 0.5
    truncated = np.asarray(initializations.truncated_normal(scale=1.0, limit=0.3)(key, many))
    assert (truncated.min(), truncated.max()) == pytest.approx((-0.3, 0.3))
    assert np.mean(np.abs(truncated) < 0.3) > 0.1  # what is within the limit stays
    grey = np.asarray(initializations.near_grey()(key, many))
    assert np.std(grey) == pytest.approx(0.1, rel=0.05)


def test_constant_takes_one_value_a_channel():
    inputs = initializations.constant((0.1, 0.2, 0.3))(jax.random.key(0), observed())
    np.testing.assert_allclose(np.asarray(inputs).reshape(-1, 3).T, np.tile([[0.1], [0.2], [0.3]], 180))
    with pytest.raises(ValueError, match=r"one a channel, 3, got shape \(2,\)"):
        initializations.constant((0.1, 0.2))(jax.random.key(0), observed())


@pytest.mark.parametrize("size", [1, 4, 16])
def test_patterns_repeat_over_each_image(size):
    inputs = np.asarray(initializations.patterned(size)(jax.random.key(0), observed()))
    rows, columns = (np.arange(n) % size for n in SHAPE[1:3])
    np.testing.assert_array_equal(inputs, inputs[:, rows][:, :, columns])
    square = inputs[:, :size, :size]
    assert np.unique(square).size == square.size


def test_patterns_need_images():
    with pytest.raises(ValueError, match=r"patterned needs images of shape \(b, h, w, c\), got \(2, 5\)"):
        initializations.patterned()(jax.random.key(0), observed((2, 5)))


def test_given_inputs_must_fit_the_grant():
    inputs = jax.random.normal(jax.random.key(2), SHAPE)
    np.testing.assert_array_equal(initializations.given(inputs)(jax.random.key(0), observed()), inputs)
    np.testing.assert_array_equal(initializations.given(inputs)(jax.random.key(0), observed(shape=None)), inputs)
    with pytest.raises(ValueError, match=r"granted shape \(1, 10, 9, 3\), got \(2, 10, 9, 3\)"):
        initializations.given(inputs)(jax.random.key(0), observed((1, 10, 9, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: initializations.normal(scale=-1.0), r"scale must not be negative, got -1\.0"),
        (lambda: initializations.truncated_normal(limit=-1.0), r"limit must not be negative, got -1\.0"),
        (lambda: initializations.uniform(low=1.0, high=1.0), r"low must be below high=1\.0, got 1\.0"),
        (lambda: initializations.patterned(0), "size must be an integer of at least 1, got 0"),
        (lambda: initializations.patterned(scale=-2.0), r"scale must not be negative, got -2\.0"),
    ],
)
def test_refusals_name_argument_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
