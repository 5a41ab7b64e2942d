"""DP-SGD against a loop over examples in float64, against optax and jax-privacy, and against its stated sensitivity."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_privacy import clipping
from scipy import stats

from gia_jax import Batch, clients, models
from gia_jax.defenses import dp_sgd

APPLY, PARAMS = models.functional(models.MLP((6,), 3, hidden=(5,), rngs=nnx.Rngs(0)))
LOSS = clients.cross_entropy(APPLY)
KEY = jax.random.key(3)


def batch_of(size, seed=0):
    inputs = 2 * jax.random.normal(jax.random.key(seed), (size, 6))
    return Batch(inputs, jnp.arange(size) % 3)


def as64(tree):
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


def by_hand(params, batch, norm):
    """Mean of clipped gradients, and how many were clipped: a loop over examples in NumPy."""
    total, clipped = None, 0
    for i in range(len(batch.labels)):
        gradient = jax.grad(LOSS)(params, Batch(batch.inputs[i : i + 1], batch.labels[i : i + 1]))
        length = np.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(gradient)))
        clipped += length > norm
        scaled = [np.asarray(leaf) * min(1.0, norm / length) for leaf in jax.tree.leaves(gradient)]
        total = scaled if total is None else [a + b for a, b in zip(total, scaled)]
    return [leaf / len(batch.labels) for leaf in total], clipped


@pytest.mark.parametrize("microbatch_size", [None, 1, np.int64(4), 8])
def test_it_is_the_loop_over_examples(microbatch_size):
    with jax.enable_x64(True):
        params, batch = as64(PARAMS), as64(batch_of(8))
        client_fn = dp_sgd(LOSS, KEY, norm=3.0, noise_multiplier=0.0, microbatch_size=microbatch_size)
        expected, clipped = by_hand(params, batch, 3.0)
        assert 0 < clipped < 8
        for got, want in zip(jax.tree.leaves(client_fn(params, batch)), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("microbatch_size", [None, 1, 4])
def test_every_example_has_its_own_draw_of_a_loss_that_draws(microbatch_size):
    def loss_of(key):
        return lambda params, batch: (1 + jax.random.normal(key)) * LOSS(params, batch)

    loss_key, batch = jax.random.key(9), batch_of(8)
    got = dp_sgd(loss_of, KEY, norm=1e3, noise_multiplier=0.0, loss_key=loss_key, microbatch_size=microbatch_size)(
        PARAMS, batch
    )
    one = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch) for i in range(8)]
    each = [jax.grad(loss_of(key))(PARAMS, own) for key, own in zip(jax.random.split(loss_key, 8), one, strict=True)]
    expected = jax.tree.map(lambda *leaves: sum(leaves) / 8, *each)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_it_is_optax_where_they_overlap():
    batch = batch_of(8)
    theirs = optax.contrib.differentially_private_aggregate(1.5, 0.0, key=jax.random.key(0))
    each = clients.per_example(LOSS)(PARAMS, batch)
    expected, _ = theirs.update(each, theirs.init(PARAMS))
    got = dp_sgd(LOSS, KEY, norm=1.5, noise_multiplier=0.0)(PARAMS, batch)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_it_is_jax_privacy_where_they_overlap(microbatch_size):
    batch = batch_of(8)
    theirs = clipping.clipped_grad(LOSS, l2_clip_norm=3.0, normalize_by=8, microbatch_size=microbatch_size)
    got = dp_sgd(LOSS, KEY, norm=3.0, noise_multiplier=0.0, microbatch_size=microbatch_size)(PARAMS, batch)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(theirs(PARAMS, batch)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)


def test_noise_is_on_the_sum_as_in_optax():
    batch, norm, multiplier = batch_of(4), 0.5, 3.0
    keys = jax.random.split(jax.random.key(0), 300)
    each = clients.per_example(LOSS)(PARAMS, batch)

    def theirs(key):
        transformation = optax.contrib.differentially_private_aggregate(norm, multiplier, key=key)
        return transformation.update(each, transformation.init(PARAMS))[0]

    quiet = dp_sgd(LOSS, KEY, norm=norm, noise_multiplier=0.0)(PARAMS, batch)
    ours = jax.vmap(lambda key: dp_sgd(LOSS, key, norm=norm, noise_multiplier=multiplier)(PARAMS, batch))(keys)
    for noisy in (ours, jax.vmap(theirs)(keys)):
        differences = jax.tree.map(lambda a, b: a - b, noisy, quiet)
        noise = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(differences)])
        assert stats.kstest(noise, stats.norm(scale=multiplier * norm / 4).cdf).pvalue > 1e-3


def test_one_example_moves_the_sum_by_no_more_than_the_norm():
    norm = 0.2
    client_fn = dp_sgd(LOSS, KEY, norm=norm, noise_multiplier=0.0)
    for seed in range(5):
        batch = batch_of(5, seed)
        fewer = Batch(batch.inputs[:4], batch.labels[:4])
        with_it, without = client_fn(PARAMS, batch), client_fn(PARAMS, fewer)
        moved = optax.tree.norm(jax.tree.map(lambda a, b: 5 * a - 4 * b, with_it, without))
        # All gradients here are longer than the norm: the bound is attained.
        np.testing.assert_allclose(moved, norm, rtol=1e-4)


def test_a_replaced_example_moves_the_sum_by_no_more_than_twice_the_norm():
    norm = 0.2
    client_fn = dp_sgd(LOSS, KEY, norm=norm, noise_multiplier=0.0)
    moved = []
    for seed in range(5):
        batch, other = batch_of(5, seed), batch_of(5, seed + 100)
        replaced = Batch(*(a.at[0].set(b[0]) for a, b in zip(batch, other, strict=True)))
        difference = jax.tree.map(lambda a, b: 5 * (a - b), client_fn(PARAMS, batch), client_fn(PARAMS, replaced))
        moved.append(float(optax.tree.norm(difference)))
    assert max(moved) <= 2 * norm * (1 + 1e-5)
    # More than an example added or removed moves it.
    assert max(moved) > norm


def test_the_whole_batch_clipped_at_once_is_another_thing():
    batch = batch_of(8)
    inside = dp_sgd(LOSS, KEY, norm=0.2, noise_multiplier=0.0)(PARAMS, batch)
    mean = clients.federated_sgd(LOSS)(PARAMS, batch)
    cosine = optax.tree.vdot(inside, mean) / optax.tree.norm(inside) / optax.tree.norm(mean)
    assert cosine < 0.999


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_an_attacker_can_differentiate_it(microbatch_size):
    with jax.enable_x64(True):
        params, batch = as64(PARAMS), as64(batch_of(4))
        client_fn = dp_sgd(LOSS, KEY, norm=3.0, noise_multiplier=0.0, microbatch_size=microbatch_size)
        each = clients.per_example(LOSS)(params, batch)

        def objective(x):
            return optax.tree.norm(client_fn(params, Batch(x, batch.labels)), squared=True)

        lengths = [optax.tree.norm(jax.tree.map(lambda leaf, i=i: leaf[i], each)) for i in range(4)]
        assert min(lengths) < 3.0 < max(lengths)
        jax.test_util.check_grads(objective, (batch.inputs,), order=1, modes=["fwd", "rev"], rtol=1e-5)


def test_clients_under_jit_and_vmap_draw_their_own_noise():
    batch, keys = batch_of(4), jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def share(key, multiplier):
        return dp_sgd(LOSS, key, norm=0.5, noise_multiplier=multiplier)(PARAMS, batch)

    both = jax.vmap(lambda key: share(key, 1.0))(keys)
    for i in range(2):
        alone = dp_sgd(LOSS, keys[i], norm=0.5, noise_multiplier=1.0)(PARAMS, batch)
        for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)
    assert not np.allclose(*jax.tree.leaves(both)[0])
    closed_over = jax.jit(dp_sgd(LOSS, keys[0], norm=0.5, noise_multiplier=1.0))(PARAMS, batch)
    np.testing.assert_allclose(jax.tree.leaves(closed_over)[0], jax.tree.leaves(both)[0][0], rtol=1e-5, atol=1e-6)


def test_mixed_precisions_are_kept():
    params = {"a": jnp.ones(6, jnp.bfloat16), "b": jnp.ones((), jnp.float32)}

    def loss_fn(params, batch):
        return jnp.sum(params["a"].astype(jnp.float32) * batch.inputs) * params["b"]

    for microbatch_size in (None, 2):
        client_fn = dp_sgd(loss_fn, KEY, norm=1.0, noise_multiplier=1.0, microbatch_size=microbatch_size)
        update = client_fn(params, batch_of(4))
        assert (update["a"].dtype, update["b"].dtype) == (jnp.bfloat16, jnp.float32)


def test_an_empty_batch_is_named():
    with pytest.raises(ValueError, match=r"batch.inputs must have shape \(b, \*d\) with b > 0, got \(0, 6\)"):
        dp_sgd(LOSS, KEY, norm=1.0, noise_multiplier=1.0)(PARAMS, batch_of(0))


def test_a_vanishing_gradient_is_no_nan():
    flat = dp_sgd(lambda params, batch: 0 * jnp.sum(params["w"] * batch.inputs), KEY, norm=1.0, noise_multiplier=0.0)
    params, batch = {"w": jnp.ones(6)}, batch_of(2)
    gradient = jax.grad(lambda x: optax.tree.norm(flat(params, Batch(x, batch.labels)), squared=True))(batch.inputs)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": 0.0, "noise_multiplier": 1.0}, "norm must be positive, got 0"),
        ({"norm": 1.0, "noise_multiplier": -1.0}, "noise_multiplier must not be negative, got -1"),
        (
            {"norm": 1.0, "noise_multiplier": 1.0, "microbatch_size": 0},
            "microbatch_size must be an integer of at least 1, got 0",
        ),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        dp_sgd(LOSS, KEY, **arguments)


def test_a_microbatch_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match="microbatch_size must divide the batch of 8, got 3"):
        dp_sgd(LOSS, KEY, norm=1.0, noise_multiplier=1.0, microbatch_size=3)(PARAMS, batch_of(8))
