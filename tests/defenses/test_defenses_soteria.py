"""Soteria against a hand-written loop over features, and what it does to dead ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gia_jax import Batch, clients, labels, models
from gia_jax.defenses import kept_features, live_share_pruned, soteria
from gia_jax.matching.objectives import masked_cosine

HEAD = labels.dense("head")
LENET = models.functional(models.LeNet((8, 8, 3), 4, rngs=nnx.Rngs(0)))
MLP = models.functional(models.MLP((8, 8, 3), 4, hidden=(48,), activation=jax.nn.sigmoid, rngs=nnx.Rngs(0)))
IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
BATCH = Batch(IMAGES, jnp.array([1, 3]))


def two_layers(key, *, dead=()):
    """x -> relu(x W + b) -> head, the units `dead` far below zero."""
    first, last = jax.random.split(key)
    bias = jnp.zeros(6).at[jnp.asarray(dead, int)].set(-100.0)
    params = {
        "first": {"kernel": jax.random.normal(first, (5, 6)), "bias": bias},
        "head": {"kernel": jax.random.normal(last, (6, 3)), "bias": jnp.zeros(3)},
    }
    return params


def apply_fn(params, inputs):
    hidden = jax.nn.relu(inputs @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def by_hand(params, inputs):
    """Closed form: feature i of an example has the derivative W[:, i] where it is positive."""
    kernel, bias = np.asarray(params["first"]["kernel"]), np.asarray(params["first"]["bias"])
    features = np.maximum(np.asarray(inputs) @ kernel + bias, 0)
    lengths = np.linalg.norm(kernel, axis=0) * (features > 0)
    return (lengths / (np.abs(features) + 0.1)).sum(0)


@pytest.mark.parametrize(("ratio", "number"), [(0.0, 3), (0.4, 3), (0.5, 1), (0.5, 3), (0.5, 70), (0.9, 3)])
def test_the_features_of_least_score_lose_their_row_and_nothing_else_changes(ratio, number):
    params, inputs = two_layers(jax.random.key(0)), jax.random.normal(jax.random.key(1), (number, 5))
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    batch = Batch(inputs, jnp.arange(number) % 3)
    plain, shared = client_fn(params, batch), soteria(client_fn, apply_fn, HEAD, ratio=ratio)(params, batch)
    gone = np.argsort(by_hand(params, inputs))[: int(ratio * 6)]
    expected = np.asarray(plain["head"]["kernel"]).copy()
    expected[gone] = 0
    np.testing.assert_array_equal(shared["head"]["kernel"], expected)
    np.testing.assert_array_equal(shared["head"]["bias"], plain["head"]["bias"])
    jax.tree.map(np.testing.assert_array_equal, shared["first"], plain["first"])


def test_scores_of_a_convolutional_net_are_those_of_its_jacobian():
    model_fn, params = LENET

    def features(example):
        x = example[None]
        for name, stride in (("conv1", 2), ("conv2", 2), ("conv3", 1)):
            dimensions = ("NHWC", "HWIO", "NHWC")
            kernel, bias = params[name]["kernel"], params[name]["bias"]
            x = jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(2, 2)] * 2, dimension_numbers=dimensions)
            x = jax.nn.sigmoid(x + bias)
        return x.reshape(-1)

    jacobians = jax.vmap(jax.jacrev(features))(IMAGES)
    lengths = np.linalg.norm(np.asarray(jacobians).reshape(2, -1, 8 * 8 * 3), axis=-1)
    scores = (lengths / (np.abs(jax.vmap(features)(IMAGES)) + 0.1)).sum(0)
    kept = kept_features(model_fn, HEAD, params, IMAGES, ratio=0.25)
    order = np.argsort(scores)
    assert set(np.flatnonzero(~np.asarray(kept))) == set(order[: len(order) // 4])


def test_random_directions_estimate_the_scores():
    """The length of one row from m directions has a relative standard error of sqrt(1 / 2m)."""
    kernel = jnp.diag(jnp.array([1.0, 1.1, 1.2, 0.5, 2.0, 0.0]))[:5]
    params = two_layers(jax.random.key(0)) | {"first": {"kernel": kernel, "bias": jnp.ones(6)}}
    # Scores .92, 1.00, 1.09, .45, 1.82 and, without a derivative, 0: the nearest are 8 % apart, seven standard errors.
    inputs = jnp.zeros((1, 5)).at[0, 0].set(-0.01)
    for ratio in (0.2, 0.4, 0.6, 0.9):
        exact, estimated = (
            kept_features(apply_fn, HEAD, params, inputs, ratio=ratio, num_probes=m) for m in (0, 8_192)
        )
        np.testing.assert_array_equal(estimated, exact)
    model_fn, weights = LENET
    exact, few, many = (kept_features(model_fn, HEAD, weights, IMAGES, ratio=0.5, num_probes=m) for m in (0, 8, 512))
    assert jnp.sum(few) == jnp.sum(many) == jnp.sum(exact)
    assert jnp.mean(few == exact) < jnp.mean(many == exact)
    assert jnp.mean(many == exact) > 0.9


def test_memory_does_not_grow_with_the_batch():
    model_fn, params = LENET

    def temporary(number):
        inputs = jnp.zeros((number, 8, 8, 3))
        program = jax.jit(lambda p, x: kept_features(model_fn, HEAD, p, x, ratio=0.5)).lower(params, inputs)
        return program.compile().memory_analysis().temp_size_in_bytes

    assert temporary(256) < 2 * temporary(1)


def test_dead_features_go_first_and_live_ones_are_counted():
    params, inputs = two_layers(jax.random.key(0), dead=(1, 4)), jnp.ones((1, 5))
    dead = np.flatnonzero(by_hand(params, inputs) == 0)
    assert {1, 4} <= set(dead)
    kept = kept_features(apply_fn, HEAD, params, inputs, ratio=0.34)  # two of six
    assert np.flatnonzero(~np.asarray(kept)).tolist() == dead[-2:].tolist()  # the first of equal ones stay
    assert live_share_pruned(apply_fn, HEAD, params, inputs, ratio=0.34) == 0
    most = live_share_pruned(apply_fn, HEAD, params, inputs, ratio=0.9)  # five of six
    live = 6 - len(dead)
    assert most == pytest.approx((5 - len(dead)) / live)


def test_jit_and_vmap_keep_the_update():
    model_fn, params = MLP
    client_fn = soteria(clients.federated_sgd(clients.cross_entropy(model_fn)), model_fn, HEAD, ratio=0.5)
    batches = Batch(IMAGES[:, None], BATCH.labels[:, None])
    together = jax.jit(jax.vmap(client_fn, (None, 0)))(params, batches)
    for i in range(2):
        alone = client_fn(params, jax.tree.map(lambda leaf, i=i: leaf[i], batches))
        one = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, alone)


def test_masked_matching_is_blind_to_what_soteria_hides():
    """At the truth the masked objective is 0, although half of the last layer is missing."""
    model_fn, params = MLP
    plain = clients.federated_sgd(clients.cross_entropy(model_fn))
    shared = soteria(plain, model_fn, HEAD, ratio=0.5)(params, BATCH)
    assert masked_cosine(plain(params, BATCH), shared, threshold=0.0) == pytest.approx(0, abs=1e-5)
    hidden = jnp.all(HEAD(shared).kernel == 0, axis=1)
    assert jnp.sum(hidden) == len(hidden) // 2


def test_a_kernel_that_is_no_leaf_of_the_update_is_refused():
    """Masking an array of its own would leave the update undefended."""
    model_fn, params = MLP

    def turned(tree):
        return HEAD(tree)._replace(kernel=HEAD(tree).kernel.T.T)

    client_fn = soteria(clients.federated_sgd(clients.cross_entropy(model_fn)), model_fn, turned, ratio=0.5)
    with pytest.raises(ValueError, match=r"classifier_fn must pick a leaf of the update as the kernel"):
        client_fn(params, BATCH)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_bad_ratio_is_named(ratio):
    with pytest.raises(ValueError, match=f"ratio must be in \\[0, 1\\), got {ratio}"):
        soteria(lambda params, batch: params, apply_fn, HEAD, ratio=ratio)


def test_a_bad_number_of_directions_is_named():
    with pytest.raises(ValueError, match="num_probes must be an integer of at least 0, got -1"):
        soteria(lambda params, batch: params, apply_fn, HEAD, ratio=0.5, num_probes=-1)
