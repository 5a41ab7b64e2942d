"""Image metrics against scikit-image, under permutations, and on reconstructions that failed."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from gia_jax import metrics

jitted_scores = jax.jit(metrics.image_scores)


def images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def noisy(truth, scale, seed=1):
    return np.clip(truth + scale * np.random.default_rng(seed).normal(size=truth.shape), 0, 1).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_scores_are_those_of_scikit_image(channels):
    truth = images(3, 24, 20, channels)
    found = np.stack([noisy(truth[i], scale) for i, scale in enumerate((0.02, 0.1, 0.3))])
    scores = metrics.image_scores(jnp.asarray(found), jnp.asarray(truth))
    for i in range(3):
        psnr = peak_signal_noise_ratio(truth[i], found[i], data_range=1)
        # The published settings of Wang et al.: a Gaussian of deviation 1.5, biased moments.
        ssim = structural_similarity(
            truth[i],
            found[i],
            data_range=1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=-1,
        )
        np.testing.assert_allclose(scores.psnr[i], psnr, rtol=1e-4)
        np.testing.assert_allclose(scores.ssim[i], ssim, atol=1e-4)
        np.testing.assert_allclose(scores.mse[i], np.mean((truth[i] - found[i]) ** 2), rtol=1e-4)
    np.testing.assert_array_equal(scores.assignment, [0, 1, 2])


def numpy_ssim(a, b, window):
    """Structural similarity by loops over windows."""
    steps = np.arange(window) - window // 2
    weights = np.exp(-0.5 * (steps / 1.5) ** 2)
    weights = np.outer(weights, weights) / weights.sum() ** 2
    values = []
    for i, j, k in np.ndindex(a.shape[0] - window + 1, a.shape[1] - window + 1, a.shape[2]):
        x, y = (image[i : i + window, j : j + window, k].astype(np.float64) for image in (a, b))
        mean_x, mean_y = np.sum(weights * x), np.sum(weights * y)
        var_x, var_y = np.sum(weights * x**2) - mean_x**2, np.sum(weights * y**2) - mean_y**2
        covariance = np.sum(weights * x * y) - mean_x * mean_y
        top = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
        values.append(top / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)))
    return np.mean(values)


@pytest.mark.parametrize(("side", "window"), [(8, 7), (9, 9), (5, 5), (12, 11)])
def test_ssim_of_small_images_uses_the_largest_odd_window_that_fits(side, window):
    truth = images(1, side, side + 1, 2, seed=2)
    found = noisy(truth, 0.2)
    expected = numpy_ssim(found[0], truth[0], window)
    np.testing.assert_allclose(metrics.ssim(jnp.asarray(found), jnp.asarray(truth)), [expected], atol=1e-4)


def test_equal_images_have_infinite_psnr_and_ssim_one():
    truth = jnp.asarray(images(2, 8, 8, 1))
    scores = metrics.image_scores(truth, truth)
    assert np.all(np.isposinf(scores.psnr))
    np.testing.assert_allclose(scores.ssim, 1, atol=1e-5)
    np.testing.assert_array_equal(scores.mse, 0)


@settings(derandomize=True, max_examples=10, deadline=None)
@given(order=st.permutations(range(5)))
def test_assignment_recovers_a_permutation(order):
    truth = images(5, 8, 8, 1, seed=3)
    found = noisy(truth, 0.05)[np.array(order)]
    scores = jitted_scores(jnp.asarray(found), jnp.asarray(truth))
    np.testing.assert_array_equal(scores.assignment, np.argsort(order))
    unpermuted = jitted_scores(jnp.asarray(noisy(truth, 0.05)), jnp.asarray(truth))
    np.testing.assert_allclose(scores.psnr, unpermuted.psnr, rtol=1e-5)


def test_assignment_uses_every_reconstruction_once():
    # Both true images are nearest to the first reconstruction; only one of them may have it.
    truth = np.stack([np.full((4, 4, 1), 0.5), np.full((4, 4, 1), 0.6)]).astype(np.float32)
    found = np.stack([np.full((4, 4, 1), 0.58), np.full((4, 4, 1), 0.0)]).astype(np.float32)
    scores = metrics.image_scores(jnp.asarray(found), jnp.asarray(truth))
    np.testing.assert_array_equal(scores.assignment, [1, 0])  # 0.25 + 0.0004 is less than 0.0064 + 0.36
    np.testing.assert_allclose(scores.mse, [0.25, 0.0004], rtol=1e-3)


def test_pixels_outside_of_the_box_are_clipped_and_nan_is_grey():
    truth = jnp.asarray(np.stack([np.ones((4, 4, 1)), np.zeros((4, 4, 1))]), jnp.float32)
    wild = jnp.asarray(np.stack([np.full((4, 4, 1), 7.0), np.full((4, 4, 1), np.nan)]), jnp.float32)
    scores = metrics.image_scores(wild, truth)
    np.testing.assert_allclose(scores.mse, [0, 0.25], atol=1e-7)
    assert np.isfinite(scores.psnr[1])


def test_images_must_have_one_shape():
    with pytest.raises(
        ValueError, match=r"reconstructed must have the shape \(2, 4, 4, 1\) of truth, got \(1, 4, 4, 1\)"
    ):
        # Beneath the type checker of the tests, which refuses them first.
        inspect.unwrap(metrics.image_scores)(jnp.zeros((1, 4, 4, 1)), jnp.zeros((2, 4, 4, 1)))


def test_success_share():
    psnr = jnp.array([10.0, 20.0, 30.0, jnp.inf, jnp.nan])
    assert float(metrics.success_share(psnr)) == pytest.approx(3 / 5)
    assert float(metrics.success_share(psnr, threshold=25.0)) == pytest.approx(2 / 5)


def test_retrieval_rank_counts_the_nearer_images():
    gallery = jnp.asarray(images(20, 4, 4, 1, seed=4))
    for index in (0, 7):
        assert int(metrics.retrieval_rank(gallery[index], gallery, index)) == 1
        found = jnp.asarray(noisy(np.asarray(gallery[index]), 0.4))
        distances = np.sum((np.asarray(gallery) - np.asarray(found)) ** 2, (1, 2, 3))
        expected = 1 + int(np.argsort(np.argsort(distances))[index])
        assert int(metrics.retrieval_rank(found, gallery, index)) == expected
    other = int(metrics.retrieval_rank(gallery[3], gallery, 7))
    assert other > 1


def test_a_failed_reconstruction_identifies_nobody():
    gallery = jnp.asarray(images(50, 4, 4, 1, seed=5))
    for broken in (jnp.nan, jnp.inf):
        ranks = [int(metrics.retrieval_rank(jnp.full((4, 4, 1), broken), gallery, i)) for i in range(50)]
        assert sorted(ranks) == list(range(1, 51))  # chance: one constant image, the same for all


def test_nearest_is_the_closest_of_the_gallery():
    gallery = images(9, 4, 4, 2, seed=6)
    found = metrics.nearest(jnp.asarray(noisy(gallery[[4, 0, 8]], 0.1)), jnp.asarray(gallery))
    np.testing.assert_array_equal(found, gallery[[4, 0, 8]])
