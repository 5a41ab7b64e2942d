"""Which encodings share an image: closed forms, a case that is separable, and one that is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax.decoding import (
    calibrated_threshold,
    mixing_matrix,
    precision_recall,
    recover_mixing,
    refine_mixing,
    same_source,
    similarity,
)
from gia_jax.defenses.mixing import Mixing


def epochs(seed, count, size, k):
    """Drawn by NumPy, which compiles nothing: rows with themselves and k - 1 others."""
    rng = np.random.default_rng(seed)
    others = [
        [[i, *rng.permutation(np.delete(np.arange(size), i))[: k - 1]] for i in range(size)] for _ in range(count)
    ]
    coefficients = rng.dirichlet([10.0] * k, (count, size))  # none near 0, which no similarity shows
    return Mixing(jnp.asarray(others), jnp.asarray(coefficients))


def made(seed, *, size, count, k, pixels):
    """White images: what natural ones are after whitening, at best."""
    rng = np.random.default_rng(seed)
    matrix = np.asarray(mixing_matrix(epochs(seed, count, size, k), size))
    encodings = matrix @ rng.standard_normal((size, pixels), np.float32)
    return jnp.asarray(encodings * rng.choice([-1, 1], encodings.shape), jnp.float32), jnp.asarray(matrix)


def test_pairs_by_hand():
    matrix = jnp.array([[0.5, 0.5, 0.0], [0.0, 0.4, 0.6], [0.3, 0.0, 0.7], [1.0, 0.0, 0.0]])
    np.testing.assert_array_equal(same_source(matrix)[:, 3], [True, False, True, True])
    truth = jnp.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    predicted = jnp.array([[0, 1, 1], [1, 0, 0], [1, 0, 0]], bool)
    assert precision_recall(predicted, truth) == (0.5, 1.0)


def test_similarity_is_the_whitened_cosine_by_hand(x64):
    encodings, public = jax.random.normal(jax.random.key(0), (4, 3)), jax.random.normal(jax.random.key(1), (50, 3))
    covariance = np.cov(np.asarray(public).T ** 2, bias=True)
    inverse = np.linalg.inv(covariance + 0.1 * np.trace(covariance) / 3 * np.eye(3))
    squares = np.asarray(encodings) ** 2 - np.mean(np.asarray(public) ** 2, 0)
    product = squares @ inverse @ squares.T
    expected = product / np.sqrt(np.outer(np.diag(product), np.diag(product)))
    np.testing.assert_allclose(similarity(encodings, public, ridge=0.1), expected, rtol=1e-10)
    np.testing.assert_allclose(jax.jit(similarity)(-encodings, public), similarity(encodings, public), rtol=1e-10)


def test_pairs_are_found_with_the_threshold_of_public_ones():
    encodings, matrix = made(0, size=8, count=8, k=2, pixels=1_000)
    public, known = made(10, size=8, count=8, k=2, pixels=1_000)
    wide, _ = made(20, size=200, count=2, k=2, pixels=1_000)
    threshold = calibrated_threshold(similarity(public, wide), same_source(known))
    precision, recall = precision_recall(similarity(encodings, wide) >= threshold, same_source(matrix))
    assert precision > 0.9
    assert recall > 0.9


def test_small_coefficients_in_few_pixels_are_not_found():
    encodings, matrix = made(0, size=30, count=4, k=6, pixels=60)
    wide, _ = made(20, size=100, count=2, k=6, pixels=60)
    values, truth = similarity(encodings, wide), same_source(matrix)
    precision, _ = precision_recall(values >= calibrated_threshold(values, truth), truth)
    assert precision < float(jnp.mean(truth)) + 0.1  # hardly above guessing, even with the victim's own threshold


def test_threshold_of_perfect_similarities():
    truth = same_source(jnp.eye(3)[jnp.array([0, 0, 1, 1, 2])])
    threshold = calibrated_threshold(truth.astype(jnp.float32), truth)
    np.testing.assert_array_equal(truth >= threshold, truth)


def test_clusters_are_the_mixing_up_to_order():
    _, matrix = made(0, size=6, count=10, k=2, pixels=10)
    values = jnp.square(matrix) @ jnp.square(matrix).T
    run = jax.jit(lambda key, v: recover_mixing(key, v, 6, k=2))
    mixing = run(jax.random.key(1), values)
    np.testing.assert_array_equal(same_source(mixing_matrix(mixing, 6)), same_source(matrix))
    found = mixing_matrix(mixing, 6)
    order = jnp.argmax(found.T @ matrix, 0)
    np.testing.assert_allclose(found[:, order], matrix, atol=0.02)


def test_a_mixing_with_errors_is_corrected():
    encodings, matrix = made(0, size=6, count=6, k=2, pixels=300)
    coefficients, sources = jax.lax.top_k(matrix, 2)
    wrong = Mixing(sources.at[::6].set((sources[::6] + 1) % 6), jnp.full_like(coefficients, 0.5))
    assert not (same_source(mixing_matrix(wrong, 6)) == same_source(matrix)).all()
    refined = refine_mixing(jax.random.key(1), wrong, encodings, 6, num_rounds=2, num_pixels=100)
    np.testing.assert_array_equal(same_source(mixing_matrix(refined, 6)), same_source(matrix))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"public must have shape .* like encodings, got \(5, 4\)"):
        similarity(jnp.ones((2, 3)), jnp.ones((5, 4)))
    with pytest.raises(ValueError, match="public must have at least 2 encodings, got 1"):
        similarity(jnp.ones((2, 3)), jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="ridge must be positive, got 0"):
        similarity(jnp.ones((2, 3)), jnp.ones((5, 3)), ridge=0.0)
    with pytest.raises(ValueError, match="k must be an integer from 1 to 3, got 4"):
        recover_mixing(jax.random.key(0), jnp.eye(5), 3, k=4)
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 1, got 0"):
        recover_mixing(jax.random.key(0), jnp.eye(5), 3, k=2, num_steps=0)
    mixing = Mixing(jnp.zeros((3, 1), int), jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="encodings must be 3 like mixing, got 2"):
        refine_mixing(jax.random.key(0), mixing, jnp.ones((2, 4)), 1)
    with pytest.raises(ValueError, match="num_rounds must be an integer of at least 1, got 0"):
        refine_mixing(jax.random.key(0), mixing, jnp.ones((3, 4)), 1, num_rounds=0)
    with pytest.raises(ValueError, match=r"truth must have shape \(3, 3\) like values, got \(2, 2\)"):
        calibrated_threshold(jnp.eye(3), jnp.eye(2, dtype=bool))
