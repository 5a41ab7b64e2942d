"""Guesses of graphs that use no gradient, with which the reconstruction of an attack is to be compared."""

import numpy as np

from gia_jax import _check
from gia_jax.base import Batch
from gia_jax.metrics.node_order import Graph, propagation
from gia_jax.modalities.base import class_labels

SEED = 0  # of the random graph


def graph_guesses(truth: Batch, public: Batch, *, hops: int = 2) -> dict[str, Batch]:
    """Makes guesses of graphs from public ones of the same kind.

    The guesses are, by their names in the result:

    * "mean graph": every node has the mean features of all public nodes, and every pair the density of public edges;
    * "random graph": nodes are drawn from the public ones, and edges at random with the public density;
    * "nearest graph": the public graph of the nearest summary, which holds the sums over the nodes of Â^k X for k = 0,
      ..., `hops`, and the degrees in their order. Nobody can make this guess without the true graph;
    * "nearest of the class": the same among public graphs of the true class, where all labels are class indices.

    The first two have the true number of nodes, which is in their favour where the attacker does not know it.

    Args:
        truth: True graphs, with inputs of any leading axes.
        public: Public graphs, none of them a victim's, padded to as many nodes as the true ones.
        hops: Largest k, at least 0.

    Returns:
        Batches like `truth` by the name of the guess, with the true labels. They are to be scored as a reconstruction
        is, after their nodes were matched.

    Raises:
        ValueError: If there is no public graph, public graphs have other shapes, or they have no nodes.

    Examples:
        >>> import numpy as np
        >>> from gia_jax import Batch
        >>> from gia_jax.modalities.graph_guesses import graph_guesses
        >>> edge = np.array([[[0.0, 1.0], [1.0, 0.0]]])
        >>> batch = Batch({"nodes": np.eye(2)[None], "adjacency": edge, "mask": np.ones((1, 2))}, np.array([0]))
        >>> guesses = graph_guesses(batch, batch)
        >>> guesses["mean graph"].inputs["nodes"].tolist(), sorted(guesses)
        ([[[0.5, 0.5], [0.5, 0.5]]], ['mean graph', 'nearest graph', 'nearest of the class', 'random graph'])
    """
    _check.integer(0, hops=hops)
    true, gallery = _flat(truth), _flat(public)
    if not len(gallery["mask"]) or any(gallery[name].shape[1:] != true[name].shape[1:] for name in true):
        shapes = [{name: array.shape[1:] for name, array in graphs.items()} for graphs in (true, gallery)]
        raise ValueError(
            f"public must hold graphs of the shapes {shapes[0]}, got {len(gallery['mask'])} of {shapes[1]}"
        )
    if not (gallery["mask"] > 0).any():
        raise ValueError("public must hold graphs of at least one node, got a mask of zeros")
    lead = np.shape(truth.inputs["mask"])[:-1]
    rng = np.random.default_rng(SEED)
    rows = gallery["nodes"][gallery["mask"] > 0]
    counts = gallery["mask"].sum(1)
    density = gallery["adjacency"].sum() / max(np.sum(counts * (counts - 1)), 1)
    size = true["mask"].shape[1]
    pairs = true["mask"][:, :, None] * true["mask"][:, None] * (1 - np.eye(size))
    draws = np.triu(rng.uniform(size=(len(pairs), size, size)) < density, 1)
    guesses = {
        "mean graph": (rows.mean(0) * true["mask"][..., None], density * pairs, true["mask"]),
        "random graph": (
            rows[rng.integers(len(rows), size=true["mask"].shape)] * true["mask"][..., None],
            (draws | draws.swapaxes(1, 2)) * pairs,
            true["mask"],
        ),
    }
    known, wanted = (_summaries(graphs, hops) for graphs in (gallery, true))
    distances = np.square(wanted[:, None] - known[None]).sum(-1)
    labels, public_labels = class_labels(truth, lead), class_labels(public, np.shape(public.inputs["mask"])[:-1])
    allowed = {"nearest graph": np.zeros_like(distances)}
    if labels is not None and public_labels is not None:
        same = labels.reshape(-1)[:, None] == public_labels.reshape(-1)[None]
        if same.any(1).all():
            allowed["nearest of the class"] = np.where(same, 0, np.inf)
    for name, barrier in allowed.items():
        chosen = np.argmin(distances + barrier, 1)
        guesses[name] = tuple(gallery[part][chosen] for part in _check.GRAPH_PARTS)
    return {
        name: Batch(
            {
                part: array.reshape(*lead, *array.shape[1:])
                for part, array in zip(_check.GRAPH_PARTS, arrays, strict=True)
            },
            truth.labels,
        )
        for name, arrays in guesses.items()
    }


def _flat(batch: Batch) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch in float64, with one leading axis."""
    arrays = {name: np.asarray(batch.inputs[name], np.float64) for name in _check.GRAPH_PARTS}
    return {name: array.reshape(-1, *array.shape[(-1 if name == "mask" else -2) :]) for name, array in arrays.items()}


def _summaries(graphs: dict[str, np.ndarray], hops: int) -> np.ndarray:
    """Returns for every graph a row of what does not depend on the order of its nodes."""
    rows = []
    for i in range(len(graphs["mask"])):
        graph: Graph = {name: array[i] for name, array in graphs.items()}
        mixing, hidden, parts = propagation(graph), graph["nodes"], []
        for _ in range(hops + 1):
            parts.append(hidden.sum(0))
            hidden = mixing @ hidden
        rows.append(np.concatenate([*parts, np.sort(graph["adjacency"].sum(1)), [graph["mask"].sum()]]))
    return np.stack(rows)
