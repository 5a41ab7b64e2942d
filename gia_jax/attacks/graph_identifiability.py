"""An analysis that tells, before any attack, what the gradient of a GCN of two layers reveals about a known graph.

A star is the type of a node, its features and degree, with the types of its neighbours. A tree is the star of a node
with the stars of its neighbours. They are the colours of Weisfeiler and Leman after one and two rounds.

Let Â be the normalised adjacency with loops, H = Pi C the features of the nodes after the first layer, with the q
different rows C and their places Pi, and D the cotangents of the second layer. Its gradient is

    grad W = H^T Â^T D = C^T (Â Pi)^T D,

so that its columns span the rows of C where (Â Pi)^T D has rank q. Where nodes of different stars always occur in fixed
proportions around other nodes, Â Pi has a smaller rank, and a span test then loses stars. Where the width is at most
the number of stars, the span can be the whole space, and the test cannot tell true stars from others. GRAIN (Drencheva
et al., ICLR 2025, lemma 5.1) requires Â of full rank, which is more than is needed.

Once the stars are known, the numbers of nodes with each tree solve linear equations (`gia_jax.attacks.graph_spans`).
The span also keeps other stars whose features are linear combinations of those of the true stars. The forecast lists
the trees of all stars that are kept, and solves for their numbers as the attack does, to see whether the true numbers
are among the solutions.

On molecules that were not used to develop the code, the forecast was right in 83 of 84 attacks, of which 37 failed
(`benchmarks/graph_spans.py`). The forecast shares the test of stars, the solver and the limits with the attack, so
these figures do not test those parts.

The gradient of such a network never reveals two things: the component of the features in the null space of Â, and
which of the graphs with the same trees of two hops was the client's.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Float, Int

from gia_jax import _check
from gia_jax.attacks.graph_spans.attack import DEFAULT_LIMITS
from gia_jax.attacks.graph_spans.candidates import (
    Block,
    Types,
    all_trees,
    known_rows,
    num_stars,
    num_trees,
    possible_types,
)
from gia_jax.attacks.graph_spans.counts import solutions
from gia_jax.attacks.graph_spans.found import Limits, nothing
from gia_jax.attacks.graph_spans.network import Activation, Layer, Layers, activate, forward, layers, tail
from gia_jax.attacks.graph_spans.pooled import Pooled
from gia_jax.attacks.graph_spans.stages import Known, equations, kept_stars
from gia_jax.base import Params

# Singular values below this fraction of the largest are rounding errors of float64, with a margin for the products.
TOLERANCE = 1e-11
EPSILON = float(np.finfo(float).eps)
MISS = 1e-3  # probability to lose a true star, the default of the attack


class GraphIdentifiability(NamedTuple):
    """Result of `graph_identifiability`: whether the gradient of a graph reveals the graph, and the numbers behind it.

    Attributes:
        num_types: Number of different types of nodes. A type is the features and the degree of a node.
        num_stars: Number of different stars. A star is the type of a node with the types of its neighbours.
        num_trees: Number of different trees of two hops. A tree is the star of a node with the stars of its neighbours,
            and the network gives nodes with equal trees equal embeddings.
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
        num_kept: Number of stars that the span keeps, true stars and others. It is 0 if the span loses a true star.
        num_candidates: Number of trees that consist of these stars. The attack solves for their numbers of nodes.
        num_counts: Number of solutions that are found, at most `limits.counts`. It is above 1 if several numbers of
            trees explain the update.
        is_recoverable: Whether `graph_spans` is expected to find the graph's trees, in exact arithmetic.
        reason: Reason for this verdict in words.

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
    num_kept: int
    num_candidates: int
    num_counts: int
    is_recoverable: bool
    reason: str


def graph_identifiability(
    params: Params,
    nodes: Float[np.ndarray, "n f"],
    adjacency: Float[np.ndarray, "k k"],
    label: int,
    *,
    blocks: Sequence[Block] | None = None,
    degree_block: int | None = None,
    max_degree: int | None = None,
    max_nodes: int | None = None,
    activation: Activation = jax.nn.relu,
    activate_last: bool = True,
    readout: Literal["mean", "sum", "nodewise"] = "mean",
    limits: Limits = DEFAULT_LIMITS,
) -> GraphIdentifiability:
    """Computes whether the gradient of a known graph reveals the graph, up to graphs with the same trees of two hops
    (its rank condition refines lemma 5.1 of GRAIN, Drencheva et al., ICLR 2025).

    It is a forecast for `graph_spans` in exact arithmetic. Rounding and noise can make an attack fail beyond it.

    Args:
        params: Parameters of a GCN of two layers, as `models.GCN` has them.
        nodes: Features of the nodes, shape (n, f), without padding.
        adjacency: 1 for neighbours and else 0, symmetric, without loops, shape (k, k) with k = n.
        label: Class of the graph, at least 0 and below the number of classes.
        blocks: Blocks of the features that the attacker knows, as for `graph_spans`. None stands for an attacker who
            knows which types of nodes occur in the graph, which is the strongest knowledge of types.
        degree_block: Index of the block whose row j says that a node has j neighbours, or None.
        max_degree: Largest number of neighbours that the attacker considers. None takes it from the degree block.
        max_nodes: Largest number of nodes that the attacker considers. None stands for an attacker who knows the number
            of nodes.
        activation: Activation of the network.
        activate_last: Whether the activation is applied after the second layer as well.
        readout: How the network computes logits from the nodes: "mean", "sum" or "nodewise".
        limits: Limits on the work of the attack.

    Returns:
        The verdict with its reason, and the numbers behind it.

    Raises:
        ValueError: If the parameters are not those of such a network, `nodes` or `adjacency` has another shape or holds
            invalid values, `label` is no class, the blocks have another number of features than the network, or
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
    known, answer = _simulated(network, nodes, mixing, label, activation, activate_last, readout)
    known = known._replace(sizes=[size] if max_nodes is None else range(1, max_nodes + 1))
    hidden = activate(activation, forward(mixing @ nodes, network.first))
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
        gradient_rank=_rank(known.update.second.kernel),
        num_collinear=_num_collinear(rows),
        num_twins=int(np.sum(np.triu(adjacency > 0, 1) & (looped[:, None] == looped[None]).all(2))),
        num_kept=0,
        num_candidates=0,
        num_counts=0,
        is_recoverable=False,
        reason="",
    )
    if blocks is None:
        distinct = np.unique(np.concatenate([nodes, adjacency.sum(1, keepdims=True)], 1), axis=0)
        choices = [Types(distinct[:, :-1], distinct[:, -1].astype(int))]
    else:
        known_blocks, largest = known_rows(blocks, degree_block, max_degree)
        degrees = range(largest + 1)
        gradient = known.update.first.kernel
        every = possible_types(gradient, known_blocks, degree_block, degrees, noise=None, miss=MISS)
        choices = known.choices(every)
    return _judged(numbers, known, answer, choices, nodes, adjacency, limits)


def _judged(
    numbers: GraphIdentifiability,
    known: Known,
    answer: Pooled,
    choices: Sequence[Types],
    nodes: Float[np.ndarray, "n f"],
    adjacency: Float[np.ndarray, "n n"],
    limits: Limits,
) -> GraphIdentifiability:
    """Decides whether the span and the equations determine the numbers of trees, and gives the reason."""
    if not numbers.gradient_rank:
        return numbers._replace(reason="the second layer's gradient is 0")
    places = [_places(np.c_[nodes, adjacency.sum(1)], np.c_[one.features, one.degrees]) for one in choices]
    complete = [i for i, place in enumerate(places) if place.min() >= 0]
    if not complete:
        node = int(np.argmin(places[-1]))
        return numbers._replace(
            reason=f"the first layer's gradient and the blocks do not allow the type of node {node}"
        )
    types, place = choices[complete[0]], places[complete[0]]
    if (number := num_stars(types)) > limits.stars:
        return numbers._replace(reason=f"limits.stars: there are {number} stars, more than {limits.stars}")
    around = _around(place, adjacency, len(types.degrees))
    space = known.space()
    missing = numbers.hidden_rank - int(space.rank)
    tried = limits._replace(completions=0) if missing > 1 else limits  # a completion adds one dimension
    for stars in kept_stars(known, types, space, tried):
        star = _places(around, np.c_[stars.centres, stars.neighbours])
        if star.min() >= 0:
            break
    else:
        return numbers._replace(reason=_loss(numbers, missing, limits))
    numbers = numbers._replace(num_kept=len(stars.centres), num_candidates=num_trees(stars))
    kept = f"the span keeps {numbers.num_kept} stars, {numbers.num_stars} of them true, with"
    if numbers.num_collinear:
        kept = f"{numbers.num_collinear} pairs of stars share a direction; {kept}"
    if numbers.num_candidates > limits.trees:
        return numbers._replace(reason=f"{kept} {numbers.num_candidates} trees: more than limits.trees, {limits.trees}")
    trees = all_trees(stars)
    tree = _places(_around(star, adjacency, len(stars.centres)), np.c_[trees.stars, trees.neighbours])
    found = nothing(answer.label, types, "")._replace(stars=stars, trees=trees)
    linear, tolerance = equations(known, answer, found, space)
    true = np.bincount(tree, minlength=len(trees.stars))
    counts, _ = solutions(
        linear,
        None if known.is_sum else known.sizes,
        tolerance=tolerance,
        max_solutions=limits.counts,
        seconds=limits.seconds,
        max_trees=limits.ties,
    )
    numbers = numbers._replace(num_counts=len(counts))
    # Under a mean readout all multiples of the numbers of trees explain the update, and the attack tries them all.
    is_found = any(np.array_equal(one * true.sum(), true * one.sum()) for one in counts)
    if is_found:
        several = "" if len(counts) == 1 else f", as do {len(counts) - 1} others"
        reason = f"{kept} {len(trees.stars)} trees: the true numbers of these explain the update{several}"
    else:
        others = f"; {len(counts)} others do" if counts else ""
        reason = (
            f"{kept} {len(trees.stars)} trees: the true numbers of these are not found to explain the update{others}"
        )
    return numbers._replace(is_recoverable=is_found, reason=reason)


def _loss(numbers: GraphIdentifiability, missing: int, limits: Limits) -> str:
    """Returns the reason why the span, which lacks some dimensions, has lost true stars."""
    if numbers.num_stars >= numbers.width:
        return f"there are {numbers.num_stars} stars in {numbers.width} dimensions"
    cause = (
        f"stars occur in fixed combinations (rank {numbers.mixing_rank} of {numbers.num_stars})"
        if numbers.mixing_rank < numbers.num_stars
        else "the cotangents of the second layer have too small a rank"
    )
    lost = f"the gradient's span lacks {missing} dimensions of the stars': {cause}"
    return lost if missing > 1 else f"{lost}, and none of {limits.completions} completions contains all true stars"


def _places(rows: np.ndarray, table: np.ndarray) -> Int[np.ndarray, " n"]:
    """Returns the index of each row in a table, or -1 for a row that the table lacks."""
    known = {tuple(row): i for i, row in enumerate(table.round(9).tolist())}
    return np.array([known.get(tuple(row), -1) for row in rows.round(9).tolist()], int)


def _around(classes: Int[np.ndarray, " n"], adjacency: Float[np.ndarray, "n n"], number: int) -> np.ndarray:
    """Returns the class of each node, and how many of its neighbours are of each class."""
    return np.c_[classes, adjacency @ np.eye(number)[classes]].astype(int)


def _classes(rows: np.ndarray) -> Int[np.ndarray, " n"]:
    """Numbers the different rows."""
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)


def _refined(classes: Int[np.ndarray, " n"], adjacency: Float[np.ndarray, "n n"]) -> Int[np.ndarray, " n"]:
    """Numbers the classes of nodes together with those of their neighbours."""
    return _classes(_around(classes, adjacency, int(classes.max()) + 1))


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


def _simulated(
    network: Layers,
    nodes: Float[np.ndarray, "n f"],
    mixing: Float[np.ndarray, "n n"],
    label: int,
    activation: Activation,
    activate_last: bool,
    readout: str,
) -> tuple[Known, Pooled]:
    """Computes the gradient of the cross-entropy, but for the layers of a readout, and what the last layer tells."""
    weight = 1.0 if readout == "sum" else 1 / len(nodes)
    first = mixing @ nodes
    z = forward(first, network.first)
    value, pull_back = jax.vjp(activation, jnp.asarray(z))
    second = mixing @ np.asarray(value)
    last = forward(second, network.second)
    none = np.zeros(network.head.kernel.shape[1])
    values, _ = tail(activation, activate_last, network, nodes, last, none)
    features = weight * values.sum(0)
    logits = forward(features[None], network.head)[0]
    error = scipy.special.softmax(logits) - np.eye(len(logits))[label]
    after = weight * tail(activation, activate_last, network, nodes, last, error)[1]
    before = np.asarray(pull_back(jnp.asarray(mixing @ after @ network.second.kernel.T))[0])
    update = Layers(
        Layer(first.T @ before, None if network.first.bias is None else before.sum(0)),
        Layer(second.T @ after, None if network.second.bias is None else after.sum(0)),
        (),
        Layer(np.outer(features, error), None if network.head.bias is None else error),
    )
    known = Known(
        network, update, activation, activate_last, [len(nodes)], readout == "sum", False, 3, None, MISS, EPSILON, None
    )
    return known, Pooled(label, error, features)


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
