"""Objectives of an attacker that knows the defense: closed forms, and the truth is always among the best."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gia_jax import Batch, defenses, models
from gia_jax.defenses.protected import parse, protect
from gia_jax.matching import adaptive
from gia_jax.matching.objectives import cosine, euclidean, l1

KEY = jax.random.key(0)
TRUE = {"a": jax.random.normal(KEY, (40, 5)), "b": jax.random.normal(jax.random.fold_in(KEY, 1), (7,))}
OTHER = jax.tree.map(lambda leaf: jnp.roll(leaf, 1), TRUE)


def shared(transformation):
    return transformation.update(TRUE, transformation.init(TRUE))[0]


OBJECTIVES = {
    "pruned": (adaptive.pruned(), defenses.prune(0.9)),
    "pruned, global": (adaptive.pruned(euclidean), defenses.prune(0.97, scope="global")),
    "supported": (adaptive.supported(), defenses.prune(0.5)),
    "sign_hinge": (adaptive.sign_hinge(), defenses.sign()),
    "rounding_likelihood": (adaptive.rounding_likelihood(4), defenses.quantize(KEY, 4)),
    "rounding_likelihood, ternary": (adaptive.rounding_likelihood(2), defenses.ternary(KEY)),
    "relative euclidean": (adaptive.relative(euclidean), defenses.gaussian_noise(KEY, 0.1)),
    "rescaled": (adaptive.rescaled(adaptive.relative(l1)), defenses.laplace_noise(KEY, 0.1)),
    "relative l1": (adaptive.relative(l1), defenses.laplace_noise(KEY, 0.1)),
}
EVERY = pytest.mark.parametrize(("objective_fn", "transformation"), OBJECTIVES.values(), ids=OBJECTIVES)


@EVERY
def test_the_truth_is_nearer_than_another_update(objective_fn, transformation):
    observed = shared(transformation)
    assert float(objective_fn(TRUE, observed)) < float(objective_fn(OTHER, observed))


@EVERY
def test_derivatives_are_right_and_finite_where_nothing_is_shared(objective_fn, transformation):
    with jax.enable_x64(True):
        wide, other = (jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree) for tree in (TRUE, OTHER))
        observed = transformation.update(wide, transformation.init(wide))[0]
        jax.test_util.check_grads(
            lambda g: objective_fn(jax.tree.map(jnp.asarray, g), observed), (other,), order=1, modes=["rev"], rtol=1e-3
        )
        for tree in (wide, optax.tree.zeros_like(wide)):
            gradient = jax.grad(objective_fn)(tree, optax.tree.zeros_like(wide))
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_pruned_counts_only_what_is_larger_than_a_zero_allows():
    observed = {"a": jnp.array([3.0, 0.0, 0.0, -2.0])}
    simulated = {"a": jnp.array([3.0, 1.5, -4.0, -2.0])}
    # On the support it agrees; 1.5 is below the threshold 2, and 4 is above it by 2.
    assert adaptive.pruned(euclidean, weight=1.0)(simulated, observed) == pytest.approx(2.0**2 / 13)
    assert adaptive.pruned(euclidean, weight=0.0)(simulated, observed) == 0
    assert adaptive.pruned(weight=0.0)(simulated, observed) == pytest.approx(0, abs=1e-6)


def test_a_tensor_without_an_entry_takes_the_threshold_of_the_whole_update():
    observed = {"a": jnp.array([3.0, 2.0]), "b": jnp.zeros(2)}
    simulated = {"a": jnp.array([3.0, 2.0]), "b": jnp.array([1.0, 2.5])}
    assert adaptive.pruned(euclidean)(simulated, observed) == pytest.approx(0.5**2 / 13)


def test_a_threshold_that_the_truth_keeps_costs_nothing():
    for scope in ("tensor", "global"):
        observed = shared(defenses.prune(0.8, scope=scope))
        assert adaptive.pruned(euclidean)(TRUE, observed) == 0


def test_signs_cost_by_their_margin_and_zeros_by_what_is_there():
    observed = {"a": jnp.array([2.0, -2.0, 0.0]), "b": jnp.array([-3.0])}
    # In units of the tensor's mean: right by 1, wrong by 1, not 0 by 1; right by 1.
    simulated = {"a": jnp.array([5.0, 5.0, -5.0]), "b": jnp.array([-0.1])}
    assert adaptive.sign_hinge(margin=0.5)(simulated, observed) == pytest.approx((0 + 1.5 + 1 + 0) / 4)
    assert adaptive.sign_hinge(margin=1.5, zero_weight=0.0)(simulated, observed) == pytest.approx((0.5 + 2.5 + 0.5) / 3)
    # The scales of tensors are not what it is after.
    longer = {"a": 7 * simulated["a"], "b": simulated["b"]}
    assert adaptive.sign_hinge()(longer, observed) == pytest.approx(adaptive.sign_hinge()(simulated, observed))


def test_signs_of_a_tensor_that_is_zero_or_nearly_are_wrong():
    observed = shared(defenses.sign())
    for size in (0.0, 1e-30, 1e-20, 1e-14):
        simulated = TRUE | {"a": size * TRUE["a"]}
        loss, gradient = jax.value_and_grad(adaptive.sign_hinge())(simulated, observed)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        assert (loss < 0.01) == (size > 1e-15)
    assert adaptive.sign_hinge()(optax.tree.zeros_like(TRUE), observed) == 1


def test_rounding_is_a_likelihood():
    """The frequencies of stochastic rounding are the probabilities the objective takes."""
    bits, value = 3, {"a": jnp.array([1.0, 0.4])}  # levels of 1 / 3
    keys = jax.random.split(KEY, 4_000)
    drawn = jax.vmap(lambda key: shared_of(defenses.quantize(key, bits), value)["a"][1])(keys)
    for level, times in ((1 / 3, np.mean(np.isclose(drawn, 1 / 3))), (2 / 3, np.mean(np.isclose(drawn, 2 / 3)))):
        nats = 2 * adaptive.rounding_likelihood(bits)(value, {"a": jnp.array([1.0, level])})
        assert np.exp(-nats) == pytest.approx(times, abs=0.03)
    far = adaptive.rounding_likelihood(bits)({"a": jnp.array([1.0, -9.0])}, {"a": jnp.array([1.0, 1 / 3])})
    assert np.isfinite(far)
    assert far > 100


def shared_of(transformation, update):
    return transformation.update(update, transformation.init(update))[0]


def test_relative_is_one_at_nothing():
    observed = shared(defenses.gaussian_noise(KEY, 0.1))
    assert adaptive.relative(euclidean)(optax.tree.zeros_like(TRUE), observed) == pytest.approx(1, rel=1e-6)
    expected = euclidean(TRUE, observed) / euclidean(optax.tree.zeros_like(TRUE), observed)
    assert adaptive.relative(euclidean)(TRUE, observed) == pytest.approx(float(expected), rel=1e-5)


def test_a_rescaled_objective_takes_updates_of_one_length_on_the_support():
    observed = {"a": jnp.array([3.0, 0.0, -4.0])}
    for length in (1e-3, 1.0, 1e3):
        simulated = {"a": length * jnp.array([4.0, 2.0, -3.0])}
        assert adaptive.rescaled(euclidean)(simulated, observed) == pytest.approx(1 + 4 + 1, rel=1e-5)
    assert adaptive.rescaled(euclidean)({"a": jnp.zeros(3)}, observed) == pytest.approx(25)


def test_parameters_of_the_defense_are_read_from_the_update():
    assert adaptive.estimated_norm(shared(defenses.clip(0.5))) == pytest.approx(0.5, rel=1e-5)
    sparsity = adaptive.estimated_sparsity(shared(defenses.prune(0.9)))
    assert (float(sparsity["a"]), float(sparsity["b"])) == (pytest.approx(0.9), pytest.approx(6 / 7))
    kernel = jnp.ones((4, 3)).at[2].set(0)
    assert adaptive.zeroed_features(kernel).tolist() == [False, False, True, False]


def test_clipping_alone_changes_nothing_for_the_cosine_attack():
    """At 100 random images of LeNet, to 1e-6: the objective, and its gradient in the image."""
    with jax.enable_x64(True):
        module = models.LeNet((8, 8, 1), 4, rngs=nnx.Rngs(0))
        plain, clipped = (protect(parts, module, num_classes=4) for parts in ((), parse("clip:norm=0.01")))
        images, label = jax.random.normal(KEY, (101, 1, 8, 8, 1), jnp.float64), jnp.array([2])

        def objectives(protected):
            params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), protected.params)
            sent = protected.client_fn(KEY)(params, Batch(images[0], label))

            def objective(image):
                return protected.adapt_fn(cosine)(protected.assumed_fn(params, Batch(image, label)), sent)

            return sent, *jax.jit(jax.vmap(jax.value_and_grad(objective)))(images[1:])

        whole, values, slopes = objectives(plain)
        short, clipped_values, clipped_slopes = objectives(clipped)
        assert optax.tree.norm(whole) > 10 * optax.tree.norm(short)  # it does clip
        np.testing.assert_allclose(clipped_values, values, rtol=1e-6)
        sizes = jnp.linalg.norm(slopes.reshape(100, -1), axis=1)
        assert (jnp.linalg.norm((slopes - clipped_slopes).reshape(100, -1), axis=1) <= 1e-6 * sizes).all()


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"weight must not be negative, got -1\.0"):
        adaptive.pruned(weight=-1.0)
    with pytest.raises(ValueError, match=r"margin must be positive, got 0\.0"):
        adaptive.sign_hinge(margin=0.0)
    with pytest.raises(ValueError, match=r"zero_weight must not be negative, got -1\.0"):
        adaptive.sign_hinge(zero_weight=-1.0)
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 16, got 1"):
        adaptive.rounding_likelihood(1)
