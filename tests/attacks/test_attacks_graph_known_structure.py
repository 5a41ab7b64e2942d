"""Features of a graph whose structure is known: what the least squares find, and what they cannot."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gia_jax import Batch, Observation, Reconstruction, ThreatModel, attacks, clients, labels, models, observe, run
from gia_jax.data import pad_graphs
from gia_jax.models.graph import normalized_adjacency
from gia_jax.models.layers import symmetric_uniform

pytestmark = pytest.mark.usefixtures("x64")

THREAT = ThreatModel(inputs=("adjacency", "mask"))
# A square with a triangle on it and two arms: no exchange of nodes leaves it as it is, and A + I is regular.
REGULAR = [(0, 1), (1, 2), (2, 3), (3, 0), (2, 4), (3, 4), (4, 5), (5, 6), (0, 7), (7, 8), (8, 9)]
# A triangle whose nodes 8 and 9 have the same neighbours and are neighbours: only the sum of their features is seen.
TWINS = [(0, 1), (1, 2), (2, 3), (3, 0), (2, 4), (3, 4), (4, 5), (5, 6), (0, 7), (7, 8), (7, 9), (8, 9)]


def truth_of(edges: list[tuple[int, int]]) -> Batch:
    adjacency = np.zeros((10, 10))
    for i, j in edges:
        adjacency[i, j] = adjacency[j, i] = 1
    arrays = pad_graphs([adjacency], [np.random.default_rng(0).normal(size=(10, 3))], num_nodes=12)
    named = zip(("nodes", "adjacency", "mask"), (jnp.asarray(array, jnp.float64) for array in arrays), strict=True)
    return Batch(dict(named), jnp.array([1]))


def seen_of(activation: Any, truth: Batch) -> tuple[Any, Observation]:
    settings = {"widths": (32, 32), "activation": activation, "bias_init": symmetric_uniform(0.3)}
    apply_fn, params = models.functional(models.GCN(3, 3, **settings, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    return client_fn, observe(jax.random.key(0), THREAT, client_fn, params, truth)


def propagated(inputs: dict[str, jax.Array]) -> jax.Array:
    return normalized_adjacency(inputs["adjacency"], inputs["mask"]) @ inputs["nodes"]


def started_near(truth: Batch, deviation: float) -> Any:
    def init_fn(key: jax.Array, observation: Observation) -> jax.Array:
        del observation
        there = truth.inputs["mask"][..., None]
        return propagated(truth.inputs) + deviation * there * jax.random.normal(key, truth.inputs["nodes"].shape)

    return init_fn


def solved(client_fn: Any, seen: Observation, starts: int, **settings: Any) -> Reconstruction:
    rule = labels.bias_counts(labels.dense("head"))
    attack = attacks.graph_known_structure(client_fn, label_fn=rule, **settings)
    keys = jax.random.split(jax.random.key(1), starts)
    return jax.jit(jax.vmap(lambda key: run(attack, key, seen, num_steps=50)[0]))(keys)


def errors(found: Reconstruction, truth: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Mean squares of what is wrong with the features and with the propagated ones."""
    wrong = jax.vmap(propagated)(found.batch.inputs) - propagated(truth.inputs)
    nodes = found.batch.inputs["nodes"] - truth.inputs["nodes"]
    return tuple(np.asarray(jnp.mean(jnp.square(one), (1, 2, 3))) for one in (nodes, wrong))


def test_a_smooth_network_gives_its_features_away_from_starts_that_the_loss_tells_apart() -> None:
    truth = truth_of(REGULAR)
    client_fn, seen = seen_of(jnp.tanh, truth)
    near, far = (solved(client_fn, seen, starts=8, init_fn=start) for start in (started_near(truth, 0.1), None))
    found = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), near, far)
    nodes, wrong = errors(found, truth)
    exact = wrong < 1e-15
    assert exact[:8].sum() >= 6
    assert not exact[8:].all()
    # The attacker knows which starts these are, by the loss alone.
    np.testing.assert_array_equal(np.asarray(found.loss) < 1e-15, exact)
    assert np.all(nodes[exact] < 1e-12)
    assert np.all(np.asarray(found.batch.labels) == 1)
    np.testing.assert_array_equal(found.batch.inputs["nodes"][:, :, 10:], 0)


def test_what_a_convolution_does_not_see_stays_unknown() -> None:
    truth = truth_of(TWINS)
    found = solved(*seen_of(jnp.tanh, truth), starts=4, init_fn=started_near(truth, 0.02))
    nodes, wrong = errors(found, truth)
    assert np.median(wrong) < 1e-15
    best = int(np.argmin(found.loss))
    assert nodes[best] > 1e-3
    given, true = found.batch.inputs["nodes"][best][0], truth.inputs["nodes"][0]
    np.testing.assert_allclose(given[:8], true[:8], atol=1e-6)
    np.testing.assert_allclose(given[8] + given[9], true[8] + true[9], atol=1e-6)
    np.testing.assert_allclose(given[8], given[9], atol=1e-6)  # the shortest of all that fit


def test_kinks_stop_it_even_from_nearby() -> None:
    truth = truth_of(REGULAR)
    found = solved(*seen_of(jax.nn.relu, truth), starts=4, init_fn=started_near(truth, 0.1))
    assert np.all(errors(found, truth)[1] > 1e-8)
    assert np.all(np.asarray(found.loss) > 1e-6)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "does not grant 'inputs'"),
        (("mask",), r"does not grant the inputs' 'adjacency', got \['mask'\]"),
        (("adjacency",), r"does not grant the inputs' 'mask', got \['adjacency'\]"),
    ],
)
def test_what_is_not_granted_is_named(inputs: tuple[str, ...], message: str) -> None:
    truth = truth_of(REGULAR)
    client_fn, seen = seen_of(jnp.tanh, truth)
    seen = observe(jax.random.key(0), ThreatModel(labels=True, inputs=inputs), client_fn, seen.params, truth)
    with pytest.raises(ValueError, match=message):
        attacks.graph_known_structure(client_fn).init(jax.random.key(0), seen)


def test_inputs_that_are_no_graphs_are_named() -> None:
    truth = truth_of(REGULAR)
    client_fn, seen = seen_of(jnp.tanh, truth)
    seen = seen._replace(extra=seen.extra | {"inputs_like": {"rows": jnp.zeros((1, 3))}})
    with pytest.raises(ValueError, match=r"must be a dict of 'nodes', 'adjacency' and 'mask', got \['rows'\]"):
        attacks.graph_known_structure(client_fn).init(jax.random.key(0), seen)
