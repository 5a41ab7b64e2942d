"""MixUp undone by least squares: closed forms, what fails, and the error that noise leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax.decoding import decode_mixup, mixing_matrix, noise_gain, predicted_psnr
from gia_jax.defenses import mix
from gia_jax.defenses.mixing import Mixing


def epochs(seed, count, size, k):
    """Drawn by NumPy, which compiles nothing: rows with themselves and k - 1 others."""
    rng = np.random.default_rng(seed)
    others = [
        [[i, *rng.permutation(np.delete(np.arange(size), i))[: k - 1]] for i in range(size)] for _ in range(count)
    ]
    coefficients = rng.dirichlet([3.0] + [1.0] * (k - 1), (count, size))
    return Mixing(jnp.asarray(others), jnp.asarray(coefficients))


def encode(mixing, images):
    return jax.vmap(lambda one: mix(one, images))(mixing)


def test_matrix_by_hand():
    mixing = Mixing(jnp.array([[0, 2], [1, 0]]), jnp.array([[0.75, 0.25], [0.5, 0.5]]))
    np.testing.assert_array_equal(mixing_matrix(mixing, 3), [[0.75, 0, 0.25], [0.5, 0.5, 0]])


def test_matrix_times_images_are_the_encodings(x64):
    mixing, images = epochs(0, 3, 6, 3), jax.random.normal(jax.random.key(1), (6, 4, 2))
    by_matrix = jnp.einsum("mn,n...->m...", mixing_matrix(mixing, 6), images)
    np.testing.assert_allclose(by_matrix, encode(mixing, images).reshape(18, 4, 2), rtol=1e-12)


def test_exact_encodings_give_the_images(x64):
    mixing, images = epochs(0, 2, 12, 4), jax.random.normal(jax.random.key(1), (12, 4, 4, 3))
    encodings = encode(mixing, images)
    np.testing.assert_allclose(decode_mixup(mixing, encodings, 12), images, atol=1e-10)
    compiled = jax.jit(decode_mixup, static_argnums=2)(mixing, encodings, 12)
    np.testing.assert_allclose(compiled, images, atol=1e-10)


def test_two_images_by_hand(x64):
    mixing = Mixing(jnp.array([[0, 1], [1, 0]]), jnp.array([[0.75, 0.25], [0.75, 0.25]]))
    # (3 a + b) / 4 = 2.5 and (3 b + a) / 4 = 1.5.
    np.testing.assert_allclose(decode_mixup(mixing, jnp.array([[2.5], [1.5]]), 2), [[3.0], [1.0]], rtol=1e-12)


def test_gain_of_closed_forms(x64):
    assert noise_gain(2 * jnp.eye(5)) == pytest.approx(0.25)
    assert noise_gain(jnp.concatenate([jnp.eye(4)] * 3)) == pytest.approx(1 / 3)
    matrix = mixing_matrix(epochs(3, 2, 8, 3), 8)
    assert noise_gain(matrix) == pytest.approx(jnp.trace(jnp.linalg.inv(matrix.T @ matrix)) / 8)
    assert predicted_psnr(jnp.asarray(1e-4), 2 * jnp.eye(3)) == pytest.approx(40 + 20 * np.log10(2))


def test_noise_leaves_the_error_predicted(x64):
    mixing, images = epochs(0, 3, 20, 4), jax.random.uniform(jax.random.key(1), (20, 1_000))
    noise = 0.01 * jax.random.normal(jax.random.key(2), (3, 20, 1_000))
    decoded = decode_mixup(mixing, encode(mixing, images) + noise, 20)
    measured = -10 * jnp.log10(jnp.mean(jnp.square(decoded - images)))
    assert measured == pytest.approx(float(predicted_psnr(jnp.mean(noise**2), mixing_matrix(mixing, 20))), abs=0.3)


def test_the_result_depends_on_encodings_linearly(x64):
    mixing = epochs(0, 2, 5, 2)
    first, second = jax.random.normal(jax.random.key(1), (2, 2, 5, 3))
    both = decode_mixup(mixing, first + 2 * second, 5)
    np.testing.assert_allclose(both, decode_mixup(mixing, first, 5) + 2 * decode_mixup(mixing, second, 5), atol=1e-9)


def test_what_is_not_determined_is_named():
    repeated = jax.tree.map(lambda leaf: leaf[:, jnp.array([0, 0, 1, 2, 3, 4])], epochs(0, 1, 6, 2))
    with pytest.raises(ValueError, match="mixing must have rank num_images=6, got 5"):
        decode_mixup(repeated, jnp.ones((1, 6, 3)), 6)
    with pytest.raises(ValueError, match="encodings must be at least num_images=7, got 6"):
        decode_mixup(epochs(0, 1, 6, 2), jnp.ones((1, 6, 3)), 7)


def test_bad_input_is_named():
    mixing = epochs(0, 1, 6, 2)
    with pytest.raises(ValueError, match="below num_images=5, got 5"):
        mixing_matrix(mixing, 5)
    with pytest.raises(ValueError, match="num_images must be an integer of at least 1, got 0"):
        mixing_matrix(mixing, 0)
    with pytest.raises(ValueError, match=r"encodings must have shape \(1, 6\) \+ d like mixing, got \(6, 3\)"):
        decode_mixup(mixing, jnp.ones((6, 3)), 6)
    with pytest.raises(ValueError, match=r"mixing.sources must have shape \(m, k\) like coefficients, got \(1, 6, 2\)"):
        mixing_matrix(mixing._replace(coefficients=jnp.ones((6, 2))), 6)
    with pytest.raises(ValueError, match="encoding_mse must not be negative, got -1"):
        predicted_psnr(-1.0, jnp.eye(2))
