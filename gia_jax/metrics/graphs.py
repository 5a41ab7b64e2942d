"""Scores of a reconstructed graph. The order of nodes is no part of a graph, so the nodes are matched first.

A graph is a dict of "nodes" (n, f), "adjacency" (n, n) and "mask" (n,), padded or not. A reconstruction may have edges
and categories between 0 and 1, and another number of nodes than the truth. Everything runs on the host, in float64.

Matching makes every score better, that of a guess as well: compare only with guesses that were matched alike.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from gia_jax import _check
from gia_jax.data.graphs import FeatureBlock
from gia_jax.metrics.isomorphism import isomorphism, same_colors
from gia_jax.metrics.node_order import Graph, columns_of, likeliest, matched, pair, permuted, propagation, rounded


class GraphScores(NamedTuple):
    """Scores of one reconstructed graph after its nodes were matched to the true ones.

    A node that one of the two graphs lacks counts as a row of zeros there, and as wrong. A reconstruction that is not
    finite counts as one without nodes and edges, with infinite errors.

    Attributes:
        node_mse: Mean squared error of the nodes' features.
        propagated_mse: Mean squared error of Â X, the weighted averages over each node and its neighbours by the edges
            of its own graph. A graph convolution sees the features X through these averages alone.
        node_accuracy: Share of nodes whose features are all right, in [0, 1]: the likeliest category of one-hot
            columns, and numbers within the tolerance.
        label_accuracy: Share of nodes whose first one-hot block is right, in [0, 1]. NaN where there is none.
        edge_auc: Area under the receiver operating characteristic over pairs of nodes, in [0, 1], where 0.5 is chance.
            NaN where the true graph has no edge or all of them.
        edge_ap: Average precision over pairs of nodes, in [0, 1], where chance is the density of edges. NaN where
            the true graph has no edge or all of them.
        edge_f1: F1 score of the edges above the threshold, in [0, 1]. It is 1 where neither graph has an edge.
        edge_count_error: Difference of the numbers of edges above the threshold and of true ones, without sign.
        same_colors: Whether no network of `hops` layers tells the rounded graph from the true one, by
            `isomorphism.same_colors`.
        is_exact: Whether the rounded graph is the true one, up to the order of nodes.

    Examples:
        >>> from gia_jax.metrics.graphs import GraphScores
        >>> GraphScores(0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0, True, True).is_exact
        True
    """

    node_mse: float
    propagated_mse: float
    node_accuracy: float
    label_accuracy: float
    edge_auc: float
    edge_ap: float
    edge_f1: float
    edge_count_error: int
    same_colors: bool
    is_exact: bool


def graph_scores(
    found: Graph,
    truth: Graph,
    blocks: Sequence[FeatureBlock] | None = None,
    *,
    hops: int = 2,
    threshold: float = 0.5,
    tolerance: float = 0.1,
    order: Int[np.ndarray, " _"] | None = None,
) -> GraphScores:
    """Scores a reconstructed graph after its nodes were matched to the true ones by `match_nodes`.

    All scores are of the same order of the nodes.

    Args:
        found: Reconstructed graph.
        truth: True graph.
        blocks: What the columns of the features are. None takes them for numbers.
        hops: Number of the network's layers, for the matching and for `same_colors`, at least 0.
        threshold: Number above which a pair of nodes counts as an edge.
        tolerance: Difference within which numbers count as equal, at least 0.
        order: Order of the reconstruction's nodes, where it is known, such as `numpy.arange(n)` for a reconstruction
            that was put in the true order, one place for each row of the larger graph. None finds it.

    Returns:
        The scores.

    Raises:
        ValueError: If `order` has another number of places, or an argument is one that `match_nodes` refuses.

    Examples:
        The edge between the first two nodes was found, and one that is not there:

        >>> import numpy as np
        >>> from gia_jax.metrics.graphs import graph_scores
        >>> adjacency = np.zeros((3, 3))
        >>> adjacency[0, 1] = adjacency[1, 0] = 1
        >>> truth = {"nodes": np.diag([1.0, 2.0, 3.0]), "adjacency": adjacency, "mask": np.ones(3)}
        >>> one_more = adjacency + 0.6 * (np.eye(3, k=2) + np.eye(3, k=-2))
        >>> scores = graph_scores(truth | {"adjacency": one_more}, truth)
        >>> scores.node_accuracy, scores.edge_auc, round(scores.edge_f1, 2), scores.edge_count_error, scores.is_exact
        (1.0, 1.0, 0.67, 1, False)
    """
    found, truth = pair(found, truth)
    finite = all(np.isfinite(array).all() for array in found.values())
    if not finite:
        found = {name: np.zeros_like(array) for name, array in found.items()}
    if order is None:
        order = matched(found, truth, blocks, hops, threshold, tolerance)
    if sorted(order.tolist()) != list(range(len(truth["mask"]))):
        raise ValueError(f"order must hold each of the {len(truth['mask'])} places once, got {order.tolist()}")
    found = permuted(found, order)
    there = (found["mask"] > 0) | (truth["mask"] > 0)
    right = _right(found, truth, blocks, tolerance)[there]
    rows, columns = np.triu_indices(int(there.sum()), 1)
    soft, true = (graph["adjacency"][there][:, there][rows, columns] for graph in (found, truth))
    edges, are_edges = soft > threshold, true > 0.5
    kinds = rounded(found, truth, blocks, threshold, tolerance)
    errors = [
        float(np.mean(np.square(after - before)[there])) if finite else np.inf
        for after, before in (
            (found["nodes"], truth["nodes"]),
            (propagation(found) @ found["nodes"], propagation(truth) @ truth["nodes"]),
        )
    ]
    positives = int(edges.sum() + are_edges.sum())
    return GraphScores(
        *errors,
        node_accuracy=float(right.all(1).mean()),
        label_accuracy=float(_first_label(right, blocks)),
        edge_auc=_auc(soft, are_edges),
        edge_ap=_average_precision(soft, are_edges),
        edge_f1=2 * int((edges & are_edges).sum()) / positives if positives else 1.0,
        edge_count_error=abs(int(edges.sum()) - int(are_edges.sum())),
        same_colors=same_colors(*kinds, hops=hops),
        is_exact=isomorphism(*kinds) is not None,
    )


def graph_similarity(
    found: Graph,
    truth: Graph,
    blocks: Sequence[FeatureBlock],
    *,
    hops: int = 2,
    threshold: float = 0.5,
    seed: int = 0,
) -> Float[np.ndarray, " _"]:
    """Computes the scores GSM-0, GSM-1, ... of GRAIN (Drencheva et al., ICLR 2025), of the rounded reconstruction.

    With q the smaller number of nodes divided by the larger one, GSM-0 is q times the F1 score of the categories,
    weighted by their frequency, and averaged over the one-hot blocks by their width. GSM-k is q R^2, but at least 0, of
    the features of the matched nodes after k layers of an untrained graph convolutional network of five layers of width
    300, with ReLU after all but the last.

    Departures: The authors' program feeds the network the adjacency with loops as it is, not normalised, and keeps
    recall under the name of F1 and F1 under that of recall. Here the adjacency is normalised, as in the network that is
    attacked, and F1 is F1. Nodes are matched as for all other scores, by `match_nodes`, and a graph's features are
    those of the whole graph. Figures are therefore near theirs and not the same.

    Args:
        found: Reconstructed graph.
        truth: True graph, with at least one node.
        blocks: What the columns of the features are, at least one of them one-hot.
        hops: Largest k, from 0 to 5.
        threshold: Number above which a pair of nodes counts as an edge.
        seed: Seed of the network's weights, which are Xavier uniform.

    Returns:
        The scores for k = 0, ..., `hops`, each in [0, 1]. All are 0 for a reconstruction without nodes, or one that is
        not finite.

    Raises:
        ValueError: If no block is one-hot, `hops` is out of range, or an argument is one that `match_nodes` refuses.

    Examples:
        >>> import numpy as np
        >>> from gia_jax import data
        >>> from gia_jax.metrics.graphs import graph_similarity
        >>> path = np.eye(3, k=1) + np.eye(3, k=-1)
        >>> truth = {"nodes": np.eye(3)[[0, 1, 0]], "adjacency": path, "mask": np.ones(3)}
        >>> blocks = [data.FeatureBlock("label", ("C", "N", "O"))]
        >>> graph_similarity(truth, truth, blocks).tolist()
        [1.0, 1.0, 1.0]
    """
    _check.integer(0, 5, hops=hops)
    found, truth = pair(found, truth)
    if not any(block.is_one_hot for block in blocks):
        raise ValueError(f"blocks must hold a one-hot one, got {[block.kind for block in blocks]}")
    counts = [int(graph["mask"].sum()) for graph in (found, truth)]
    if not counts[0] or not all(np.isfinite(array).all() for array in found.values()):
        return np.zeros(hops + 1)
    adjacency = (found["adjacency"] > threshold) * 1.0
    found = {"nodes": likeliest(found["nodes"], found["mask"], blocks), "adjacency": adjacency, "mask": found["mask"]}
    order = matched(found, truth, blocks, hops, threshold, 0.1)
    both = (found["mask"][order] > 0) & (truth["mask"] > 0)
    rng = np.random.default_rng(seed)
    scores, features = [], [found["nodes"], truth["nodes"]]
    share = min(counts) / max(counts)
    f1, width = 0.0, 0
    for block, columns in columns_of(blocks, truth["nodes"].shape[1]):
        if block.is_one_hot:
            chosen, wanted = features[0][order][both][:, columns], features[1][both][:, columns]
            f1 += len(block.names) * _weighted_f1(chosen.argmax(1), wanted.argmax(1))
            width += len(block.names)
    scores.append(share * f1 / width)
    mixings = [propagation(graph) for graph in (found, truth)]
    for k in range(1, hops + 1):
        fan_in = features[0].shape[1]
        kernel = rng.uniform(-1, 1, (fan_in, 300)) * np.sqrt(6 / (fan_in + 300))
        features = [mixing @ hidden @ kernel for mixing, hidden in zip(mixings, features, strict=True)]
        features = features if k == 5 else [np.maximum(hidden, 0) for hidden in features]
        scores.append(max(0.0, share * _r_squared(features[0][order][both], features[1][both])))
    return np.array(scores)


def _right(
    found: Graph, truth: Graph, blocks: Sequence[FeatureBlock] | None, tolerance: float
) -> Bool[np.ndarray, "n _"]:
    """Tells for every row which blocks are right, in the order of the blocks. Rows of only one graph are wrong."""
    both = (found["mask"] > 0) & (truth["mask"] > 0)
    width = truth["nodes"].shape[1]
    numbers = FeatureBlock("attributes", tuple(map(str, range(width))))
    right = []
    for block, columns in columns_of([numbers] if blocks is None else blocks, width):
        after, before = found["nodes"][:, columns], truth["nodes"][:, columns]
        equal = (
            after.argmax(1) == before.argmax(1) if block.is_one_hot else (np.abs(after - before) <= tolerance).all(1)
        )
        right.append(equal & both)
    return np.stack(right, 1)


def _first_label(right: np.ndarray, blocks: Sequence[FeatureBlock] | None) -> float:
    places = [i for i, block in enumerate(blocks or ()) if block.is_one_hot]
    return float(right[:, places[0]].mean()) if places else np.nan


def _auc(soft: np.ndarray, true: np.ndarray) -> float:
    """Computes the share of pairs of an edge and a non-edge in which the edge has the larger number, ties by half."""
    positives, negatives = int(true.sum()), int((~true).sum())
    if not positives or not negatives:
        return float("nan")
    from scipy import stats  # takes a third of a second to import

    ranks = stats.rankdata(soft)
    return float((ranks[true].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _average_precision(soft: np.ndarray, true: np.ndarray) -> float:
    """Computes the sum over thresholds of precision times the recall gained, where ties are one threshold."""
    if not true.any() or true.all():
        return float("nan")
    order = np.argsort(-soft, kind="stable")
    last = np.append(np.diff(soft[order]) != 0, True)
    hits, chosen = np.cumsum(true[order])[last], np.flatnonzero(last) + 1
    return float(np.sum(np.diff(hits, prepend=0) / true.sum() * hits / chosen))


def _weighted_f1(found: np.ndarray, true: np.ndarray) -> float:
    """Computes the mean over true categories of the F1 scores, weighted by how often each occurs."""
    total = 0.0
    for category in np.unique(true):
        own, chosen = true == category, found == category
        total += own.sum() * 2 * (own & chosen).sum() / (own.sum() + chosen.sum())
    return float(total / len(true))


def _r_squared(found: np.ndarray, true: np.ndarray) -> float:
    """Computes the coefficient of determination of all entries; where all true ones are equal, 1 for equal ones."""
    error, spread = np.square(found - true).sum(), np.square(true - true.mean()).sum()
    if spread == 0:
        return float(error == 0)
    return float(1 - error / spread)
