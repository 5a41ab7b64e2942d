"""The order of a reconstructed graph's nodes that is closest to that of the true graph.

A graph is a dict of "nodes" (n, f), "adjacency" (n, n) and "mask" (n,), padded or not. A reconstruction may have edges
and categories between 0 and 1, and another number of nodes than the truth. Everything runs on the host, in float64.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.optimize
from jaxtyping import Int

from gia_jax import _check
from gia_jax.data.graphs import FeatureBlock
from gia_jax.metrics.isomorphism import isomorphism

Graph = Mapping[str, np.ndarray]


def match_nodes(
    found: Graph,
    truth: Graph,
    blocks: Sequence[FeatureBlock] | None = None,
    *,
    hops: int = 2,
    threshold: float = 0.5,
    tolerance: float = 0.1,
) -> Int[np.ndarray, " n"]:
    """Finds the order of a reconstruction's nodes that is closest to the true order.

    The cost of putting node j in the place of the true node i is the sum over k = 0, ..., `hops` of the squared
    distances of rows j and i of Â^k X, each with its own graph's edges, plus the squared difference of the degrees.
    The order of least total cost is taken. Nodes are put in the places of nodes first, and padding in those of padding.
    Where the rounded graph is the true one, the order is one in which it is, because by the cost alone nodes with
    equal neighbourhoods could be exchanged one by one.

    Args:
        found: Reconstructed graph.
        truth: True graph.
        blocks: What the columns of the features are. None takes them for numbers.
        hops: Number of steps, at least 0.
        threshold: Number above which a pair of nodes counts as an edge when the graph is rounded.
        tolerance: Difference within which numbers count as equal, at least 0.

    Returns:
        The order p, an array of as many places as the larger one of the two graphs has rows: after padding both to it,
        `found["nodes"][p]` is beside `truth["nodes"]`.

    Raises:
        ValueError: If the graphs have different features, or arrays that do not fit each other, or an argument is out
            of range.

    Examples:
        >>> import numpy as np
        >>> from gia_jax.metrics import match_nodes
        >>> path = np.eye(3, k=1) + np.eye(3, k=-1)
        >>> truth = {"nodes": np.array([[1.0], [2.0], [4.0]]), "adjacency": path, "mask": np.ones(3)}
        >>> order = [2, 0, 1]
        >>> found = {"nodes": truth["nodes"][order], "adjacency": path[order][:, order], "mask": np.ones(3)}
        >>> match_nodes(found, truth).tolist()
        [1, 2, 0]
    """
    return matched(*pair(found, truth), blocks, hops, threshold, tolerance)


def permuted(graph: Graph, order: Int[np.ndarray, " n"]) -> dict[str, np.ndarray]:
    """Puts the nodes of a graph in another order.

    Args:
        graph: Graph of at most n rows, which is padded to n.
        order: Place of each node in the graph, shape (n,).

    Returns:
        The graph with n rows.

    Examples:
        >>> import numpy as np
        >>> from gia_jax.metrics.node_order import permuted
        >>> graph = {"nodes": np.array([[1.0], [2.0]]), "adjacency": np.zeros((2, 2)), "mask": np.ones(2)}
        >>> permuted(graph, np.array([1, 0]))["nodes"].tolist()
        [[2.0], [1.0]]
    """
    padded = _padded("graph", graph, len(order))
    adjacency = padded["adjacency"][order][:, order]
    return {"nodes": padded["nodes"][order], "adjacency": adjacency, "mask": padded["mask"][order]}


def matched(
    found: Graph,
    truth: Graph,
    blocks: Sequence[FeatureBlock] | None,
    hops: int,
    threshold: float,
    tolerance: float,
) -> np.ndarray:
    """Matches the nodes of two graphs of the same number of rows."""
    _check.integer(0, hops=hops)
    _check.not_negative(tolerance=tolerance)
    if not all(np.isfinite(array).all() for array in found.values()):
        return np.arange(len(found["mask"]))
    (first, second) = rounded(found, truth, blocks, threshold, tolerance)
    exact = isomorphism(first, second) if len(first[1]) == len(second[1]) else None
    if exact is not None:
        places, wanted = np.flatnonzero(found["mask"] > 0), np.flatnonzero(truth["mask"] > 0)
        order = np.empty(len(found["mask"]), int)
        order[wanted] = places[exact]
        order[truth["mask"] == 0] = np.flatnonzero(found["mask"] == 0)
        return order
    rows = [[graph["adjacency"].sum(1, keepdims=True)] for graph in (found, truth)]
    for own, graph in zip(rows, (found, truth), strict=True):
        mixing, hidden = propagation(graph), graph["nodes"]
        for _ in range(hops + 1):
            own.append(hidden)
            hidden = mixing @ hidden
    features, wanted = (np.concatenate(own, 1) for own in rows)
    costs = np.square(wanted[:, None] - features[None]).sum(-1)
    apart = truth["mask"][:, None] != found["mask"][None]
    return scipy.optimize.linear_sum_assignment(costs + apart * (costs.sum() + 1))[1]


def pair(found: Graph, truth: Graph) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns two graphs in float64, padded to the same number of rows, with masks of 0 and 1 and zeros as padding."""
    size = max(len(graph["nodes"]) for graph in (found, truth))
    first, second = _padded("found", found, size), _padded("truth", truth, size)
    if first["nodes"].shape != second["nodes"].shape:
        widths = second["nodes"].shape[1], first["nodes"].shape[1]
        raise ValueError(f"found must have the {widths[0]} features of truth, got {widths[1]}")
    return first, second


def _padded(name: str, graph: Graph, size: int) -> dict[str, np.ndarray]:
    _check.graphs(name, graph)
    nodes, adjacency, mask = (np.asarray(graph[key], np.float64) for key in _check.GRAPH_PARTS)
    count = len(nodes)
    if nodes.ndim != 2 or adjacency.shape != (count, count) or mask.shape != (count,):
        shapes = [array.shape for array in (nodes, adjacency, mask)]
        raise ValueError(f"{name} must have arrays of shape (n, f), (n, n) and (n,), got {shapes}")
    mask = np.pad((mask > 0.5) * 1.0, (0, size - count))
    nodes, adjacency = np.pad(nodes, ((0, size - count), (0, 0))), np.pad(adjacency, (0, size - count))
    there = mask[:, None] * mask[None]
    return {"nodes": np.where(mask[:, None], nodes, 0), "adjacency": np.where(there, adjacency, 0), "mask": mask}


def propagation(graph: Graph) -> np.ndarray:
    """Returns the normalised adjacency of a graph, for edges at least 0."""
    looped = np.maximum(graph["adjacency"], 0) + np.diag(graph["mask"])
    scale = graph["mask"] / np.sqrt(np.where(graph["mask"] > 0, looped.sum(1), 1))
    return scale[:, None] * looped * scale


def columns_of(blocks: Sequence[FeatureBlock], width: int) -> list[tuple[FeatureBlock, slice]]:
    """Returns every block with its columns."""
    ends = np.cumsum([len(block.names) for block in blocks])
    if not len(ends) or ends[-1] != width:
        raise ValueError(f"blocks must have the {width} columns of the features, got {ends[-1] if len(ends) else 0}")
    return [(block, slice(int(end) - len(block.names), int(end))) for block, end in zip(blocks, ends, strict=True)]


def likeliest(nodes: np.ndarray, mask: np.ndarray, blocks: Sequence[FeatureBlock]) -> np.ndarray:
    """Returns features with 1 for the likeliest category of each one-hot block, and 0 for the others."""
    nodes = nodes.copy()
    for block, columns in columns_of(blocks, nodes.shape[1]):
        if block.is_one_hot:
            nodes[:, columns] = np.eye(len(block.names))[nodes[:, columns].argmax(1)]
    return nodes * mask[:, None]


def rounded(
    found: Graph, truth: Graph, blocks: Sequence[FeatureBlock] | None, threshold: float, tolerance: float
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Returns both graphs without padding as adjacency and kinds, which are those of true nodes, or -1."""
    places = [np.flatnonzero(graph["mask"] > 0) for graph in (found, truth)]
    nodes = [graph["nodes"][own] for graph, own in zip((found, truth), places, strict=True)]
    if blocks is not None:
        nodes = [likeliest(rows, np.ones(len(rows)), blocks) for rows in nodes]
    distinct, kinds = np.unique(nodes[1], axis=0, return_inverse=True)
    near = np.abs(nodes[0][:, None] - distinct[None]).max(-1, initial=0) if len(distinct) else np.zeros((0, 0))
    found_kinds = np.where(near.min(1) <= tolerance, near.argmin(1), -1) if near.size else np.full(len(nodes[0]), -1)
    edges = [
        graph["adjacency"][own][:, own] > limit
        for graph, own, limit in zip((found, truth), places, (threshold, 0.5), strict=True)
    ]
    return (edges[0], found_kinds), (edges[1], kinds.reshape(-1))
