"""PRECODE against its equations, and what its noise does to gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats

from gia_jax import Batch, clients, models
from gia_jax.defenses import precode

LENET = models.LeNet((8, 8, 3), 4, rngs=nnx.Rngs(0))
FEATURES, BODY = models.functional(models.headless(LENET))
BATCH = Batch(jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([1, 3]))
MODEL = precode(jax.random.key(1), FEATURES, BODY, num_features=48, num_classes=4, size=5, weight=0.1)


def test_headless_ends_before_the_last_layer_and_leaves_the_module_alone():
    apply_fn, params = models.functional(LENET)
    logits = FEATURES(BODY, BATCH.inputs) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(logits, apply_fn(params, BATCH.inputs), rtol=1e-6)
    assert "head" not in BODY
    with pytest.raises(ValueError, match="name must be a layer of LeNet, got 'tail'"):
        models.headless(LENET, "tail")


def test_the_loss_is_that_of_the_paper():
    params, key = MODEL.params, jax.random.key(2)
    hidden = np.asarray(FEATURES(params["features"], BATCH.inputs), np.float64)
    encoded = hidden @ np.asarray(params["encoder"]["kernel"]) + np.asarray(params["encoder"]["bias"])
    mean, deviation = encoded[:, :5], np.logaddexp(0, encoded[:, 5:] - 5)
    code = mean + deviation * np.asarray(jax.random.normal(key, (2, 5)))
    decoded = code @ np.asarray(params["decoder"]["kernel"]) + np.asarray(params["decoder"]["bias"])
    logits = decoded @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    cross_entropy = -np.mean((logits - np.logaddexp.reduce(logits, 1, keepdims=True))[[0, 1], [1, 3]])
    # The divergence of every entry by numerical integration.
    z = np.linspace(-12, 12, 200_001)
    divergence = 0.0
    for m, s in zip(mean.ravel(), deviation.ravel()):
        density = stats.norm(m, s)
        grid = m + s * z
        divergence += np.trapezoid(density.pdf(grid) * (density.logpdf(grid) - stats.norm.logpdf(grid)), grid)
    expected = cross_entropy + 0.1 * divergence / 2
    assert MODEL.loss_fn(key)(params, BATCH) == pytest.approx(expected, rel=1e-4)


def test_without_a_key_it_is_the_mean_code():
    logits = MODEL.apply_fn(MODEL.params, BATCH.inputs)
    plain = optax.losses.softmax_cross_entropy_with_integer_labels(logits, BATCH.labels).mean()
    without = precode(jax.random.key(1), FEATURES, BODY, num_features=48, num_classes=4, size=5, weight=0.0)
    assert without.loss_fn(None)(MODEL.params, BATCH) == pytest.approx(float(plain), rel=1e-6)


def test_clients_share_different_gradients_of_one_image_and_a_key_repeats():
    def share(key):
        return clients.federated_sgd(MODEL.loss_fn(key))(MODEL.params, BATCH)

    keys = jax.random.split(jax.random.key(3), 2)
    together = jax.vmap(share)(keys)
    first = jax.tree.leaves(jax.tree.map(lambda leaf: leaf[0], together))
    second = jax.tree.leaves(jax.tree.map(lambda leaf: leaf[1], together))
    again = jax.tree.leaves(share(keys[0]))
    for a, b, c in zip(first, second, again):
        np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-6)
        assert not np.allclose(a, b, rtol=1e-4, atol=1e-8)


def test_each_example_of_a_batch_has_its_own_noise_and_a_loss_mapped_over_examples_has_one():
    """Of one image twice: one noise for all cancels in differences, which is why `protect` refuses it."""
    twice = Batch(jnp.repeat(BATCH.inputs[:1], 2, 0), jnp.repeat(BATCH.labels[:1], 2))
    key = jax.random.key(2)

    def slope(inputs):
        return MODEL.loss_fn(key)(MODEL.params, twice._replace(inputs=inputs))

    together = jax.grad(slope)(twice.inputs)
    assert not np.allclose(together[0], together[1], rtol=1e-3, atol=1e-8)
    mapped = clients.per_example(MODEL.loss_fn(key))(MODEL.params, twice)
    for leaf in jax.tree.leaves(mapped):
        np.testing.assert_allclose(leaf[0], leaf[1], rtol=1e-4, atol=1e-7)


def test_it_trains():
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(carry, key):
        params, state = carry
        loss, gradient = jax.value_and_grad(MODEL.loss_fn(key))(params, BATCH)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), loss

    carry = (MODEL.params, optimizer.init(MODEL.params))
    (params, _), losses = jax.lax.scan(step, carry, jax.random.split(jax.random.key(4), 100))
    assert losses[-1] < 0.5 * losses[0]
    assert (MODEL.apply_fn(params, BATCH.inputs).argmax(1) == BATCH.labels).all()


@pytest.mark.parametrize(("name", "value"), [("size", 0), ("num_features", 0), ("num_classes", -1)])
def test_a_bad_size_is_named(name, value):
    options = {"num_features": 48, "num_classes": 4, name: value}
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {value}"):
        precode(jax.random.key(0), FEATURES, BODY, **options)


def test_a_negative_weight_is_named():
    with pytest.raises(ValueError, match=r"weight must not be negative, got -1\.0"):
        precode(jax.random.key(0), FEATURES, BODY, num_features=48, num_classes=4, weight=-1.0)
