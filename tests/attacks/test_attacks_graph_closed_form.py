"""Closed forms of graph networks' gradients: exact where they say so, and a residual where they are not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gia_jax import Batch, ThreatModel, clients, labels, models, observe
from gia_jax.attacks import graph_closed_form
from gia_jax.models.layers import symmetric_uniform

FEATURES, CLASSES = 4, 3
EDGES = [(0, 1), (1, 2), (2, 3), (3, 0), (2, 4), (3, 4)]
ADJACENCY = np.zeros((6, 6))
for i, j in EDGES:
    ADJACENCY[i, j] = ADJACENCY[j, i] = 1
NODES = np.random.default_rng(0).normal(size=(6, FEATURES)) * (np.arange(6) < 5)[:, None]
INPUTS = {"nodes": NODES[None], "adjacency": ADJACENCY[None], "mask": (np.arange(6) < 5)[None] * 1.0}


def module_of(name: str, **settings: Any) -> Any:
    settings = {"widths": (9,), "bias_init": symmetric_uniform(0.3)} | settings
    module = models.GRAPH_MODELS[name](FEATURES, CLASSES, rngs=nnx.Rngs(1), **settings)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), module)


def update_of(module: Any, inputs: dict[str, np.ndarray], targets: Any) -> Any:
    apply_fn, params = models.functional(module)
    loss = clients.node_cross_entropy if module.readout == "none" else clients.cross_entropy
    client_fn = jax.jit(clients.federated_sgd(loss(apply_fn)))
    return client_fn(params, Batch(jax.tree.map(jnp.asarray, inputs), jnp.asarray(targets)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "readout", "activation"),
    [("gcn", "mean", jax.nn.relu), ("graphsage", "mean", jnp.tanh), ("gin", "sum", jax.nn.relu)],
)
def test_the_label_and_the_pooled_features_of_one_graph_are_exact(name: str, readout: str, activation: Any) -> None:
    module = module_of(name, readout=readout, activation=activation)
    apply_fn, params = models.functional(module)
    client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
    inputs = jax.tree.map(jnp.asarray, INPUTS)
    hidden = module.embeddings(inputs)[-1][0].sum(0) / (5 if readout == "mean" else 1)
    for label in range(CLASSES):
        seen = observe(jax.random.key(0), ThreatModel(), client_fn, params, Batch(inputs, jnp.array([label])))
        assert labels.bias_counts(labels.dense("head"))(seen).tolist() == [label]
        if activation is jax.nn.relu:  # features of at least 0
            assert labels.idlg(labels.dense("head"))(seen).tolist() == [label]
        found = graph_closed_form.pooled_embedding(seen.update, labels.dense("head"))
        np.testing.assert_allclose(found.inputs, hidden, rtol=1e-12, atol=1e-13)
        assert float(found.residual) < 1e-14


@pytest.mark.usefixtures("x64")
def test_the_residual_tells_a_batch_from_one_graph() -> None:
    other = {"nodes": NODES[None, ::-1] * 2, "adjacency": ADJACENCY[None, ::-1, ::-1], "mask": INPUTS["mask"][:, ::-1]}
    both = {name: np.concatenate([INPUTS[name], other[name]]) for name in INPUTS}
    update = update_of(module_of("gcn"), both, [0, 1])
    assert float(graph_closed_form.pooled_embedding(update, labels.dense("head")).residual) > 1e-3


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("node", range(5))
def test_graphsage_gives_a_labelled_node_and_its_neighbours_away(node: int) -> None:
    targets = np.full((1, 6), -1)
    targets[0, node] = 2
    update = update_of(module_of("graphsage", readout="none"), INPUTS, targets)
    own = graph_closed_form.target_node(update, labels.dense("layer0", "self"))
    np.testing.assert_allclose(own.inputs, NODES[node], rtol=1e-12, atol=1e-12)
    others = graph_closed_form.neighbour_mean(update, "layer0")
    np.testing.assert_allclose(others.inputs, NODES[ADJACENCY[node] > 0].mean(0), rtol=1e-12, atol=1e-12)
    assert float(own.residual) < 1e-14
    assert float(others.residual) < 1e-14


@pytest.mark.usefixtures("x64")
def test_a_convolution_gives_away_a_mean_and_two_layers_a_mixture() -> None:
    targets = np.full((1, 6), -1)
    targets[0, 1] = 0
    update = update_of(module_of("gcn", readout="none"), INPUTS, targets)
    found = graph_closed_form.target_node(update, labels.dense("layer0"))
    mixing = np.asarray(models.normalized_adjacency(jnp.asarray(ADJACENCY[:5, :5])))
    np.testing.assert_allclose(found.inputs, mixing[1] @ NODES[:5], rtol=1e-12)
    two = update_of(module_of("graphsage", readout="none", widths=(9, 9)), INPUTS, targets)
    assert float(graph_closed_form.target_node(two, labels.dense("layer0", "self")).residual) > 1e-3
    alone = ADJACENCY[None] * (1 - np.eye(6)[1])[:, None] * (1 - np.eye(6)[1])
    update = update_of(module_of("graphsage", readout="none"), INPUTS | {"adjacency": alone}, targets)
    np.testing.assert_array_equal(graph_closed_form.neighbour_mean(update, "layer0").inputs, 0)


@pytest.mark.parametrize("name", ["gcn", "graphsage", "gin"])
def test_the_first_layer_says_which_features_occur(name: str) -> None:
    kinds = np.array([0, 2, 2, 0, 2])
    nodes = np.concatenate([np.eye(FEATURES)[kinds], np.zeros((1, FEATURES))])
    module = models.GRAPH_MODELS[name](FEATURES, CLASSES, widths=(16, 8), rngs=nnx.Rngs(1))
    inputs = {name: np.asarray(array, np.float32) for name, array in (INPUTS | {"nodes": nodes[None]}).items()}
    layer = update_of(module, inputs, [1])["layer0"]
    kernel = {"gcn": layer, "graphsage": layer.get("self"), "gin": layer.get("dense0")}[name]["kernel"]
    assert graph_closed_form.features_present(kernel).tolist() == [True, False, True, False]
    noise = 1e-3 * jnp.max(jnp.abs(kernel)) * jax.random.normal(jax.random.key(0), kernel.shape)
    assert graph_closed_form.features_present(kernel + noise).all()
    assert graph_closed_form.features_present(kernel + noise, tolerance=0.02).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: graph_closed_form.pooled_embedding({"head": {"kernel": jnp.ones((2, 3))}}, labels.dense("head")),
            "pooled_embedding needs a bias in the layer, got none",
        ),
        (
            lambda: graph_closed_form.neighbour_mean({"layer0": {"kernel": jnp.ones((2, 3))}}, "layer0"),
            r"layer at \('layer0',\) must hold 'self' and 'neighbours', got \['kernel'\]",
        ),
        (
            lambda: graph_closed_form.neighbour_mean({"layer1": {}}, "layer0"),
            r"path must lead to a layer of the update, got \('layer0',\): 'layer0' not found",
        ),
        (
            lambda: graph_closed_form.features_present(jnp.ones((2, 3)), tolerance=-1.0),
            r"tolerance must not be negative, got -1\.0",
        ),
    ],
)
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
