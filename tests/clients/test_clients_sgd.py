"""The federated SGD client, its per-example form and its loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gia_jax import Batch
from gia_jax.clients import binary_cross_entropy, cross_entropy, federated_sgd, per_example


def apply_fn(params, x):
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.nn.sigmoid(lax.conv_general_dilated(x, params["conv"], (2, 2), "SAME", dimension_numbers=layout))
    return x.reshape(x.shape[0], -1) @ params["head"]


@pytest.fixture(scope="module")
def problem():
    """Parameters and a batch of four."""
    rng = np.random.default_rng(0)
    params = {"conv": rng.normal(size=(5, 5, 2, 4)), "head": rng.normal(size=(64, 5)) / 4}
    inputs = rng.normal(size=(4, 8, 8, 2))
    params, inputs = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, inputs))
    return params, Batch(inputs, jnp.array([3, 0, 0, 2]))


def close(found, expected, tolerance=1e-5):
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert f.shape == e.shape
        assert np.linalg.norm(f - e) <= tolerance * np.linalg.norm(e)


def test_binary_cross_entropy_in_closed_form():
    outputs = jnp.array([[-1.5], [0.3], [2.0]])
    loss_fn = binary_cross_entropy(lambda params, inputs: params * inputs)
    signs = np.array([1, -1, 1])
    loss = loss_fn(jnp.asarray(2.0), Batch(outputs, (jnp.asarray(signs) + 1) // 2))
    np.testing.assert_allclose(loss, np.mean(np.log1p(np.exp(-signs * 2 * np.asarray(outputs)[:, 0]))), rtol=1e-6)
    with pytest.raises(ValueError, match=r"outputs of shape \(b, 1\), got \(3, 2\)"):
        binary_cross_entropy(lambda params, inputs: inputs)({}, Batch(jnp.zeros((3, 2)), jnp.zeros(3, jnp.int32)))


def test_cross_entropy_in_closed_form(problem):
    params, batch = problem
    logits = np.asarray(apply_fn(params, batch.inputs), np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss_fn = cross_entropy(apply_fn)
    expected = -log_probabilities[np.arange(4), batch.labels].mean()
    np.testing.assert_allclose(loss_fn(params, batch), expected, rtol=1e-5)
    one_hot = batch._replace(labels=jax.nn.one_hot(batch.labels, 5))
    np.testing.assert_allclose(loss_fn(params, one_hot), expected, rtol=1e-5)
    uniform = batch._replace(labels=jnp.full((4, 5), 0.2))
    np.testing.assert_allclose(loss_fn(params, uniform), -log_probabilities.mean(), rtol=1e-5)


def test_integer_rows_are_no_probabilities():
    rows = jnp.array([[0, 1], [1, 0]])
    with pytest.raises(ValueError, match=r"labels must be class indices \(b,\) or probabilities \(b, c\), got int32"):
        cross_entropy(lambda params, inputs: inputs)(None, Batch(jnp.zeros((2, 2)), rows))


@pytest.mark.parametrize("lowering", ["matmul", "native", "auto"])
@pytest.mark.parametrize("soft", [False, True])
def test_federated_sgd_shares_the_gradient(problem, lowering, soft):
    params, batch = problem
    batch = batch._replace(labels=jax.nn.one_hot(batch.labels, 5) * 0.9 + 0.02) if soft else batch
    loss_fn = cross_entropy(apply_fn)
    update = jax.jit(federated_sgd(loss_fn, lowering=lowering))(params, batch)
    assert jax.tree.structure(update) == jax.tree.structure(params)
    close(update, jax.jit(jax.grad(loss_fn))(params, batch))


@pytest.mark.parametrize("soft", [False, True])
def test_per_example_rows_average_to_the_batch_gradient(problem, soft):
    params, batch = problem
    batch = batch._replace(labels=jax.nn.one_hot(batch.labels, 5)) if soft else batch
    loss_fn = cross_entropy(apply_fn)
    gradient_fn = jax.jit(jax.grad(loss_fn))
    rows = jax.jit(per_example(loss_fn))(params, batch)
    close(jax.tree.map(lambda leaf: leaf.mean(0), rows), gradient_fn(params, batch))
    for i in range(4):
        single = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)
        close(jax.tree.map(lambda leaf, i=i: leaf[i], rows), gradient_fn(params, single))


def test_per_example_rows_can_be_differentiated(problem):
    # Clipping needs the norm of every row, and an adaptive attack its derivative.
    params, batch = problem

    def norm(rows, i):
        return sum(jnp.sum(leaf[i] ** 2) for leaf in jax.tree.leaves(rows))

    def of_row(client_fn, inputs):
        return norm(client_fn(params, batch._replace(inputs=inputs)), 1)

    rows_fn = per_example(cross_entropy(apply_fn))
    found = jax.jit(jax.grad(functools.partial(of_row, rows_fn)))(batch.inputs)
    single = jax.tree.map(lambda leaf: leaf[1:2], batch)

    def plain(inputs):
        update = jax.grad(cross_entropy(apply_fn))(params, single._replace(inputs=inputs))
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(update))

    close(found[1:2], jax.jit(jax.grad(plain))(single.inputs), 1e-4)
    np.testing.assert_array_equal(found[jnp.array([0, 2, 3])], 0)
