"""The federated SGD client, its per-example form and its loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gia_jax import Batch, ThreatModel, observe
from gia_jax.clients import (
    binary_cross_entropy,
    cross_entropy,
    federated_averaging,
    federated_sgd,
    per_example,
    squared_error,
    vertical_sgd,
)
from gia_jax.defenses import dp_sgd


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
    with pytest.raises(ValueError, match=r"labels of shape \(2, 2\) must be probabilities, got int32"):
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


def linear_fn(params, inputs):
    return inputs @ params


LINEAR, INPUTS = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)), jnp.float32), jnp.ones((4, 2))
CLIENTS = {
    "federated_sgd": federated_sgd,
    "per_example": per_example,
    "federated_averaging": lambda loss_fn: federated_averaging(loss_fn, learning_rate=0.1, minibatch_size=2),
    "dp_sgd": lambda loss_fn: dp_sgd(loss_fn, jax.random.key(0), norm=1.0, noise_multiplier=0.0),
    "vertical_sgd": lambda loss_fn: vertical_sgd(loss_fn, np.array([[0, 1], [2, 3]])),
}


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("label", [25, -1])
def test_a_label_that_is_no_class_is_refused_or_makes_the_update_nan(name, label):
    client_fn = CLIENTS[name](cross_entropy(linear_fn))
    batch = Batch(INPUTS, jnp.array([0, 2, label, 1]))
    with pytest.raises(ValueError, match=rf"^batch\.labels must be at least 0 and below 3, got {label}\b"):
        client_fn(LINEAR, batch)
    traced = np.asarray(jax.jit(client_fn)(LINEAR, batch))
    bad = {"per_example": 2, "vertical_sgd": 1}.get(name)  # the one row of several that the label is in
    assert np.isnan(traced if bad is None else traced[bad]).all()
    if bad is not None:
        assert np.isfinite(traced[0]).all()


def test_observe_shows_no_finite_update_of_a_label_that_is_no_class():
    batch, key = Batch(INPUTS, jnp.array([0, 2, 3, 1])), jax.random.key(0)
    client_fn = federated_sgd(cross_entropy(linear_fn))
    with pytest.raises(ValueError, match="below 3, got 3"):
        observe(key, ThreatModel(), client_fn, LINEAR, batch)
    with pytest.raises(ValueError, match="update must be finite, got nan"):
        observe(key, ThreatModel(), jax.jit(client_fn), LINEAR, batch)
    good = batch._replace(labels=jnp.array([0, 2, 2, 1]))
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), batch, good)
    lanes = jax.vmap(lambda own: observe(key, ThreatModel(), client_fn, LINEAR, own))(batches).update
    assert np.isnan(lanes[0]).all()
    np.testing.assert_allclose(lanes[1], jax.grad(cross_entropy(linear_fn))(LINEAR, good), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("loss", "labels", "message"),
    [
        (cross_entropy, jnp.zeros(3, jnp.int32), r"must have shape \(4,\) or \(4, 3\), got \(3,\)"),
        (cross_entropy, jnp.zeros((4, 1), jnp.int32), r"of shape \(4, 1\) must be probabilities, got int32"),
        (cross_entropy, jnp.zeros((4, 1)), r"must have 3 columns, got 1"),
        (cross_entropy, jnp.zeros(4), r"of shape \(4,\) must be integers, got float32"),
        (cross_entropy, jnp.full((4, 3), 0.5), r"must add up to at most 1 in each row, got 1\.5"),
        (squared_error, jnp.zeros((4, 1)), r"must have the outputs' shape \(4, 3\), got \(4, 1\)"),
        (squared_error, jnp.zeros(3), r"must have the outputs' shape \(4, 3\), got \(3,\)"),
        (squared_error, jnp.zeros((4, 3), bool), r"must be real numbers, got bool"),
    ],
)
def test_nothing_is_broadcast(loss, labels, message):
    with pytest.raises(ValueError, match=f"^batch.labels {message}"):
        federated_sgd(loss(linear_fn))(LINEAR, Batch(INPUTS, labels))


def test_binary_labels_are_zero_or_one():
    loss_fn = binary_cross_entropy(lambda params, inputs: inputs @ params[:, :1])
    for labels, message in (
        (jnp.array([0, 1, 2, 0]), "must be at least 0 and below 2, got 2"),
        (jnp.array([0, 1, -1, 0]), "must be at least 0 and below 2, got -1"),
        (jnp.zeros((4, 1), jnp.int32), r"must have shape \(4,\), got \(4, 1\)"),
        (jnp.zeros(4), r"of shape \(4,\) must be integers, got float32"),
    ):
        with pytest.raises(ValueError, match=f"batch.labels {message}"):
            federated_sgd(loss_fn)(LINEAR, Batch(INPUTS, labels))
    traced = jax.jit(federated_sgd(loss_fn))(LINEAR, Batch(INPUTS, jnp.array([0, 1, 2, 0])))
    assert np.isnan(traced[:, 0]).all()


def test_squared_error_in_closed_form():
    labels = jnp.arange(12).reshape(4, 3) - 5
    batch = Batch(INPUTS, labels)
    outputs = np.asarray(INPUTS @ LINEAR, np.float64)
    np.testing.assert_allclose(squared_error(linear_fn)(LINEAR, batch), np.mean((outputs - labels) ** 2), rtol=1e-5)


def test_labels_of_many_places_in_closed_form():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    labels = jax.random.randint(jax.random.key(1), (2, 5, 4), 0, 3)
    loss_fn = cross_entropy(lambda params, inputs: params * inputs)
    expected = -np.mean(np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(labels)[..., None], -1))
    for target in (labels, jax.nn.one_hot(labels, 3)):
        np.testing.assert_allclose(loss_fn(1.0, Batch(logits, target)), expected, rtol=1e-5)


def test_losses_of_half_precision_are_computed_in_float32():
    """The mean of 4,096 losses of 60,000 overflows in half precision, as does a square of 300."""
    outputs, labels = jnp.tile(jnp.array([[0, 60_000]], jnp.float16), (4096, 1)), jnp.zeros(4096, jnp.int32)
    for loss, batch, expected in (
        (cross_entropy, Batch(outputs, labels), 60_000),
        (binary_cross_entropy, Batch(outputs[:, 1:], labels), 60_000),
        (squared_error, Batch(outputs[:, 1:] / 200, jnp.zeros((4096, 1), jnp.float16)), 300**2),
    ):
        value = loss(lambda _, inputs: inputs)(None, batch)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, rtol=1e-2)


@pytest.mark.parametrize("loss", [cross_entropy, binary_cross_entropy, squared_error])
def test_a_list_of_labels_is_refused_by_name(loss):
    client_fn = federated_sgd(loss(lambda params, inputs: inputs @ params))
    batch = Batch(jnp.ones((1, 2)), [1])
    for run in (client_fn, jax.jit(client_fn)):
        with pytest.raises(ValueError, match=r"batch\.labels must be an array, got a list of 1: jnp\.asarray"):
            run(jnp.zeros((2, 1)), batch)
