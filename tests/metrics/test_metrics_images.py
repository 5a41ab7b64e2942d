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
    psnr = jnp.array([10.0, 20.0, 30.0, jnp.inf, -3.0])
    assert float(metrics.success_share(psnr)) == pytest.approx(3 / 5)
    assert float(metrics.success_share(psnr, threshold=25.0)) == pytest.approx(2 / 5)
    assert float(metrics.success_share(psnr, threshold=jnp.inf)) == pytest.approx(1 / 5)
    assert jnp.isnan(metrics.success_share(psnr.at[0].set(jnp.nan)))  # NaN does not count as a failure


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


def test_truth_that_is_not_pixels_is_refused_or_scored_nan():
    truth = jnp.asarray(images(3, 8, 8, 3, seed=7))
    with pytest.raises(ValueError, match=r"truth must be pixels in \[0, 1\], got -"):
        metrics.image_scores(truth, 2 * truth - 1)
    with pytest.raises(ValueError, match=r"truth must be pixels in \[0, 1\], got nan"):
        metrics.ssim(truth, truth.at[1, 0, 0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"gallery must be pixels in \[0, 1\], got 255"):
        metrics.nearest(truth, truth.at[1, 0, 0, 0].set(255))
    # Rounding is no error: a normalised image that comes back a little too bright counts as white.
    white = jnp.ones((1, 8, 8, 3))
    assert np.isposinf(metrics.image_scores(white, white * (1 + 5e-4)).psnr)
    # In a trace the scores of that one image are NaN, and those of its neighbours are not.
    for broken in (jnp.nan, 1.5, -jnp.inf):
        scores = jitted_scores(truth, truth.at[1, 0, 0, 0].set(broken))
        for values in (scores.psnr, scores.mse, scores.ssim):
            np.testing.assert_array_equal(np.isnan(values), [False, True, False])
        np.testing.assert_array_equal(scores.assignment, [0, 1, 2])


def test_integers_and_other_shapes_are_refused_by_name():
    """The functions are called without the type checker of the tests, which would refuse the arrays first."""
    truth, bytes_ = jnp.asarray(images(2, 8, 8, 1)), jnp.full((2, 8, 8, 1), 7, jnp.uint8)
    scores, ssim, rank, nearest = (
        inspect.unwrap(fn) for fn in (metrics.image_scores, metrics.ssim, metrics.retrieval_rank, metrics.nearest)
    )
    divide = r"must be pixels in \[0, 1\] of a floating type, got uint8: divide by 255"
    for fn in (scores, ssim):
        with pytest.raises(ValueError, match=f"truth {divide}"):
            fn(truth, bytes_)
        with pytest.raises(ValueError, match=f"reconstructed {divide}"):
            fn(bytes_, truth)
        with pytest.raises(ValueError, match=r"truth must be images of shape \(b, h, w, c\), .* got \(2, 8, 8\)"):
            fn(truth[..., 0], truth[..., 0])
        with pytest.raises(ValueError, match=r"truth must be images of shape .*, at least one, got \(0, 8, 8, 1\)"):
            fn(truth[:0], truth[:0])
        with pytest.raises(ValueError, match=r"reconstructed must have the shape \(2, 8, 8, 1\) of truth, got \(1, "):
            fn(truth[:1], truth)
    with pytest.raises(ValueError, match=f"gallery {divide}"):
        rank(truth[0], bytes_, 0)
    with pytest.raises(ValueError, match=f"reconstructed {divide}"):
        rank(bytes_[0], truth, 0)
    for fn, one in ((rank, truth[0, :1, :1]), (nearest, truth[:, :1, :1])):
        arguments = (0,) if fn is rank else ()
        with pytest.raises(ValueError, match=r"gallery must hold images of the shape \(1, 1, 1\) of"):
            fn(one, truth, *arguments)
    with pytest.raises(ValueError, match=r"gallery must be images .*, at least one, got \(0, 8, 8, 1\)"):
        nearest(truth, truth[:0])


@pytest.mark.parametrize("index", [3, -1, 1.0, True, np.int64(7)])
def test_a_place_outside_of_the_gallery_is_refused(index):
    gallery = jnp.asarray(images(3, 4, 4, 1))
    with pytest.raises(ValueError, match=f"index must be an integer from 0 to 2, got .*{index}"):
        inspect.unwrap(metrics.retrieval_rank)(gallery[0], gallery, index)


def test_ranks_in_a_trace_are_nan_where_there_is_none():
    gallery = jnp.asarray(images(3, 4, 4, 1))
    ranks = jax.jit(jax.vmap(metrics.retrieval_rank, (None, None, 0)))
    np.testing.assert_array_equal(
        ranks(gallery[1], gallery, jnp.arange(-1, 4)) == 1, [False, False, True, False, False]
    )
    found = ranks(gallery[1], gallery, jnp.arange(-1, 4))
    np.testing.assert_array_equal(np.isnan(found), [True, False, False, False, True])
    assert np.isnan(ranks(gallery[1], gallery.at[2].mul(300), jnp.arange(3))).all()
    guesses = jax.jit(metrics.nearest)(gallery.at[0].set(2), gallery.at[2].set(jnp.nan))
    assert np.isnan(guesses[0]).all()
    np.testing.assert_array_equal(guesses[1], gallery[1])
    np.testing.assert_array_equal(np.isfinite(guesses[2]), True)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_scores_of_half_precision_are_those_of_its_values(dtype):
    truth = jnp.asarray(images(2, 64, 64, 3, seed=8), dtype)
    found = jnp.asarray(noisy(np.asarray(truth, np.float32), 0.01), dtype)
    scores = metrics.image_scores(found, truth)
    wide = metrics.image_scores(found.astype(jnp.float32), truth.astype(jnp.float32))
    for half, full in zip(scores, wide, strict=True):
        assert half.dtype == full.dtype
        np.testing.assert_array_equal(half, full)
    np.testing.assert_array_equal(metrics.ssim(found, truth), wide.ssim)
    # Squared distances of 12,288 entries are beyond float16's largest number, and all infinite ones are equal.
    gallery = jnp.stack([jnp.zeros((300, 300, 3)), jnp.full((300, 300, 3), 0.1)]).astype(dtype)
    bright = jnp.ones((300, 300, 3), dtype)
    assert float(metrics.retrieval_rank(bright, gallery, 0)) == 2
    np.testing.assert_array_equal(metrics.nearest(bright[None], gallery)[0], gallery[1])
    assert metrics.nearest(bright[None], gallery).dtype == dtype


def test_costs_are_not_held_all_at_once():
    """For 256 images of 28x28 all differences together would take 0.2 GB, and three times that while computed."""
    one = jax.ShapeDtypeStruct((256, 28, 28, 1), jnp.float32)
    largest = max(
        value.aval.size
        for equation in jax.make_jaxpr(metrics.image_scores)(one, one).eqns
        for value in equation.outvars
    )
    assert largest <= 4 * 256 * 28 * 28


def test_thresholds_and_scores_that_are_none_are_named():
    share = inspect.unwrap(metrics.success_share)
    with pytest.raises(ValueError, match="threshold must be a number, got nan"):
        share(jnp.ones(3), threshold=jnp.nan)
    with pytest.raises(ValueError, match=r"threshold must be one number, got the shape \(3,\)"):
        share(jnp.ones(3), threshold=jnp.ones(3))
    for shape in ((0,), (2, 3), ()):
        with pytest.raises(ValueError, match=r"psnr must have shape \(n,\) with n > 0, got"):
            share(jnp.ones(shape))
