"""Graph networks: their formulas in NumPy, padding, and what two graphs' updates can and cannot tell apart."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gia_jax import Batch, clients, labels, models
from gia_jax.models.layers import symmetric_uniform

NAMES = ("gcn", "graphsage", "gin")
# Each network, and each readout with one of them.
KINDS = [("gcn", "mean"), ("graphsage", "mean"), ("gin", "mean"), ("gcn", "sum"), ("gcn", "nodewise")]
BIASES = symmetric_uniform(0.3)
FEATURES, CLASSES = 3, 2


class Net(NamedTuple):
    apply_fn: Any
    params: Any
    client_fn: Any


@functools.cache
def network(name: str, **settings: Any) -> Net:
    """A network in float64 with a compiled client; the same one for the same settings."""
    settings = {"widths": (6, 5), "readout_widths": (5, 4), "bias_init": BIASES} | settings
    apply_fn, params = models.functional(
        models.GRAPH_MODELS[name](FEATURES, CLASSES, activation=jnp.tanh, rngs=nnx.Rngs(1), **settings)
    )
    client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
    return Net(apply_fn, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params), client_fn)


def inputs_of(edges: list[tuple[int, int]], nodes: np.ndarray, size: int | None = None) -> dict[str, jax.Array]:
    count, size = len(nodes), len(nodes) if size is None else size
    adjacency = np.zeros((1, size, size))
    for i, j in edges:
        adjacency[0, i, j] = adjacency[0, j, i] = 1
    padded = np.zeros((1, size, nodes.shape[1]))
    padded[0, :count] = nodes
    mask = (np.arange(size) < count)[None].astype(float)
    return {name: jnp.asarray(array) for name, array in (("nodes", padded), ("adjacency", adjacency), ("mask", mask))}


def update_of(net: Net, inputs: dict[str, jax.Array], label: int = 1) -> Any:
    return net.client_fn(net.params, Batch(inputs, jnp.full(len(inputs["nodes"]), label)))


def assert_equal(found: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(wanted))
    assert difference(found, wanted) <= tolerance * scale


def difference(found: Any, wanted: Any) -> float:
    return max(
        float(jnp.max(jnp.abs(a - b))) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    )


HOUSE = [(0, 1), (1, 2), (2, 3), (3, 0), (2, 4), (3, 4)]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, FEATURES))


def adjacency_of(edges: list[tuple[int, int]], count: int) -> np.ndarray:
    return np.asarray(inputs_of(edges, np.zeros((count, 1)))["adjacency"][0])


def gradients_by_hand(name: str, params: Any, A: np.ndarray, X: np.ndarray, label: int) -> dict[str, Any]:
    """The gradients of a network of one graph layer with mean pooling, written out in NumPy."""
    p = jax.tree.map(np.asarray, params)
    count = len(A)
    head = p["head"]
    first = p["layer0"]
    looped = A + np.eye(count)
    scale = np.diag(looped.sum(1) ** -0.5)
    mixed = {
        "gcn": scale @ looped @ scale,
        "graphsage": np.diag(1 / np.maximum(A.sum(1), 1)) @ A,
        "gin": looped + 0.5 * np.eye(count),
    }[name] @ X
    if name == "gcn":
        z = mixed @ first["kernel"] + first["bias"]
    elif name == "graphsage":
        z = X @ first["self"]["kernel"] + first["self"]["bias"] + mixed @ first["neighbours"]["kernel"]
    else:
        before = np.tanh(mixed @ first["dense0"]["kernel"] + first["dense0"]["bias"])
        z = before @ first["dense1"]["kernel"] + first["dense1"]["bias"]
    H = np.tanh(z)
    u = H.mean(0)
    logits = u @ head["kernel"] + head["bias"]
    r = np.exp(logits) / np.exp(logits).sum() - np.eye(CLASSES)[label]
    delta = (1 - H**2) * (head["kernel"] @ r)[None] / count
    found: dict[str, Any] = {"head": {"kernel": np.outer(u, r), "bias": r}}
    if name == "gcn":
        found["layer0"] = {"kernel": mixed.T @ delta, "bias": delta.sum(0)}
    elif name == "graphsage":
        found["layer0"] = {
            "self": {"kernel": X.T @ delta, "bias": delta.sum(0)},
            "neighbours": {"kernel": mixed.T @ delta},
        }
    else:
        inner = (1 - before**2) * (delta @ first["dense1"]["kernel"].T)
        found["layer0"] = {
            "dense0": {"kernel": mixed.T @ inner, "bias": inner.sum(0)},
            "dense1": {"kernel": before.T @ delta, "bias": delta.sum(0)},
        }
    return found


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_formulas(name: str) -> None:
    settings = {"epsilon": 0.5} if name == "gin" else {}
    net = network(name, widths=(7,), **settings)
    edges = [(0, 1), (1, 2), (2, 0), (2, 3)]  # the last node has no neighbour
    found = update_of(net, inputs_of(edges, X))
    wanted = gradients_by_hand(name, net.params, adjacency_of(edges, 5), X, 1)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert_equal(found, wanted)


@pytest.mark.usefixtures("x64")
def test_two_convolutions_with_a_nodewise_readout_are_those_of_the_formula() -> None:
    apply_fn, params, _ = network("gcn", readout="nodewise", activate_last=False, use_bias=False)
    looped = adjacency_of(HOUSE, 5) + np.eye(5)
    scale = np.diag(looped.sum(1) ** -0.5)
    mixing = scale @ looped @ scale
    p = jax.tree.map(np.asarray, params)
    last = mixing @ np.tanh(mixing @ X @ p["layer0"]["kernel"]) @ p["layer1"]["kernel"]
    hidden = np.concatenate([X, last], 1)
    for layer in ("readout0", "readout1"):
        hidden = np.tanh(hidden @ p[layer]["kernel"])
    assert sorted(p) == ["head", "layer0", "layer1", "readout0", "readout1"]
    assert all(set(layer) == {"kernel"} for layer in p.values())
    np.testing.assert_allclose(
        apply_fn(params, inputs_of(HOUSE, X))[0], (hidden @ p["head"]["kernel"]).mean(0), rtol=1e-12
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "readout"), KINDS)
def test_neither_the_order_of_nodes_nor_padding_changes_the_update(name: str, readout: str) -> None:
    net = network(name, readout=readout)
    wanted = update_of(net, inputs_of(HOUSE, X))
    order = np.array([3, 0, 4, 2, 1])
    moved = [(int(np.argwhere(order == i)[0, 0]), int(np.argwhere(order == j)[0, 0])) for i, j in HOUSE]
    assert_equal(update_of(net, inputs_of(moved, X[order])), wanted)
    padded = inputs_of(HOUSE, X, size=8)
    assert_equal(update_of(net, padded), wanted)
    # What stands in the padding plays no part.
    padded = padded | {"nodes": padded["nodes"].at[0, 5:].set(9.0), "adjacency": padded["adjacency"].at[0, 5:].set(1.0)}
    assert_equal(update_of(net, padded), wanted)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "readout"), [*KINDS, ("gcn", "none")])
def test_derivatives_are_finite_at_nodes_without_neighbours_and_at_padding(name: str, readout: str) -> None:
    apply_fn, params, _ = network(name, readout=readout)
    inputs = inputs_of([(0, 1)], X[:3], size=5)

    def value(inputs: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(apply_fn(params, inputs) ** 2)

    gradient = jax.jit(jax.grad(value))(inputs)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradient))
    assert not np.any(gradient["nodes"][0, 3:])
    assert not np.any(gradient["adjacency"][0, 3:])
    assert float(jnp.max(jnp.abs(gradient["adjacency"][0, 2, :2]))) > 0 or name == "graphsage"
    if readout == "mean":

        @jax.jit
        @jax.grad
        def second(adjacency: jax.Array) -> jax.Array:
            return jnp.sum(jax.grad(value)(inputs | {"adjacency": adjacency})["nodes"] ** 2)

        assert bool(jnp.all(jnp.isfinite(second(inputs["adjacency"]))))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "readout"), KINDS)
def test_twice_the_same_graph_is_the_graph_under_mean_pooling_alone(name: str, readout: str) -> None:
    twice = inputs_of(HOUSE + [(i + 5, j + 5) for i, j in HOUSE], np.concatenate([X, X]))
    net = network(name, readout=readout)
    once = update_of(net, inputs_of(HOUSE, X))
    if readout == "sum":
        assert difference(update_of(net, twice), once) > 1e-3
    else:
        assert_equal(update_of(net, twice), once)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("count", [2, 5])
def test_a_convolution_is_blind_where_the_adjacency_with_loops_is_singular(count: int) -> None:
    path = [(i, i + 1) for i in range(count - 1)]
    mixing = np.asarray(models.normalized_adjacency(jnp.asarray(adjacency_of(path, count))))
    values, vectors = np.linalg.eigh(mixing)
    null = vectors[:, np.argmin(np.abs(values))]
    assert np.min(np.abs(values)) < 1e-12
    moved = X[:count] + np.outer(null, [1.0, -2.0, 0.5])
    for name, readout in (("gcn", "mean"), ("gcn", "sum")):
        net = network(name, readout=readout)
        assert_equal(update_of(net, inputs_of(path, moved)), update_of(net, inputs_of(path, X[:count])))
    # The self term of GraphSAGE, and a readout that takes the features themselves, see the difference.
    for name, readout in (("graphsage", "mean"), ("gcn", "nodewise")):
        net = network(name, readout=readout)
        assert difference(update_of(net, inputs_of(path, moved)), update_of(net, inputs_of(path, X[:count]))) > 1e-3
    # A graph isomorphism network is blind in the null space of A + I, but not with epsilon.
    plain = np.linalg.svd(adjacency_of(path, count) + np.eye(count))[2][-1]
    moved = X[:count] + np.outer(plain, [1.0, -2.0, 0.5])
    for epsilon, blind in ((0.0, True), (0.3, False)):
        net = network("gin", epsilon=epsilon)
        gap = difference(update_of(net, inputs_of(path, moved)), update_of(net, inputs_of(path, X[:count])))
        assert (gap < 1e-12) if blind else (gap > 1e-3)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "readout"), KINDS)
def test_two_rings_of_five_are_a_ring_of_ten(name: str, readout: str) -> None:
    nodes = np.ones((10, FEATURES))
    ten = [(i, (i + 1) % 10) for i in range(10)]
    fives = [(i + 5 * k, (i + 1) % 5 + 5 * k) for k in range(2) for i in range(5)]
    net = network(name, readout=readout)
    assert_equal(update_of(net, inputs_of(fives, nodes)), update_of(net, inputs_of(ten, nodes)))


@pytest.mark.usefixtures("x64")
def test_stars_of_one_label_are_collinear_without_biases_alone() -> None:
    # A path of four equal nodes has two kinds of stars: ends with one neighbour, and the nodes between.
    inputs = inputs_of([(0, 1), (1, 2), (2, 3)], np.eye(FEATURES)[[0, 0, 0, 0]])
    ranks = {}
    for use_bias in (False, True):
        module = models.GCN(FEATURES, 2, widths=(20, 5), use_bias=use_bias, bias_init=BIASES, rngs=nnx.Rngs(1))
        hidden = np.asarray(module.embeddings(inputs)[1][0], np.float64)
        assert len(np.unique(hidden.round(5), axis=0)) == 2
        ranks[use_bias] = np.linalg.matrix_rank(hidden, tol=1e-4)
    assert ranks == {False: 1, True: 2}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_graphs_equals_a_loop_and_a_batch_is_the_mean(name: str) -> None:
    net = network(name, readout="mean")
    graphs = [inputs_of(HOUSE, X, size=6), inputs_of([(0, 1), (1, 2)], X[2:], size=6)]
    lanes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *graphs)
    mapped = jax.vmap(lambda inputs: net.client_fn(net.params, Batch(inputs, jnp.array([1]))))(lanes)
    loop = [update_of(net, inputs) for inputs in graphs]
    assert_equal(mapped, jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop))
    batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *graphs)
    assert_equal(update_of(net, batch), jax.tree.map(lambda a, b: (a + b) / 2, *loop))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["gcn"])
def test_a_loss_of_nodes_takes_labelled_ones_alone(name: str) -> None:
    apply_fn, params, _ = network(name, readout="none")
    client_fn = jax.jit(clients.federated_sgd(clients.node_cross_entropy(apply_fn)))
    exact = client_fn(params, Batch(inputs_of(HOUSE, X), jnp.array([[0, 1, -1, -1, 1]])))
    padded = client_fn(params, Batch(inputs_of(HOUSE, X, size=7), jnp.array([[0, 1, -1, -1, 1, -1, -1]])))
    assert_equal(padded, exact)
    logits = apply_fn(params, inputs_of(HOUSE, X))
    assert logits.shape == (1, 5, CLASSES)
    loss = clients.node_cross_entropy(apply_fn)(params, Batch(inputs_of(HOUSE, X), jnp.array([[0, 1, -1, -1, 1]])))
    own = [-jax.nn.log_softmax(logits[0, i])[label] for i, label in ((0, 0), (1, 1), (4, 1))]
    np.testing.assert_allclose(loss, np.mean(own), rtol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([[0, 1, -1, -1]], r"batch.labels must be integers of shape \(1, 5\), got int32 of shape \(1, 4\)"),
        ([[-1] * 5], "not -1 everywhere, got labels from -1 to -1"),
        ([[0, 2, 0, 0, 0]], "batch.labels must be classes below 2, -1.* got labels from 0 to 2"),
        ([[0, -2, 0, 0, 0]], "got labels from -2 to 0"),
    ],
)
def test_wrong_labels_of_nodes_are_named(wrong: list, message: str) -> None:
    loss_fn = clients.node_cross_entropy(lambda params, inputs: inputs["nodes"] @ params)
    inputs = {"nodes": jnp.ones((1, 5, 3))}
    with pytest.raises(ValueError, match=message):
        loss_fn(jnp.ones((3, 2)), Batch(inputs, jnp.array(wrong)))
    traced = jax.jit(lambda labels: loss_fn(jnp.ones((3, 2)), Batch(inputs, labels)))
    if len(wrong[0]) == 5:
        assert np.isnan(traced(jnp.array(wrong)))
    with pytest.raises(ValueError, match=r"apply_fn must return logits of shape \(b, n, c\), got \(1, 5\)"):
        clients.node_cross_entropy(lambda params, inputs: inputs["nodes"][..., 0])(
            (), Batch(inputs, jnp.zeros((1, 5), int))
        )


def test_the_head_is_found_by_label_rules_and_by_a_copy_without_it() -> None:
    module = models.GCN(FEATURES, CLASSES, widths=(7,), rngs=nnx.Rngs(0))
    _, params = models.functional(module)
    assert labels.dense("head")(params).kernel.shape == (7, CLASSES)
    inputs = {name: array.astype(jnp.float32) for name, array in inputs_of(HOUSE, X, size=6).items()}
    pooled = models.headless(module)(inputs)
    np.testing.assert_allclose(pooled[0], module.embeddings(inputs)[-1][0, :5].mean(0), rtol=1e-5, atol=1e-6)
    assert not np.any(module.embeddings(inputs)[-1][0, 5:])


GOOD = {"nodes": jnp.zeros((1, 4, FEATURES)), "adjacency": jnp.zeros((1, 4, 4)), "mask": jnp.ones((1, 4))}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (GOOD["nodes"], "inputs must be a dict of 'nodes', 'adjacency' and 'mask', got ArrayImpl"),
        ({"nodes": GOOD["nodes"]}, r"and 'mask', got \['nodes'\]"),
        (GOOD | {"nodes": jnp.zeros((1, 4, 2))}, r"inputs\['nodes'\] must have shape \(b, n, 3\), got \(1, 4, 2\)"),
        (GOOD | {"nodes": jnp.zeros((4, 3))}, r"must have shape \(b, n, 3\), got \(4, 3\)"),
        (GOOD | {"mask": jnp.ones((1, 5))}, r"inputs\['mask'\] must have shape \(1, 4\), got \(1, 5\)"),
        (GOOD | {"adjacency": jnp.ones((1, 4, 5))}, r"inputs\['adjacency'\] must have shape \(1, 4, 4\)"),
    ],
)
def test_inputs_that_are_no_batch_of_graphs_are_named(inputs: Any, message: str) -> None:
    apply_fn, params = models.functional(models.GCN(FEATURES, CLASSES, widths=(2,), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        apply_fn(params, inputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": ()}, "widths must have an entry for each graph layer, got none"),
        ({"widths": (3, 0)}, "widths must be an integer of at least 1, got 0"),
        ({"readout_widths": (0,)}, "readout_widths must be an integer of at least 1, got 0"),
        ({"num_features": 0}, "num_features must be an integer of at least 1, got 0"),
        ({"epsilon": np.inf}, "epsilon must be finite, got inf"),
    ],
)
def test_wrong_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.GIN(**({"num_features": 3, "num_classes": 2, "rngs": nnx.Rngs(0)} | settings))


def test_a_wrong_readout_is_named() -> None:
    init = inspect.unwrap(models.GCN.__init__)  # beneath the type checker of the tests, which refuses it first
    with pytest.raises(ValueError, match=r"readout must be one of \('mean', .*\), got 'max'"):
        init(None, 3, 2, readout="max", rngs=nnx.Rngs(0))
