"""Vertical federated learning: the joint model, its rounds, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gia_jax import Batch, ThreatModel, observe
from gia_jax.clients import cross_entropy, federated_sgd, quadrants, vertical_model, vertical_sgd

INDICES = np.array([[0, 1], [4, 2], [3, 0]])
APPLY = vertical_model(
    quadrants, lambda kernel, part: part.reshape(len(part), -1) @ kernel, lambda kernel, x: x @ kernel
)
LOSS = cross_entropy(APPLY)


@pytest.fixture(scope="module")
def problem():
    """Parameters of four workers and a server, and five records."""
    rng = np.random.default_rng(0)
    params = {"workers": [rng.normal(size=(6, 3)) for _ in range(4)], "server": rng.normal(size=(12, 5))}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    inputs = jnp.asarray(rng.normal(size=(5, 4, 6, 1)), jnp.float32)
    return params, Batch(inputs, jnp.array([3, 0, 0, 2, 4]))


def close(found, expected):
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-6)


def test_quadrants_are_the_quarters_row_by_row():
    image = np.arange(8).reshape(1, 2, 4, 1)
    assert [part.reshape(-1).tolist() for part in quadrants(image)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_the_joint_model_is_the_server_on_all_workers_outputs(problem):
    params, batch = problem
    image = np.asarray(batch.inputs)
    parts = (image[:, :2, :3], image[:, :2, 3:], image[:, 2:, :3], image[:, 2:, 3:])
    outputs = [part.reshape(5, -1) @ worker for part, worker in zip(parts, params["workers"], strict=True)]
    np.testing.assert_allclose(APPLY(params, batch.inputs), np.hstack(outputs) @ params["server"], rtol=1e-4)


@pytest.mark.parametrize("learning_rate", [0.0, 0.5])
def test_rounds_are_sgd_on_the_selected_records(problem, learning_rate):
    params, batch = problem
    rounds = jax.jit(vertical_sgd(LOSS, INDICES, learning_rate=learning_rate))(params, batch)
    gradient_fn = jax.jit(federated_sgd(LOSS))
    for t, chosen in enumerate(INDICES):
        gradient = gradient_fn(params, Batch(batch.inputs[chosen], batch.labels[chosen]))
        close(jax.tree.map(lambda leaf, t=t: leaf[t], rounds), gradient)
        params = jax.tree.map(lambda p, g: p - learning_rate * g, params, gradient)


def test_what_a_defense_shares_is_what_is_trained_with(problem):
    params, batch = problem

    def update_fn(update, calls, params=None):
        del params
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, calls), update), calls + 1

    count = optax.GradientTransformation(lambda params: jnp.zeros(()), update_fn)
    shared = vertical_sgd(LOSS, INDICES, learning_rate=0.1, transformation=count)(params, batch)
    assert all((leaf[t] == t).all() for leaf in jax.tree.leaves(shared) for t in range(3))


def test_indices_are_granted_only_by_the_threat_model(problem):
    params, batch = problem
    client_fn = vertical_sgd(LOSS, INDICES)

    def granted(threat):
        return observe(jax.random.key(0), threat, client_fn, params, batch, batch_indices=INDICES).extra

    assert "batch_indices" not in granted(ThreatModel())
    np.testing.assert_array_equal(granted(ThreatModel(batch_indices=True))["batch_indices"], INDICES)
    assert "batch indices" in ThreatModel(batch_indices=True).describe()
    threat = ThreatModel(batch_indices=True)
    with pytest.raises(ValueError, match="batch_indices must be given where the threat model grants them"):
        observe(jax.random.key(0), threat, federated_sgd(LOSS), params, batch)
    with pytest.raises(ValueError, match=r"update must hold 2 rounds as batch_indices does, got \(3, 12, 5\) at \["):
        observe(jax.random.key(0), ThreatModel(), client_fn, params, batch, batch_indices=INDICES[:2])


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (INDICES[0], r"batch_indices must be integers of shape \(t, b\), got int64 \(2,\)"),
        (INDICES / 2, r"got float64 \(3, 2\)"),
        (INDICES[:0], r"got int64 \(0, 2\)"),
        (-INDICES, "batch_indices must be at least 0, got -4"),
    ],
)
def test_wrong_indices_are_refused_at_construction(indices, message):
    with pytest.raises(ValueError, match=message):
        vertical_sgd(LOSS, indices)


def test_wrong_arguments_are_named_with_their_value(problem):
    params, batch = problem
    with pytest.raises(ValueError, match="batch_indices must be at least 0 and below 5, got 5"):
        vertical_sgd(LOSS, INDICES + 1)(params, batch)
    with pytest.raises(ValueError, match=r"learning_rate must not be negative, got -0\.1"):
        vertical_sgd(LOSS, INDICES, learning_rate=-0.1)
    with pytest.raises(ValueError, match="images must have an even height and width, got 4 x 5"):
        quadrants(jnp.zeros((1, 4, 5, 1)))
    with pytest.raises(ValueError, match=r"params\['workers'\] must have 4 entries, got 3"):
        APPLY({**params, "workers": params["workers"][:3]}, batch.inputs)
