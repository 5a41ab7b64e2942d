"""An analysis that tells, before any attack, what the gradient of a GCN of two layers says about a known graph.

Let Â be the normalised adjacency with loops, H = Pi C the features of the nodes after the first layer, with the q
different rows C and their places Pi, and D the cotangents of the second layer. Its gradient is

    grad W = H^T Â^T D = C^T (Â Pi)^T D,

so that its columns span the rows of C where (Â Pi)^T D has rank q. Where nodes of different stars always occur in fixed
proportions around other nodes, Â Pi has a smaller rank, and a span test then loses stars. It keeps everything where
the network is not wider than the stars are many. GRAIN (Drencheva et al., ICLR 2025, lemma 5.1) asks for Â of full
rank, which is more than is needed.

Two things no network of this kind tells: how Â's null space enters the features, and which of the graphs with the same
trees of two hops it is.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from gia_jax import _check
from gia_jax.attacks.graph_spans.network import Activation, Layers, activate, forward, layers, tail
from gia_jax.base import Params

# Singular values below this fraction of the largest are rounding errors of float64, with a margin for the products.
TOLERANCE = 1e-11


class GraphIdentifiability(NamedTuple):
    """What the gradient of a graph can tell, by the numbers that decide it.

    Attributes:
        num_types: Number of different types of nodes: features and degree.
        num_stars: Number of different stars: a type with the types of the neighbours.
        num_trees: Number of different trees of two hops, which is all that the network tells apart.
        num_nodes: Number of nodes.
        blind_dimension: Dimension of the null space of Â. Continuous features are known up to it alone.
        width: Number of features after the first layer, in which stars are tested.
        hidden_rank: Rank of the features after the first layer. Below `num_stars` some are combinations of others.
        mixing_rank: Rank of Â Pi, at most `num_stars`.
        gradient_rank: Rank of the second layer's gradient.
        num_collinear: Number of pairs of stars whose features after the first layer have one direction. Networks with
            ReLU and without biases have them, as scales are then lost.
        num_twins: Number of pairs of neighbours with the same neighbours otherwise, whose embeddings are always equal:
            only the sum of their features can be found.
        is_recoverable: Whether `graph_spans` can be expected to find the graph's trees, in exact arithmetic.
        reason: Why, in words.

    Examples:
        >>> from gia_jax import attacks
        >>> attacks.GraphIdentifiability._fields[:3]
        ('num_types', 'num_stars', 'num_trees')
    """

    num_types: int
    num_stars: int
    num_trees: int
    num_nodes: int
    blind_dimension: int
    width: int
    hidden_rank: int
    mixing_rank: int
    gradient_rank: int
    num_collinear: int
    num_twins: int
    is_recoverable: bool
    reason: str


def graph_identifiability(
    params: Params,
    nodes: Float[np.ndarray, "n f"],
    adjacency: Float[np.ndarray, "k k"],
    label: int,
    *,
    activation: Activation = jax.nn.relu,
    activate_last: bool = True,
    readout: Literal["mean", "sum", "nodewise"] = "mean",
) -> GraphIdentifiability:
    """Computes what the gradient of one graph can tell, for a graph that is known.

    It says whether exact recovery is possible up to graphs with the same trees of two hops. It is a forecast for
    `graph_spans` in exact arithmetic: rounding, noise and limits on its work come on top.

    Args:
        params: Parameters of a GCN of two layers, as `models.GCN` has them.
        nodes: Features of the nodes, shape (n, f), without padding.
        adjacency: 1 for neighbours and else 0, symmetric, without loops, shape (k, k) with k = n.
        label: Class of the graph, a column of the head.
        activation: Activation of the network.
        activate_last: Whether it is applied after the second layer as well.
        readout: How the network gets from nodes to logits: "mean", "sum" or "nodewise".

    Returns:
        The numbers and the verdict.

    Raises:
        ValueError: If the parameters are not those of such a network, the graph does not fit them or is none, or
            float64 is not enabled.

    Examples:
        A path of two equal nodes has one star and one tree, and Â adds up the two nodes:

        >>> import jax, numpy as np
        >>> from flax import nnx
        >>> from gia_jax import attacks, models
        >>> _, params = models.functional(models.GCN(2, 3, widths=(20, 20), rngs=nnx.Rngs(0)))
        >>> edge = np.array([[0.0, 1.0], [1.0, 0.0]])
        >>> with jax.enable_x64(True):
        ...     told = attacks.graph_identifiability(params, np.eye(2)[[0, 0]], edge, label=1)
        >>> told.num_stars, told.num_trees, told.blind_dimension, told.is_recoverable
        (1, 1, 1, True)
    """
    if jnp.result_type(float) != jnp.float64:
        raise ValueError(f"graph_identifiability needs float64: set jax_enable_x64, got {jnp.result_type(float)}")
    network = layers("params", params, nodewise=readout == "nodewise")
    _check_graph(network, nodes, adjacency, label)
    size = len(nodes)
    looped = adjacency + np.eye(size)
    scale = 1 / np.sqrt(looped.sum(1))
    mixing = scale[:, None] * looped * scale
    types = _classes(np.concatenate([nodes, looped.sum(1, keepdims=True)], 1))
    stars = _refined(types, adjacency)
    trees = _refined(stars, adjacency)
    hidden = activate(activation, forward(mixing @ nodes, network.first))
    cotangents = _cotangents(network, nodes, mixing, hidden, label, activation, activate_last, readout)
    rows = hidden[np.unique(stars, return_index=True)[1]]
    numbers = GraphIdentifiability(
        num_types=len(set(types.tolist())),
        num_stars=len(rows),
        num_trees=len(set(trees.tolist())),
        num_nodes=size,
        blind_dimension=size - _rank(mixing),
        width=hidden.shape[1],
        hidden_rank=_rank(hidden),
        mixing_rank=_rank(mixing @ np.eye(len(rows))[stars]),
        gradient_rank=_rank((mixing @ hidden).T @ cotangents),
        num_collinear=_num_collinear(rows),
        num_twins=int(np.sum(np.triu(adjacency > 0, 1) & (looped[:, None] == looped[None]).all(2))),
        is_recoverable=False,
        reason="",
    )
    is_recoverable, reason = _verdict(numbers)
    return numbers._replace(is_recoverable=is_recoverable, reason=reason)


def _verdict(numbers: GraphIdentifiability) -> tuple[bool, str]:
    """Says whether the stars can be told by their span, and why."""
    missing = numbers.hidden_rank - numbers.gradient_rank
    if numbers.num_stars >= numbers.width:
        return False, f"there are {numbers.num_stars} stars in {numbers.width} dimensions: a span tells nothing apart"
    if missing > 1:
        cause = (
            f"stars occur in fixed combinations (rank {numbers.mixing_rank} of {numbers.num_stars})"
            if numbers.mixing_rank < numbers.num_stars
            else "the cotangents of the second layer have too small a rank"
        )
        return False, f"the gradient's span lacks {missing} dimensions of the stars': {cause}"
    span = (
        "the gradient spans all stars"
        if missing == 0
        else "the gradient's span lacks one dimension, a line completes it"
    )
    if numbers.num_collinear:
        return True, f"{span}; {numbers.num_collinear} pairs of them share a direction, which leaves more candidates"
    return True, span


def _classes(rows: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"]:
    """Numbers the different rows."""
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)


def _refined(classes: Int[np.ndarray, " n"], adjacency: Float[np.ndarray, "n n"]) -> Int[np.ndarray, " n"]:
    """Numbers the classes of nodes together with those of their neighbours."""
    around = adjacency @ np.eye(classes.max() + 1)[classes]
    return _classes(np.concatenate([classes[:, None], around], 1))


def _rank(matrix: Float[np.ndarray, "n m"]) -> int:
    """Computes the rank; columns count alike whatever their lengths."""
    lengths = np.linalg.norm(matrix, axis=0)
    values = np.linalg.svd(matrix[:, lengths > 0] / lengths[lengths > 0], compute_uv=False)
    return int(np.sum(values > TOLERANCE * values[0])) if len(values) else 0


def _num_collinear(rows: Float[np.ndarray, "q d"]) -> int:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(lengths > 0, lengths, 1)
    apart = np.linalg.norm(unit[:, None] - unit[None], axis=2)
    return int(np.sum(np.triu(apart < 1e-9, 1)))


def _cotangents(
    network: Layers,
    nodes: Float[np.ndarray, "n f"],
    mixing: Float[np.ndarray, "n n"],
    hidden: Float[np.ndarray, "n d"],
    label: int,
    activation: Activation,
    activate_last: bool,
    readout: str,
) -> Float[np.ndarray, "n m"]:
    """Computes the derivative of the cross-entropy by the outputs of the second layer before its activation."""
    weight = 1.0 if readout == "sum" else 1 / len(nodes)
    z = forward(mixing @ hidden, network.second)
    none = np.zeros(network.head.kernel.shape[1])
    values, _ = tail(activation, activate_last, network, nodes, z, none)
    logits = forward(weight * values.sum(0, keepdims=True), network.head)[0]
    shifted = np.exp(logits - logits.max())
    error = shifted / shifted.sum() - np.eye(len(logits))[label]
    return weight * tail(activation, activate_last, network, nodes, z, error)[1]


def _check_graph(network: Layers, nodes: np.ndarray, adjacency: np.ndarray, label: int) -> None:
    size, features = len(nodes), len(network.first.kernel)
    if nodes.shape != (size, features) or size == 0:
        raise ValueError(f"nodes must have shape (n, {features}) with n > 0, as layer0 has, got {nodes.shape}")
    if adjacency.shape != (size, size):
        raise ValueError(f"adjacency must have shape {(size, size)}, as there are {size} nodes, got {adjacency.shape}")
    wrong = ~np.isin(adjacency, (0, 1)) | (adjacency != adjacency.T) | (np.eye(size, dtype=bool) & (adjacency != 0))
    if wrong.any():
        i, j = np.argwhere(wrong)[0]
        got = f"[{i}, {j}] = {adjacency[i, j]} and [{j}, {i}] = {adjacency[j, i]}"
        raise ValueError(f"adjacency must be of 0 and 1, symmetric and without loops, got {got}")
    _check.finite("nodes", nodes)
    _check.integer(0, network.head.kernel.shape[1] - 1, label=label)
