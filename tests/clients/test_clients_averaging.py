"""Federated averaging against a Python loop of SGD steps."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gia_jax import Batch
from gia_jax.clients import cross_entropy, federated_averaging, federated_sgd

RATE = 0.3
LAYOUT = ("NHWC", "HWIO", "NHWC")


def network(params, x):
    x = jax.nn.sigmoid(lax.conv_general_dilated(x, params["conv"], (2, 2), "SAME", dimension_numbers=LAYOUT))
    return x.reshape(x.shape[0], -1) @ params["head"]


@pytest.fixture
def problem(x64):
    """Loss, parameters and a batch of six in float64."""
    rng = np.random.default_rng(0)
    params = {"conv": jnp.asarray(rng.normal(size=(3, 3, 2, 4))), "head": jnp.asarray(rng.normal(size=(16, 3)))}
    batch = Batch(jnp.asarray(rng.normal(size=(6, 4, 4, 2))), jnp.array([0, 1, 2, 0, 2, 1]))
    return cross_entropy(network), params, batch


def loop(loss_fn, params, batch, orders, size):
    """The pseudo-gradient of plain SGD over the given order of the examples of every epoch."""
    current, steps, gradient_fn = params, 0, jax.jit(jax.grad(loss_fn))
    for order in orders:
        for start in range(0, len(order), size):
            index = jnp.asarray(order[start : start + size])
            gradient = gradient_fn(current, jax.tree.map(lambda leaf, index=index: leaf[index], batch))
            current, steps = jax.tree.map(lambda p, g: p - RATE * g, current, gradient), steps + 1
    return jax.tree.map(lambda before, after: (before - after) / (steps * RATE), params, current)


def close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert np.linalg.norm(f - e) <= 1e-10 * np.linalg.norm(e)


@pytest.mark.parametrize(
    ("epochs", "size", "lowering"),
    [(1, None, "matmul"), (3, None, "native"), (1, 2, "matmul"), (2, 3, "native"), (2, 1, "matmul")],
)
def test_equals_a_loop_of_steps(problem, epochs, size, lowering):
    client_fn = federated_averaging(
        problem[0], learning_rate=RATE, local_epochs=epochs, minibatch_size=size, lowering=lowering
    )
    close(jax.jit(client_fn)(*problem[1:]), loop(*problem, [range(6)] * epochs, size or 6))


def test_shuffles_anew_every_epoch(problem):
    # With batches of one the pseudo-gradient tells the orders apart: find, for each key, the one it was.
    loss_fn, params, batch = problem
    batch = jax.tree.map(lambda leaf: leaf[:3], batch)

    def update(key):
        client_fn = federated_averaging(loss_fn, learning_rate=RATE, local_epochs=2, minibatch_size=1, order_key=key)
        return client_fn(params, batch)["head"]

    permutations = jnp.array(list(itertools.permutations(range(3))))
    pairs = jnp.array(list(itertools.product(range(6), repeat=2)))
    candidate = jax.vmap(lambda pair: loop(loss_fn, params, batch, permutations[pair], 1)["head"])
    found = jax.jit(jax.vmap(update))(jax.random.split(jax.random.key(0), 10))
    distances = jnp.sum((found[:, None] - jax.jit(candidate)(pairs)) ** 2, (2, 3))
    np.testing.assert_array_equal(jnp.sum(distances < 1e-20, 1), 1)
    first, second = pairs[jnp.argmin(distances, 1)].T
    assert len(set(first.tolist())) > 1
    assert jnp.any(first != second)


def test_one_step_on_the_whole_batch_is_federated_sgd(problem):
    loss_fn, params, batch = problem
    gradient = jax.jit(federated_sgd(loss_fn))(params, batch)
    for arguments in ({"learning_rate": 1e-3}, {"learning_rate": 10.0, "order_key": jax.random.key(0)}):
        close(jax.jit(federated_averaging(loss_fn, **arguments))(params, batch), gradient)


def test_scale_and_sign_on_a_quadratic(x64):
    # For the loss w^2 / 2 every step multiplies w by 1 - rate, whatever the data.
    def loss_fn(params, batch):
        return 0.5 * jnp.sum(params["w"] ** 2) + 0 * jnp.sum(batch.inputs)

    params, batch = {"w": jnp.array([2.0, -1.0])}, Batch(jnp.ones((4, 1)), jnp.zeros(4, int))
    client_fn = federated_averaging(loss_fn, learning_rate=0.1, local_epochs=2, minibatch_size=2)
    close(jax.jit(client_fn)(params, batch), {"w": params["w"] * (1 - 0.9**4) / (4 * 0.1)})


def test_epochs_over_copies_are_one_epoch_over_all_of_them(problem):
    loss_fn, params, batch = problem
    orders = [np.random.default_rng(seed).permutation(6) for seed in range(3)]
    copies = jax.tree.map(lambda leaf: jnp.concatenate([leaf[order] for order in orders]), batch)
    client_fn = federated_averaging(loss_fn, learning_rate=RATE, minibatch_size=2)
    close(jax.jit(client_fn)(params, copies), loop(*problem, orders, 2))
    same = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 3), batch)
    client_fn, epochs_fn = (
        jax.jit(federated_averaging(loss_fn, learning_rate=RATE, minibatch_size=6, local_epochs=epochs))
        for epochs in (1, 3)
    )
    close(client_fn(params, same), epochs_fn(params, batch))


def test_a_divisor_stands_for_the_steps_and_the_rate(problem):
    loss_fn, params, batch = problem
    update, change = (
        jax.jit(federated_averaging(loss_fn, learning_rate=RATE, local_epochs=2, minibatch_size=3, divisor=divisor))
        for divisor in (None, 0.5)
    )
    expected = jax.tree.map(lambda leaf: leaf * 4 * RATE / 0.5, update(params, batch))
    close(change(params, batch), expected)


@pytest.mark.parametrize("lowering", ["matmul", "native"])
def test_gradient_through_the_local_steps(problem, lowering):
    loss_fn, params, batch = problem
    client_fn = federated_averaging(loss_fn, learning_rate=RATE, local_epochs=2, minibatch_size=3, lowering=lowering)

    def matched(client_fn, inputs):
        update = client_fn(params, batch._replace(inputs=inputs))
        return sum(jnp.sum((u - p) ** 2) for u, p in zip(jax.tree.leaves(update), jax.tree.leaves(params)))

    def plain(params, batch):
        return loop(loss_fn, params, batch, [range(6)] * 2, 3)

    found, expected = (jax.jit(jax.grad(functools.partial(matched, fn)))(batch.inputs) for fn in (client_fn, plain))
    close(found, expected)


def test_traced_learning_rate_and_keys(problem):
    loss_fn, params, batch = problem

    def update(rate, key):
        client_fn = federated_averaging(loss_fn, learning_rate=rate, minibatch_size=2, order_key=key)
        return client_fn(params, batch)

    rates, keys = jnp.array([0.1, RATE]), jax.random.split(jax.random.key(0), 2)
    lanes = jax.jit(jax.vmap(update))(rates, keys)
    for i in range(2):
        alone = jax.jit(functools.partial(update, float(rates[i])))(keys[i])
        close(jax.tree.map(lambda leaf, i=i: leaf[i], lanes), alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local_epochs": 0}, "local_epochs.*0"),
        ({"minibatch_size": 0}, "minibatch_size.*0"),
        ({"learning_rate": 0.0}, "learning_rate.*0"),
        ({"learning_rate": -0.1}, "learning_rate.*-0.1"),
        ({"learning_rate": float("nan")}, "learning_rate.*nan"),
        ({"divisor": 0.0}, "divisor.*0"),
        ({"divisor": float("inf")}, "divisor.*inf"),
        ({"minibatch_size": 4}, "minibatch_size.*6.*4"),
        ({"minibatch_size": 12}, "minibatch_size.*6.*12"),
    ],
)
def test_bad_arguments(problem, arguments, message):
    loss_fn, params, batch = problem
    with pytest.raises(ValueError, match=message):
        federated_averaging(loss_fn, **({"learning_rate": RATE} | arguments))(params, batch)
