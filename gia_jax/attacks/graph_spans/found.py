"""What the attack returns, and how much work it may do."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from gia_jax import _check
from gia_jax.attacks.graph_spans.candidates import Stars, Trees, Types
from gia_jax.base import Batch, Reconstruction


class FoundGraph(NamedTuple):
    """A graph whose gradient is the observed one.

    Attributes:
        nodes: Features of the nodes, shape (n, f), in an arbitrary order.
        adjacency: 1 for neighbours and else 0, shape (n, n).
        mismatch: Relative L2 distance of its gradient from the update, as the client computes it.
    """

    nodes: Float[np.ndarray, "n f"]
    adjacency: Int[np.ndarray, "n n"]
    mismatch: float


class Limits(NamedTuple):
    """How much work the attack may do before it gives up.

    Attributes:
        stars: Number of stars that are tested at most, at least 1.
        trees: Number of trees that are counted at most, at least 1.
        completions: Largest number of ways to complete a span that lacks a dimension, at least 0. A way counts
            only if it adds a star whose neighbours all have stars.
        counts: Number of solutions of the equations that are looked for, where they have several, at least 1.
        seconds: Time that the integer programme may take for each of these, in seconds.
        ties: Number of trees above which there is no integer programme: the equations are then solved by least squares
            alone, which finds a solution where there is only one. At least 0.
        branches: Number of half-edges that are joined while graphs are drawn, at least 1.
        graphs: Number of graphs that are returned at most, at least 1.

    Examples:
        >>> from gia_jax.attacks.graph_spans import Limits
        >>> Limits(graphs=100).branches
        20000
    """

    stars: int = 200_000
    trees: int = 3000
    completions: int = 32
    counts: int = 4
    seconds: float = 2.0
    ties: int = 300
    branches: int = 20_000
    graphs: int = 16


class GraphSpans(NamedTuple):
    """What the attack found at each stage.

    Attributes:
        label: Class of the graph, or None where the update is not that of one graph.
        types: Types of nodes (features and degrees) that the gradient of the first layer allows.
        stars: Stars that the gradient of the second layer allows, each with its centre and its neighbours.
        trees: Trees of two hops made of these.
        counts: Numbers of nodes with each tree that explain the update, the smallest graph first. Under a mean, every
            multiple of them does so too.
        graphs: Graphs of these counts, or of a multiple, whose gradient is the update, each once up to the order of its
            nodes. The update does not tell which of them it is of. Connected graphs come first, smaller ones before.
        mismatch: Least relative distance that any weights of the trees leave to what the update says of the second
            layer and the pooled features. It is infinite where the attack stopped earlier.
        stopped: Why the attack stopped, in words: "complete" where it listed all graphs of the counts. Where equations
            have several solutions, the integer programme lists those that it meets, which need not be all.

    Examples:
        A result of the attack is read from its end: how many answers there are, and whether these are all.

        >>> import numpy as np
        >>> from gia_jax.attacks.graph_spans import Types
        >>> from gia_jax.attacks.graph_spans.found import nothing
        >>> found = nothing(None, Types(np.zeros((0, 2)), np.zeros(0, int)), "the update is not that of one graph")
        >>> len(found.graphs), found.stopped
        (0, 'the update is not that of one graph')
    """

    label: int | None
    types: Types
    stars: Stars
    trees: Trees
    counts: tuple[Int[np.ndarray, " r"], ...]
    graphs: tuple[FoundGraph, ...]
    mismatch: float
    stopped: str


def nothing(label: int | None, types: Types, stopped: str) -> GraphSpans:
    """Returns the result of an attack that has stopped before it had any star."""
    size = len(types.degrees)
    stars = Stars(np.zeros(0, int), np.zeros((0, size), int))
    return GraphSpans(label, types, stars, Trees(np.zeros(0, int), np.zeros((0, 0), int)), (), (), math.inf, stopped)


def padded_inputs(graph: FoundGraph, num_nodes: int, dtype: jnp.dtype) -> dict[str, jnp.ndarray]:
    """Returns a graph as the inputs of a graph network, a batch of one.

    Args:
        graph: The graph.
        num_nodes: Number of nodes to pad to, at least its own.
        dtype: Type of the arrays.

    Returns:
        A dict of "nodes" (1, n, f), "adjacency" (1, n, n) and "mask" (1, n).
    """
    size = len(graph.adjacency)
    room = num_nodes - size
    arrays = {
        "nodes": np.pad(graph.nodes, ((0, room), (0, 0))),
        "adjacency": np.pad(graph.adjacency, (0, room)),
        "mask": np.arange(num_nodes) < size,
    }
    return {name: jnp.asarray(array[None], dtype) for name, array in arrays.items()}


def as_reconstruction(found: GraphSpans, *, num_nodes: int, which: int = 0) -> Reconstruction:
    """Turns one of the graphs found into the form that all attacks of the library return.

    Args:
        found: What the attack found.
        num_nodes: Number of nodes to pad to, at least that of the graph.
        which: Index of the graph among those found, at least 0. It plays no part where no graph was found.

    Returns:
        The reconstruction, whose loss is the graph's mismatch. Where no graph was found its inputs are zeros, its loss
        is infinite, and `is_finite` is False.

    Raises:
        ValueError: If `which` is no index of a graph, or the graph has more nodes than `num_nodes`.

    Examples:
        >>> import numpy as np
        >>> from gia_jax.attacks.graph_spans import Types, as_reconstruction
        >>> from gia_jax.attacks.graph_spans.found import nothing
        >>> missing = nothing(1, Types(np.zeros((0, 2)), np.zeros(0, int)), "for the sake of the example")
        >>> reconstruction = as_reconstruction(missing, num_nodes=3)
        >>> reconstruction.batch.inputs["nodes"].shape, bool(reconstruction.is_finite)
        ((1, 3, 2), False)
    """
    empty = FoundGraph(np.zeros((0, found.types.features.shape[1])), np.zeros((0, 0), int), math.inf)
    _check.integer(0, max(len(found.graphs) - 1, 0) if found.graphs else None, which=which)
    graph = found.graphs[which] if found.graphs else empty
    if len(graph.adjacency) > num_nodes:
        raise ValueError(f"num_nodes must be at least the graph's {len(graph.adjacency)}, got {num_nodes}")
    inputs = padded_inputs(graph, num_nodes, jnp.result_type(float))
    batch = Batch(inputs, jnp.array([found.label or 0]))
    return Reconstruction(batch, jnp.asarray(graph.mismatch), jnp.asarray(bool(found.graphs)))
