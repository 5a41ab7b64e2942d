"""Priors against loops over pixels, on constant images, and the statistics of a model's own inputs."""

import itertools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from gia_jax import Batch, Observation
from gia_jax.matching import priors

NOTHING_SEEN = Observation({}, {}, {})


def batch(inputs):
    inputs = jnp.asarray(inputs, jnp.float32)
    return Batch(inputs, jnp.zeros(inputs.shape[0], jnp.int32))


def photos(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, size=shape).astype(np.float32)


def value(prior_fn, inputs):
    return float(prior_fn(batch(inputs), NOTHING_SEEN))


def gradient(prior_fn, inputs):
    return np.asarray(jax.grad(lambda x: prior_fn(batch(x), NOTHING_SEEN))(jnp.asarray(inputs, jnp.float32)))


def loop_anisotropic(images):
    b, h, w, c = images.shape
    down = [abs(images[n, i + 1, j, k] - images[n, i, j, k]) for n, i, j, k in np.ndindex(b, h - 1, w, c)]
    across = [abs(images[n, i, j + 1, k] - images[n, i, j, k]) for n, i, j, k in np.ndindex(b, h, w - 1, c)]
    return sum(np.mean(differences) for differences in (down, across) if differences)


def loop_variation(images, p, q):
    """Forward differences, none beyond the lower and right border, mean over all pixels."""
    b, h, w, c = images.shape
    total = 0.0
    for n, i, j, k in np.ndindex(b, h, w, c):
        down = abs(images[n, i + 1, j, k] - images[n, i, j, k]) if i + 1 < h else 0.0
        across = abs(images[n, i, j + 1, k] - images[n, i, j, k]) if j + 1 < w else 0.0
        total += (down**p + across**p) ** q
    return total / images.size


def opponents(images):
    red, green, blue = images[..., 0], images[..., 1], images[..., 2]
    return np.stack([red, green, blue, red - green, red - blue, green - blue], -1)


@pytest.mark.parametrize("color_opponents", [False, True])
def test_anisotropic_variation_is_the_loop(color_opponents):
    images = photos(2, 4, 5, 3)
    expected = loop_anisotropic(opponents(images) if color_opponents else images)
    assert value(priors.total_variation(color_opponents=color_opponents), images) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("p", "q"), [(2.0, 0.5), (2.0, 1.25), (1.0, 0.5), (0.5, 2.0)])
@pytest.mark.parametrize("color_opponents", [False, True])
def test_variation_with_exponents_is_the_loop(p, q, color_opponents):
    images = photos(2, 4, 5, 3, seed=1)
    prior_fn = priors.total_variation(inner_exponent=p, outer_exponent=q, color_opponents=color_opponents)
    expected = loop_variation(opponents(images) if color_opponents else images, p, q)
    assert value(prior_fn, images) == pytest.approx(expected, rel=1e-3)


def test_isotropic_variation_of_one_corner_by_hand():
    image = np.zeros((1, 2, 2, 1))
    image[0, 0, 0, 0] = 1
    # Only the upper left pixel has neighbours that differ: the root of 1 + 1, over four pixels.
    prior_fn = priors.total_variation(inner_exponent=2.0, outer_exponent=0.5)
    assert value(prior_fn, image) == pytest.approx(2**0.5 / 4, rel=1e-5)
    # Of the two differences down and the two across, one each is 1.
    assert value(priors.total_variation(), image) == pytest.approx(0.5 + 0.5)


@pytest.mark.parametrize(("p", "q"), [(1.0, 1.0), (2.0, 0.5), (2.0, 1.25), (1.0, 0.5)])
def test_constant_images_cost_nothing_and_have_a_derivative(p, q):
    grey = np.full((2, 4, 4, 3), 0.3, np.float32)
    prior_fn = priors.total_variation(inner_exponent=p, outer_exponent=q)
    assert value(prior_fn, grey) == pytest.approx(0, abs=2e-4)
    assert np.isfinite(gradient(prior_fn, grey)).all()


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (1, 1)])
def test_images_one_pixel_wide_vary_along_the_other_axis_only(shape):
    images = photos(2, *shape, 3)
    assert value(priors.total_variation(), images) == pytest.approx(loop_anisotropic(images), rel=1e-5)
    assert np.isfinite(gradient(priors.total_variation(), images)).all()


def test_variation_does_not_see_a_shift_of_brightness_but_sees_contrast():
    images = photos(1, 5, 5, 3, seed=2)
    prior_fn = priors.total_variation(inner_exponent=2.0, outer_exponent=0.5, color_opponents=True)
    assert value(prior_fn, images + 2) == pytest.approx(value(prior_fn, images), rel=1e-4)
    assert value(prior_fn, 3 * images) == pytest.approx(3 * value(prior_fn, images), rel=1e-4)


def test_color_opponents_see_a_hue_edge_that_channels_see_too_and_grey_edges_do_not_count_twice():
    grey_edge = np.zeros((1, 4, 4, 3))
    grey_edge[:, 2:] = 1
    # In a grey image the opponents are flat: six channels share the edges of three.
    plain, opposed = priors.total_variation(), priors.total_variation(color_opponents=True)
    assert value(opposed, grey_edge) == pytest.approx(0.5 * value(plain, grey_edge), rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_patch_borders_are_the_norms_of_the_slices_on_both_sides(size):
    images = photos(2, 6, 12, 3, seed=4)
    expected = [
        sum(np.linalg.norm(image[i] - image[i - 1]) for i in range(size, 6, size))
        + sum(np.linalg.norm(image[:, j] - image[:, j - 1]) for j in range(size, 12, size))
        for image in images
    ]
    assert value(priors.patch_borders(size), images) == pytest.approx(np.mean(expected), rel=1e-5)


def test_patch_borders_do_not_see_into_patches_and_find_patches_in_the_wrong_place():
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32)[:, None, None], (1, 8, 8, 1)).copy()
    prior_fn = priors.patch_borders(4)
    # One step of 1 across the middle, in 8 columns.
    assert value(prior_fn, ramp) == pytest.approx(8**0.5, rel=1e-6)
    inside = ramp.copy()
    inside[:, 1, 1] += 5
    assert value(prior_fn, inside) == pytest.approx(8**0.5, rel=1e-6)
    assert value(prior_fn, np.concatenate([ramp[:, 4:], ramp[:, :4]], 1)) > 2 * 8**0.5
    assert np.isfinite(gradient(prior_fn, np.zeros((2, 8, 8, 3)))).all()
    assert value(priors.patch_borders(8), ramp) == 0


@pytest.mark.usefixtures("x64")
def test_patch_borders_have_the_slope_of_finite_differences():
    inputs = jnp.asarray(photos(2, 4, 4, 1), float)

    def loss(x):
        return priors.patch_borders(2)(Batch(jnp.asarray(x), jnp.zeros(2)), NOTHING_SEEN)

    jax.test_util.check_grads(loss, (inputs,), 1, modes=["rev"], eps=1e-5, rtol=1e-5)


def test_patch_borders_refuse_what_they_cannot_use():
    with pytest.raises(ValueError, match="patch_size must be an integer of at least 1, got 0"):
        priors.patch_borders(0)
    with pytest.raises(ValueError, match=r"patch_size must divide the height and width \(6, 4\), got 4"):
        value(priors.patch_borders(4), photos(1, 6, 4, 1))


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
def test_norm_is_the_mean_power(exponent):
    images = photos(2, 3, 3, 1, seed=3)
    expected = np.mean(np.abs(images) ** exponent) / exponent
    assert value(priors.norm(exponent=exponent), images) == pytest.approx(expected, rel=1e-5)
    assert value(priors.norm(exponent=exponent), 0 * images) == 0
    assert np.isfinite(gradient(priors.norm(exponent=exponent), 0 * images)).all()


def test_orthogonality_is_the_sum_over_pairs():
    images = photos(4, 3, 3, 2, seed=4)
    pairs = itertools.permutations(range(4), 2)
    expected = sum(np.mean((images[i] * images[j]) ** 2) for i, j in pairs)
    assert value(priors.orthogonality, images) == pytest.approx(expected, rel=1e-5)


def test_orthogonality_of_one_image_and_of_disjoint_images_is_zero():
    assert value(priors.orthogonality, photos(1, 3, 3, 1)) == pytest.approx(0, abs=1e-7)
    disjoint = np.zeros((2, 4, 4, 1))
    disjoint[0, :2], disjoint[1, 2:] = 1, 1
    assert value(priors.orthogonality, disjoint) == 0


def statistics_of(inputs):
    """Two "layers": the inputs' channels, and their doubled squares."""
    axes = tuple(range(inputs.ndim - 1))
    return [(jnp.mean(x, axes), jnp.var(x, axes)) for x in (inputs, 2 * inputs**2)]


def test_batch_norm_statistics_are_weighted_distances():
    images, others = photos(3, 4, 4, 3, seed=5), photos(3, 4, 4, 3, seed=6)
    prior_fn = priors.batch_norm_statistics(lambda params, inputs: statistics_of(inputs), first_layer_weight=7.0)
    observation = Observation({}, {}, {"statistics": statistics_of(jnp.asarray(others))})
    expected = 0.0
    for weight, x, y in ((7, images, others), (1, 2 * images**2, 2 * others**2)):
        expected += weight * np.linalg.norm(x.mean((0, 1, 2)) - y.mean((0, 1, 2)))
        expected += weight * np.linalg.norm(x.var((0, 1, 2)) - y.var((0, 1, 2)))
    assert float(prior_fn(batch(images), observation)) == pytest.approx(expected, rel=1e-4)


def test_batch_norm_statistics_vanish_at_the_truth_with_a_derivative():
    images = photos(3, 4, 4, 3, seed=7)
    prior_fn = priors.batch_norm_statistics(lambda params, inputs: statistics_of(inputs))
    observation = Observation({}, {}, {"statistics": statistics_of(jnp.asarray(images))})
    assert float(prior_fn(batch(images), observation)) == pytest.approx(0, abs=1e-6)
    slope = jax.grad(lambda x: prior_fn(batch(x), observation))(jnp.asarray(images))
    assert np.isfinite(slope).all()


def test_batch_norm_statistics_take_the_parameters_and_any_target():
    images = photos(2, 3, 3, 2, seed=8)

    def statistics_fn(params, inputs):
        return [(params["scale"] * jnp.mean(inputs, (0, 1, 2)), jnp.zeros(2))]

    prior_fn = priors.batch_norm_statistics(
        statistics_fn, lambda observation: [(observation.extra["mine"], jnp.zeros(2))], first_layer_weight=1.0
    )
    observation = Observation({"scale": jnp.asarray(3.0)}, {}, {"mine": jnp.array([1.0, -1.0])})
    expected = np.linalg.norm(3 * images.mean((0, 1, 2)) - [1, -1])
    assert float(prior_fn(batch(images), observation)) == pytest.approx(expected, rel=1e-5)


def test_batch_norm_statistics_refuse_missing_grants_and_layers():
    prior_fn = priors.batch_norm_statistics(lambda params, inputs: statistics_of(inputs))
    with pytest.raises(ValueError, match="does not grant 'statistics'"):
        prior_fn(batch(photos(1, 2, 2, 1)), NOTHING_SEEN)
    one_layer = Observation({}, {}, {"statistics": statistics_of(jnp.zeros((1, 2, 2, 1)))[:1]})
    with pytest.raises(ValueError, match="got 1 for 2 layers"):
        prior_fn(batch(photos(1, 2, 2, 1)), one_layer)


def test_combine_adds_weighted_priors():
    images = photos(2, 4, 4, 3, seed=9)
    both = priors.combine((0.5, priors.total_variation()), (3.0, priors.norm()), (0.0, priors.orthogonality))
    expected = 0.5 * value(priors.total_variation(), images) + 3 * value(priors.norm(), images)
    assert value(both, images) == pytest.approx(expected, rel=1e-5)
    assert value(priors.combine(), images) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: priors.combine((-1.0, priors.norm())), r"weight must not be negative, got -1\.0"),
        (lambda: priors.total_variation(inner_exponent=0.0), "inner_exponent must be positive, got 0"),
        (lambda: priors.total_variation(outer_exponent=-2.0), "outer_exponent must be positive, got -2"),
        (lambda: priors.norm(exponent=0.0), "exponent must be positive, got 0"),
        (lambda: value(priors.total_variation(), photos(2, 4)), r"must be images .* got \(2, 4\)"),
        (
            lambda: value(priors.total_variation(color_opponents=True), photos(1, 4, 4, 1)),
            "color_opponents needs three channels, got 1",
        ),
        (
            lambda: priors.batch_norm_statistics(lambda params, inputs: [], first_layer_weight=-1.0),
            "first_layer_weight must not be negative, got -1",
        ),
    ],
)
def test_refusals_name_argument_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


AGGREGATES = {"mean": None, "max": lambda x: jnp.max(x, 0), "features": lambda x: jnp.sum(jnp.sin(3 * x), (0, 1))}


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0])
def test_order_invariant_equals_a_loop_over_pairs_of_epochs(aggregate, exponent):
    epochs = photos(3, 4, 5, 2)
    aggregate_fn = AGGREGATES[aggregate] or (lambda x: jnp.mean(x, 0))
    features = [np.asarray(aggregate_fn(epoch)) for epoch in epochs]
    pairs = [np.mean(np.abs(one - two) ** exponent) for one, two in itertools.product(features, repeat=2)]
    prior_fn = priors.order_invariant(3, aggregate_fn=AGGREGATES[aggregate], exponent=exponent)
    np.testing.assert_allclose(value(prior_fn, epochs.reshape(12, 5, 2)), np.mean(pairs), rtol=1e-5)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_order_invariant_knows_no_order_within_an_epoch(aggregate):
    rng, epochs = np.random.default_rng(0), photos(3, 4, 5, 2)
    prior_fn = priors.order_invariant(3, aggregate_fn=AGGREGATES[aggregate])
    shuffled = np.stack([rng.permutation(epoch) for epoch in epochs]).reshape(12, 5, 2)
    np.testing.assert_allclose(value(prior_fn, shuffled), value(prior_fn, epochs.reshape(12, 5, 2)), rtol=1e-5)
    copies = np.concatenate([rng.permutation(epochs[0]) for _ in range(3)])
    assert value(prior_fn, copies) < 1e-10
    np.testing.assert_allclose(gradient(prior_fn, copies), 0, atol=1e-6)
    assert value(prior_fn, epochs.reshape(12, 5, 2)) > 1e-2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_order_invariant_has_the_slope_of_finite_differences(exponent):
    inputs = jnp.asarray(photos(6, 3), float)
    prior_fn = priors.order_invariant(2, exponent=exponent)

    def loss(x):
        return prior_fn(Batch(jnp.asarray(x), jnp.zeros(6)), NOTHING_SEEN)

    jax.test_util.check_grads(loss, (inputs,), 1, modes=["rev"], eps=1e-5, rtol=1e-5)


def test_order_invariant_adds_the_arrays_of_a_tree():
    inputs = {"a": jnp.asarray(photos(4, 3)), "b": jnp.asarray(photos(4, 2, seed=1))}
    prior_fn = priors.order_invariant(2)
    total = prior_fn(Batch(inputs, jnp.zeros(4)), NOTHING_SEEN)
    np.testing.assert_allclose(total, value(prior_fn, inputs["a"]) + value(prior_fn, inputs["b"]), rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_order_invariant_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="num_epochs must be an integer of at least 1, got 0"):
        priors.order_invariant(0)
    with pytest.raises(ValueError, match=r"exponent must be at least 1, got 0\.5"):
        priors.order_invariant(2, exponent=0.5)
    with pytest.raises(ValueError, match="exponent must be finite, got nan"):
        priors.order_invariant(2, exponent=float("nan"))
    with pytest.raises(ValueError, match="aggregate_fn must be a function, got 'mean'"):
        priors.order_invariant(2, aggregate_fn="mean")
    with pytest.raises(ValueError, match="num_epochs must divide the batch's size 4, got 3"):
        value(priors.order_invariant(3), photos(4, 2))


def test_the_derivative_of_a_denoiser_prior_is_what_the_denoiser_removes():
    """RED: (x - D(x)) / pixels, also where D is not symmetric; its own derivative must not enter."""
    images, mixing = photos(2, 3, 2, 1), np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)

    def denoise(x):
        return jnp.einsum("ij,bjkc->bikc", mixing, x) ** 2

    removed = images - np.asarray(denoise(images))
    prior_fn = priors.denoised(denoise)
    np.testing.assert_allclose(value(prior_fn, images), np.mean(removed**2) / 2, rtol=1e-5)
    np.testing.assert_allclose(gradient(prior_fn, images), removed / images.size, rtol=1e-4, atol=1e-6)


def test_a_denoiser_prior_of_what_is_clean_already_is_nothing():
    prior_fn = priors.denoised(lambda x: jnp.clip(x, -1, 1))
    assert value(prior_fn, photos(1, 4, 4, 3)) == 0


def test_a_denoiser_that_changes_the_shape_is_refused():
    with pytest.raises(
        ValueError, match=r"denoise_fn must keep the shape of images, \(1, 4, 4, 1\), got \(1, 2, 4, 1\)"
    ):
        value(priors.denoised(lambda x: x[:, ::2]), photos(1, 4, 4, 1))
