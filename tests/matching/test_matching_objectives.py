"""Objectives against their formulas in NumPy, at the places where derivatives break, and under weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from gia_jax.matching import objectives

SHAPES = {"conv": {"bias": (4,), "kernel": (3, 4)}, "fc": {"bias": (2,), "kernel": (4, 2)}}


def tree(seed, scale=1.0):
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    generator = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(scale * generator.normal(size=shape)) for shape in leaves])


def layers(update):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(update)]


def flat(update):
    return np.concatenate([leaf.ravel() for leaf in layers(update)])


def cosine_similarity(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def numpy_tag(simulated, observed, scale, weights):
    terms = [
        np.sum((s - o) ** 2) + scale * w * np.sum(np.abs(s - o))
        for s, o, w in zip(layers(simulated), layers(observed), weights)
    ]
    return 0.5 * sum(terms)


def numpy_masked_cosine(simulated, observed, threshold):
    s, o = flat(simulated), flat(observed)
    kept = np.abs(o) > threshold
    return 1 - cosine_similarity(s[kept], o[kept])


FORMULAS = {
    "euclidean": (objectives.euclidean, lambda s, o: np.sum((flat(s) - flat(o)) ** 2)),
    "l1": (objectives.l1, lambda s, o: np.sum(np.abs(flat(s) - flat(o)))),
    "cosine": (objectives.cosine, lambda s, o: 1 - cosine_similarity(flat(s), flat(o))),
    "layerwise_cosine": (
        objectives.layerwise_cosine,
        lambda s, o: sum(1 - cosine_similarity(a.ravel(), b.ravel()) for a, b in zip(layers(s), layers(o))),
    ),
    "angular": (objectives.angular, lambda s, o: np.arccos(cosine_similarity(flat(s), flat(o))) / np.pi),
    "masked_cosine": (
        functools.partial(objectives.masked_cosine, threshold=0.3),
        functools.partial(numpy_masked_cosine, threshold=0.3),
    ),
    "tag": (objectives.tag(), functools.partial(numpy_tag, scale=0.1, weights=(1, 3 / 4, 2 / 4, 1 / 4))),
    "tag_named": (
        # The order of the network, here not the alphabet's: a layer's leaves share its weight.
        objectives.tag(scale=2.0, layers=["fc", "conv"]),
        functools.partial(numpy_tag, scale=2.0, weights=(0.5, 0.5, 1, 1)),
    ),
    "gaussian": (objectives.gaussian_likelihood(0.5), lambda s, o: np.sum((flat(s) - flat(o)) ** 2) / (2 * 0.25)),
    "laplace": (objectives.laplace_likelihood(0.5), lambda s, o: np.sum(np.abs(flat(s) - flat(o))) / 0.5),
}
COSINES = ("cosine", "layerwise_cosine", "angular", "masked_cosine")
every_objective = pytest.mark.parametrize("name", FORMULAS)


@every_objective
def test_value_is_the_formula(x64, name):
    objective_fn, formula = FORMULAS[name]
    simulated, observed = tree(0, 0.7), tree(100)
    np.testing.assert_allclose(objective_fn(simulated, observed), formula(simulated, observed), rtol=1e-12)


@every_objective
def test_gradient_is_the_finite_difference(x64, name):
    objective_fn, _ = FORMULAS[name]
    observed = tree(1)

    def value_fn(simulated):
        return objective_fn(jax.tree.map(jnp.asarray, simulated), observed)

    check_grads(jax.jit(value_fn), (tree(0),), order=1, modes=("fwd", "rev"), rtol=1e-6)


@every_objective
def test_equality_is_the_minimum(name):
    objective_fn, _ = FORMULAS[name]
    observed = tree(2)
    at_equality = objective_fn(observed, observed)
    # The angle's derivative is infinite at 0: it is clipped, at 4.7e-4 / pi in float32.
    np.testing.assert_allclose(at_equality, 0, atol=2e-4 if name == "angular" else 1e-6)
    assert objective_fn(tree(3), observed) > 0.1


@every_objective
def test_gradient_is_finite_where_it_could_break(name):
    value_and_grad = jax.jit(jax.value_and_grad(FORMULAS[name][0]))
    update, zero = tree(4), jax.tree.map(jnp.zeros_like, tree(4))
    for simulated, observed in ((zero, update), (update, update), (zero, zero), (update, zero)):
        value, gradient = value_and_grad(simulated, observed)
        assert np.isfinite(value)
        assert np.isfinite(flat(gradient)).all()


@pytest.mark.parametrize("name", COSINES)
def test_cosines_ignore_the_length_of_the_simulated_update(name):
    value_and_grad = jax.jit(jax.value_and_grad(FORMULAS[name][0]))
    simulated, observed = tree(5), tree(6)
    value, gradient = value_and_grad(simulated, observed)
    for scale in (1e-10, 1e-3, 1e6):
        value_of_scaled, gradient_of_scaled = value_and_grad(
            jax.tree.map(lambda leaf, scale=scale: scale * leaf, simulated), observed
        )
        np.testing.assert_allclose(value_of_scaled, value, rtol=1e-5)
        np.testing.assert_allclose(scale * flat(gradient_of_scaled), flat(gradient), atol=1e-5)


def test_euclidean_does_not_ignore_the_length():
    simulated, observed = tree(5), tree(6)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, simulated)
    assert abs(objectives.euclidean(doubled, observed) - objectives.euclidean(simulated, observed)) > 1


@pytest.mark.parametrize(("factor", "cosine", "angle"), [(1, 0, 0), (-1, 2, 1), (0, 1, 0.5)])
def test_cosine_and_angle_of_parallel_opposite_and_vanishing_updates(factor, cosine, angle):
    observed = tree(7)
    simulated = jax.tree.map(lambda leaf: factor * leaf, observed)
    np.testing.assert_allclose(objectives.cosine(simulated, observed), cosine, atol=1e-6)
    np.testing.assert_allclose(objectives.layerwise_cosine(simulated, observed), 4 * cosine, atol=1e-6)
    np.testing.assert_allclose(objectives.angular(simulated, observed), angle, atol=2e-4)


def test_masked_cosine_ignores_what_was_pruned():
    whole = tree(8)
    pruned = jax.tree.map(lambda leaf: jnp.where(jnp.abs(leaf) > 0.7, leaf, 0), whole)
    np.testing.assert_allclose(objectives.masked_cosine(whole, pruned), 0, atol=1e-6)
    assert objectives.cosine(whole, pruned) > 0.01


@settings(derandomize=True, max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100))
def test_residuals_squared_are_their_objective(seed, scale):
    simulated, observed = tree(seed, scale), tree(seed + 1)
    for residual_fn, objective_fn in (
        (objectives.euclidean_residuals, objectives.euclidean),
        (objectives.cosine_residuals, objectives.cosine),
    ):
        squares = np.sum(flat(residual_fn(simulated, observed)) ** 2)
        np.testing.assert_allclose(squares, objective_fn(simulated, observed), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factor", [0, 1])
def test_cosine_residuals_have_a_derivative_at_zero_and_at_equality(factor):
    observed = tree(9)
    simulated = jax.tree.map(lambda leaf: factor * leaf, observed)
    jacobian = jax.jit(jax.jacfwd(objectives.cosine_residuals))(simulated, observed)
    assert np.isfinite(flat(jacobian)).all()


def test_likelihoods_take_a_scale_for_every_entry():
    simulated, observed = tree(10), tree(11)
    scales = jax.tree.map(lambda leaf: 0.5 + jnp.abs(leaf), tree(12))
    difference = (flat(simulated) - flat(observed)) / flat(scales)
    gaussian = objectives.gaussian_likelihood(scales)(simulated, observed)
    laplace = objectives.laplace_likelihood(scales)(simulated, observed)
    np.testing.assert_allclose(gaussian, 0.5 * np.sum(difference**2), rtol=1e-5)
    np.testing.assert_allclose(laplace, np.sum(np.abs(difference)), rtol=1e-5)


@pytest.mark.parametrize("factory", [objectives.gaussian_likelihood, objectives.laplace_likelihood])
@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_likelihoods_refuse_a_scale_that_is_not_positive(factory, scale):
    with pytest.raises(ValueError, match=f"scale must be positive, got {scale}"):
        factory(scale)


def test_layer_weights():
    update = tree(13)
    np.testing.assert_allclose(jax.tree.leaves(objectives.linear_decay()(update)), [1, 3 / 4, 2 / 4, 1 / 4])
    np.testing.assert_allclose(jax.tree.leaves(objectives.exponential_decay()(update)), np.exp([0.0, -1, -2, -3]))
    named = objectives.exponential_decay(["fc", "conv"])(update)
    np.testing.assert_allclose(jax.tree.leaves(named), np.exp([-1.0, -1, 0, 0]))
    # Keys that the update has not got still take a place, so that layers can be left out of an update.
    sparse = objectives.linear_decay(["conv", "pool", "fc", "head"])(update)
    np.testing.assert_allclose(jax.tree.leaves(sparse), [1, 1, 0.5, 0.5])


def test_largest_keeps_the_layers_of_the_largest_norm():
    update = {"a": jnp.full(4, 3.0), "b": jnp.full(100, 0.1), "c": jnp.full(9, -4.0), "d": jnp.zeros(2)}
    assert [float(weight) for weight in jax.tree.leaves(objectives.largest(2)(update))] == [1, 0, 1, 0]
    assert [float(weight) for weight in jax.tree.leaves(objectives.largest(4)(update))] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="count must be at most the number of layers 4, got 5"):
        objectives.largest(5)(update)
    with pytest.raises(ValueError, match="count must be an integer of at least 1, got 0"):
        objectives.largest(0)


def test_weighted_squares_and_inner_products_count_weight_times():
    simulated, observed = tree(14), tree(15)
    weights = np.array([1, 3 / 4, 2 / 4, 1 / 4])
    euclidean = objectives.weighted(objectives.euclidean, objectives.linear_decay())(simulated, observed)
    by_layer = [np.sum((s - o) ** 2) for s, o in zip(layers(simulated), layers(observed))]
    np.testing.assert_allclose(euclidean, weights @ by_layer, rtol=1e-5)

    cosine = objectives.weighted(objectives.cosine, objectives.linear_decay())(simulated, observed)
    products = {
        (a, b): weights @ [np.sum(x * y) for x, y in zip(layers(a_), layers(b_))]
        for a, a_ in (("s", simulated), ("o", observed))
        for b, b_ in (("s", simulated), ("o", observed))
    }
    expected = 1 - products["s", "o"] / np.sqrt(products["s", "s"] * products["o", "o"])
    np.testing.assert_allclose(cosine, expected, rtol=1e-5)


def test_weighted_by_the_largest_drops_the_other_layers():
    simulated, observed = tree(16), tree(17)
    observed["fc"]["kernel"] = 100 * observed["fc"]["kernel"]
    only = objectives.weighted(objectives.euclidean, objectives.largest(1))(simulated, observed)
    expected = np.sum((layers(simulated)[3] - layers(observed)[3]) ** 2)
    np.testing.assert_allclose(only, expected, rtol=1e-5)


def test_selected_layers_alone_count():
    simulated, observed = tree(18), tree(19)
    biases = objectives.selected(objectives.euclidean, lambda path: path.endswith("['bias']"))
    expected = sum(np.sum((layers(simulated)[i] - layers(observed)[i]) ** 2) for i in (0, 2))
    np.testing.assert_allclose(biases(simulated, observed), expected, rtol=1e-5)
    gradient = jax.grad(biases)(simulated, observed)
    assert not np.any(gradient["conv"]["kernel"])
    assert np.any(gradient["conv"]["bias"])


def test_refusals_name_what_is_wrong():
    update = tree(20)
    with pytest.raises(ValueError, match="keep_fn must keep at least one layer, got none of 4"):
        objectives.selected(objectives.euclidean, lambda path: "head" in path)(update, update)
    with pytest.raises(ValueError, match="'fc' is not in"):
        objectives.linear_decay(["conv"])(update)
    with pytest.raises(ValueError, match=r"scale must not be negative, got -0\.1"):
        objectives.tag(scale=-0.1)


def test_layerwise_euclidean_is_the_sum_of_distances_with_a_derivative_at_the_truth():
    a, b = {"x": jnp.array([3.0, 0.0]), "y": jnp.array([[1.0]])}, {"x": jnp.array([0.0, 4.0]), "y": jnp.array([[-1.0]])}
    assert float(objectives.layerwise_euclidean(a, b)) == pytest.approx(5 + 2)
    slope = jax.grad(objectives.layerwise_euclidean)(a, a)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(slope))


def test_a_nan_is_not_taken_for_a_pruned_entry() -> None:
    observed = {"a": jnp.full(3, jnp.nan)}
    assert np.isnan(objectives.masked_cosine({"a": jnp.ones(3)}, observed))
