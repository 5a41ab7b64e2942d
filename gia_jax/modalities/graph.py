"""Graphs: features of nodes, and edges between 0 and 1, for networks that take padded batches of graphs.

That edges are searched as numbers in [0, 1] and categories as the softmax of logits is common to the attacks that match
gradients of graph networks; see Sinha et al., Gradient Inversion Attack on Graph Neural Networks (GLG), 2024, and the
baselines of Drencheva et al., GRAIN, ICLR 2025.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import Batch, DecodeFn, InitFn, Observation, PriorFn, Scalar
from gia_jax.data.graphs import FeatureBlock
from gia_jax.matching import graph_priors, priors
from gia_jax.metrics.graphs import graph_scores
from gia_jax.metrics.node_order import match_nodes, permuted
from gia_jax.modalities.base import Modality, Scored, Shown
from gia_jax.modalities.graph_guesses import graph_guesses
from gia_jax.precision import wide_dtype
from gia_jax.threat import granted

# The scores, by the fields of `GraphScores` that they are.
FIELDS = {
    "edges": "edge_auc",
    "edge_ap": "edge_ap",
    "edge_f1": "edge_f1",
    "nodes": "node_accuracy",
    "node_mse": "node_mse",
    "propagated_mse": "propagated_mse",
    "colors": "same_colors",
    "exact": "is_exact",
}

# The scores that a table shows.
SHOWN = {
    "edges": Shown("edge AUC", ".2f", " edge AUC"),
    "edge_ap": Shown("edge AP", ".2f"),
    "nodes": Shown("nodes right", ".0%", " of nodes right"),
    "node_mse": Shown("node MSE", ".3f"),
    "colors": Shown("same colours", ".0%", average="mean"),
    "exact": Shown("exact", ".0%", average="mean"),
}


def graph(
    blocks: Sequence[FeatureBlock],
    max_nodes: int,
    *,
    grants: Sequence[str] = (),
    edges: Literal["sigmoid", "box"] = "sigmoid",
    smoothness_weight: Scalar = 0.0,
    sparsity_weight: Scalar = 0.0,
    binarity_weight: Scalar = 0.0,
    hops: int = 2,
    init_fn: InitFn | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Modality:
    """Builds the modality of graphs as the networks of `gia_jax.models` take them: nodes, adjacency and mask.

    The unknowns are a dict of "nodes" (b, n, f) and "edges" (b, n (n - 1) / 2), one number for each pair of nodes.
    One-hot blocks of features are the softmax of their unknowns, and other features are their unknowns. Edges are the
    sigmoid of theirs, or, with `edges="box"`, their unknowns, which are held in [0, 1]. So the adjacency is always
    symmetric, without loops, and 0 at padding, and what a network makes of it, such as degrees, follows from it.

    The numbers of nodes, the structure and the features of the client's graphs are grants of the threat model:
    `ThreatModel(inputs=("mask",))` and so on. What an attack uses of them is said by `grants`, and is then no unknown.

    Args:
        blocks: What the columns of the nodes' features are, which the attacker knows.
        max_nodes: Number n of nodes that graphs are padded to, at least 1.
        grants: Parts of the graphs that the attack takes from the observation: "mask" for the numbers of nodes,
            "adjacency" for the structure, with which nodes are compared in their places, and "nodes" for the features.
            Without the "mask" all n are taken for nodes.
        edges: How edges are kept in [0, 1]: "sigmoid" or "box".
        smoothness_weight: Weight of `graph_priors.smoothness`, at least 0 and finite.
        sparsity_weight: Weight of `graph_priors.sparsity`, at least 0 and finite.
        binarity_weight: Weight of `graph_priors.binarity`, at least 0 and finite.
        hops: Number of layers of the network, for matching nodes and for the score "colors", at least 0.
        init_fn: Function `(key, observation) -> unknowns`. None draws those of nodes from N(0, 0.1^2), and those of
            edges from N(-1, 0.1^2), which makes about a quarter of an edge of every pair.
        dtype: Floating-point type of the model's inputs.

    Returns:
        The modality. Graphs are assigned to the true ones, and the nodes of each then matched, by
        `metrics.match_nodes`; `metrics.GraphScores` explains the scores. They are "edges" (AUC), "edge_ap",
        "edge_f1", "nodes" (share of nodes whose features are all right), "node_mse", "propagated_mse", "colors" and
        "exact", the last two 0 or 1. With the structure granted "nodes" comes first. The guesses are those of
        `graph_guesses`, and their nodes are matched in the same way. `draw_fn` writes a PNG and needs the extra `demo`.

    Raises:
        ValueError: If a number is out of range, there are no features, `edges` or a grant is unknown, `dtype` is no
            floating-point type, or both the structure and the features are granted. `init_fn` raises it where the
            threat model does not grant what the attack takes, `score_fn` and `guess_fn` for what is no batch of graphs,
            and for a truth or public graphs that are not finite.

    Examples:
        The edges of a path of three nodes, whose features are known, are found:

        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from flax import nnx
        >>> from gia_jax import Batch, ThreatModel, clients, data, gradient_matching, modalities, models, observe, run
        >>> path = np.eye(3, k=1) + np.eye(3, k=-1)
        >>> nodes, adjacency, mask = map(jnp.asarray, data.pad_graphs([path], [np.eye(3)]))
        >>> truth = Batch({"nodes": nodes, "adjacency": adjacency, "mask": mask}, jnp.array([1]))
        >>> modality = modalities.graph([data.FeatureBlock("label", ("C", "N", "O"))], 3, grants=["nodes"])
        >>> module = models.GCN(3, 2, widths=(16,), activation=jnp.tanh, rngs=nnx.Rngs(0))
        >>> apply_fn, params = models.functional(module)
        >>> client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        >>> seen = observe(jax.random.key(1), ThreatModel(labels=True, inputs=("nodes",)), client_fn, params, truth)
        >>> attack = gradient_matching(client_fn, **modality.matching())
        >>> found, _ = jax.jit(lambda key: run(attack, key, seen, num_steps=200))(jax.random.key(2))
        >>> modality.score_fn(found.batch, truth).scores["exact"].tolist()
        [1.0]
    """
    if not isinstance(blocks, Sequence) or not all(isinstance(block, FeatureBlock) for block in blocks):
        raise ValueError(f"blocks must be a sequence of data.FeatureBlock, got {_check.brief(blocks)}")
    width = sum(len(block.names) for block in blocks)
    _check.integer(max_nodes=max_nodes)
    _check.fits(4 * max_nodes**2, max_nodes=max_nodes)  # the places of pairs are int64, and made by way of others
    _check.integer(0, hops=hops)
    if not width:
        raise ValueError(f"blocks must have at least one column, got {list(blocks)}")
    if edges not in ("sigmoid", "box"):
        raise ValueError(f"edges must be 'sigmoid' or 'box', got {edges!r}")
    _check.floating(dtype)
    _check.functions(init_fn=init_fn)
    if isinstance(grants, str) or not isinstance(grants, Sequence) or not set(grants) <= set(_check.GRAPH_PARTS):
        raise ValueError(f"grants must be a sequence of names out of {_check.GRAPH_PARTS}, got {_check.brief(grants)}")
    _check.weight(smoothness_weight=smoothness_weight, sparsity_weight=sparsity_weight, binarity_weight=binarity_weight)
    if {"nodes", "adjacency"} <= set(grants):
        raise ValueError("grants must leave nodes or adjacency unknown, got both")
    like = {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        for name, shape in (("nodes", (max_nodes, width)), ("adjacency", (max_nodes,) * 2), ("mask", (max_nodes,)))
    }
    weighted = (
        (smoothness_weight, graph_priors.smoothness),
        (sparsity_weight, graph_priors.sparsity),
        (binarity_weight, graph_priors.binarity),
    )
    prior_fn: PriorFn | None = priors.combine(*weighted)

    def project_fn(unknowns: PyTree[Array]) -> PyTree[Array]:
        return unknowns | {"edges": jnp.clip(unknowns["edges"], 0, 1)}

    def align_fn(found: Batch, truth: Batch) -> Batch:
        return _aligned(found, truth, blocks, hops, keeps_nodes="adjacency" in grants)

    # Where the structure is granted, edges say nothing.
    first = "nodes" if "adjacency" in grants else "edges"

    def score_fn(found: Batch, truth: Batch) -> Scored:
        true = _graphs(truth, "truth")
        aligned, shape = align_fn(found, truth), truth.inputs["mask"].shape[:-1]
        pairs = zip(_graphs(aligned, "found"), true, strict=True)
        every = [graph_scores(*pair, blocks, hops=hops, order=np.arange(len(pair[0]["mask"]))) for pair in pairs]
        scores = {
            name: np.asarray([getattr(one, field) for one in every], np.float64).reshape(shape)
            for name, field in ({first: FIELDS[first]} | FIELDS).items()
        }
        return Scored(scores, aligned)

    def guess_fn(truth: Batch, public: Batch) -> dict[str, np.ndarray]:
        for name, batch in (("truth", truth), ("public", public)):
            _graphs(batch, name)
        guesses = graph_guesses(truth, public, hops=hops)
        return {name: score_fn(guess, truth).scores[first] for name, guess in guesses.items()}

    def draw_fn(
        columns: Mapping[str, Batch],
        path: Path,
        *,
        captions: Mapping[str, Sequence[str]] | None = None,
        title: str = "",
    ) -> None:
        from gia_jax.report.graph_plots import graph_grid  # needs matplotlib and networkx

        if not columns:
            raise ValueError("columns must hold graphs, got none")
        reference = next(iter(columns.values()))
        shown = {
            name: reference if batch is reference else align_fn(batch, reference) for name, batch in columns.items()
        }
        graphs = {name: _graphs(batch, f"columns[{name!r}]") for name, batch in shown.items()}
        graph_grid(graphs, blocks, path, captions=captions, title=title)

    return Modality(
        init_fn=_start(grants, like, edges) if init_fn is None else init_fn,
        decode_fn=_decoder(blocks, max_nodes, edges),
        project_fn=project_fn if edges == "box" and "adjacency" not in grants else None,
        prior_fn=None if all(_check.is_zero(weight) for weight, _ in weighted) else prior_fn,
        like=like,
        score_fn=score_fn,
        shown={first: SHOWN[first]} | SHOWN,
        guess_fn=guess_fn,
        draw_fn=draw_fn,
    )


def _start(grants: Sequence[str], like: dict[str, jax.ShapeDtypeStruct], edges: str) -> InitFn:
    """Returns the function that draws the first unknowns, beside which it puts what is granted."""

    def init_fn(key: PRNGKeyArray, observation: Observation) -> dict[str, Array]:
        seen = granted(observation, "inputs_like")
        wanted = {name: leaf.shape for name, leaf in like.items()}
        shapes = jax.tree.map(lambda leaf: leaf.shape[1:], seen)
        if shapes != wanted:
            raise ValueError(f"observation.extra['inputs_like'] must be graphs of the shapes {wanted}, got {shapes}")
        size, dtype = _check.examples(seen), wide_dtype(seen["nodes"].dtype)
        known = granted(observation, "inputs") if grants else {}
        for name in grants:
            if name not in known:
                raise ValueError(f"the threat model does not grant the inputs' {name!r}, got {sorted(known)}")
        key_nodes, key_edges = jax.random.split(key)
        start = {f"known_{name}": known[name].astype(dtype) for name in grants}
        if "nodes" not in grants:
            start["nodes"] = 0.1 * jax.random.normal(key_nodes, (size, *wanted["nodes"]), dtype)
        if "adjacency" not in grants:
            count = math.comb(wanted["mask"][0], 2)
            drawn = 0.1 * jax.random.normal(key_edges, (size, count), dtype) - 1
            start["edges"] = jax.nn.sigmoid(drawn) if edges == "box" else drawn
        return start

    return init_fn


def _decoder(blocks: Sequence[FeatureBlock], max_nodes: int, edges: str) -> DecodeFn:
    """Returns the function that makes a batch of what is unknown and what is granted.

    What is granted is among the unknowns, so that it may differ between victims, and no gradient reaches it: an
    optimiser leaves it as it is.
    """
    pair_of = _pairs(max_nodes)

    def decode_fn(unknowns: dict[str, Array], labels: Any) -> Batch:
        known = jax.lax.stop_gradient(
            {name: unknowns[f"known_{name}"] for name in _check.GRAPH_PARTS if f"known_{name}" in unknowns}
        )
        leaf = jax.tree.leaves(unknowns)[0]
        mask = known.get("mask", jnp.ones((len(leaf), max_nodes), leaf.dtype))
        nodes = known["nodes"] if "nodes" in known else _relaxed(unknowns["nodes"], blocks)
        if "adjacency" in known:
            adjacency = known["adjacency"]
        else:
            chosen = unknowns["edges"] if edges == "box" else jax.nn.sigmoid(unknowns["edges"])
            adjacency = jnp.pad(chosen, ((0, 0), (0, 1)))[:, pair_of]  # the diagonal takes the zero at the end
        there = mask[:, :, None] * mask[:, None]
        return Batch({"nodes": nodes * mask[..., None], "adjacency": adjacency * there, "mask": mask}, labels)

    return decode_fn


def _pairs(count: int) -> np.ndarray:
    """Returns the place of every pair of nodes among the pairs i < j, and one past the last of them for i = j."""
    places = np.full((count, count), count * (count - 1) // 2)
    rows, columns = np.triu_indices(count, 1)
    places[rows, columns] = places[columns, rows] = np.arange(len(rows))
    return places


def _relaxed(unknowns: Float[Array, "b n f"], blocks: Sequence[FeatureBlock]) -> Float[Array, "b n f"]:
    """Returns features: the softmax of the unknowns of each one-hot block, and other unknowns as they are."""
    ends = np.cumsum([len(block.names) for block in blocks])[:-1]
    parts = jnp.split(unknowns, ends, -1)
    relaxed = [jax.nn.softmax(part) if block.is_one_hot else part for block, part in zip(blocks, parts, strict=True)]
    return jnp.concatenate(relaxed, -1)


def _graphs(batch: Batch, name: str) -> list[dict[str, np.ndarray]]:
    """Returns the graphs of a batch, or of all victims, one after the other.

    Raises ValueError for what is no batch of graphs, and for one that is not finite unless it is called "found".
    """
    inputs = batch.inputs
    _check.graphs(f"{name}.inputs", inputs)
    arrays = {part: np.asarray(inputs[part], np.float64) for part in _check.GRAPH_PARTS}
    lead = arrays["mask"].shape
    fits = arrays["nodes"].shape[:-1] == lead and arrays["adjacency"].shape == (*lead, *lead[-1:])
    if len(lead) < 2 or 0 in lead or not fits:
        shapes = {part: array.shape for part, array in arrays.items()}
        wanted = "nodes (b, n, f), adjacency (b, n, n) and mask (b, n)"
        raise ValueError(f"{name}.inputs must be graphs, at least one, of {wanted}, got the shapes {shapes}")
    if name == "truth" or name == "public":
        _check.finite(f"{name}.inputs", arrays)
    flat = {part: array.reshape(-1, *array.shape[(-1 if part == "mask" else -2) :]) for part, array in arrays.items()}
    return [{part: array[i] for part, array in flat.items()} for i in range(len(flat["mask"]))]


def _aligned(found: Batch, truth: Batch, blocks: Sequence[FeatureBlock], hops: int, *, keeps_nodes: bool) -> Batch:
    """Puts a reconstruction's graphs in the order of the true ones, and their nodes in the order of the true nodes."""
    graphs, true = _graphs(found, "found"), _graphs(truth, "truth")
    shape = truth.inputs["mask"].shape[:-1]
    if found.inputs["mask"].shape[:-1] != shape:
        raise ValueError(f"found must hold the graphs of truth, {shape}, got {found.inputs['mask'].shape[:-1]}")
    size = shape[-1]
    aligned, order = [], []
    for start in range(0, math.prod(shape), size):
        moved = [
            [
                one if keeps_nodes else permuted(one, match_nodes(one, wanted, blocks, hops=hops))
                for one in graphs[start : start + size]
            ]
            for wanted in true[start : start + size]
        ]
        costs = np.array([[_distance(one, wanted) for one in row] for row, wanted in zip(moved, true[start:])])
        chosen = scipy.optimize.linear_sum_assignment(costs)[1]
        aligned += [moved[i][j] for i, j in enumerate(chosen)]
        order += [chosen]
    rows = max(len(one["mask"]) for one in aligned)
    padded = [permuted(one, np.arange(rows)) for one in aligned]
    inputs = {
        name: np.stack([one[name] for one in padded]).reshape(*shape, *padded[0][name].shape)
        for name in _check.GRAPH_PARTS
    }
    places = np.stack(order).reshape(shape)

    def moved_labels(leaf: Array | np.ndarray) -> np.ndarray:
        values = np.asarray(leaf)
        index = places.reshape(*shape, *(1,) * (values.ndim - len(shape)))
        return np.take_along_axis(values, index, len(shape) - 1) if values.shape[: len(shape)] == shape else values

    return Batch(inputs, jax.tree.map(moved_labels, found.labels))


def _distance(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """Returns the squared distance of two graphs' nodes and edges. It is a large number where it is not finite."""
    rows = max(len(one["mask"]), len(other["mask"]))
    first, second = (permuted(graph, np.arange(rows)) for graph in (one, other))
    squares = sum(float(np.sum(np.square(first[name] - second[name]))) for name in _check.GRAPH_PARTS)
    return squares if np.isfinite(squares) else 1e30
