"""Whether two graphs are the same, up to the order of their nodes or as far as a network of L layers can tell.

A graph is given by its adjacency, of 0 and 1, and a number for each node that says of which kind the node is.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from gia_jax import _check


def wl_colors(
    adjacency: Sequence[Bool[np.ndarray, "..."]], kinds: Sequence[Int[np.ndarray, "..."]], *, hops: int | None = None
) -> list[Int[np.ndarray, " _"]]:
    """Computes the colours of Weisfeiler and Leman: nodes have the same one if their neighbourhoods look the same.

    The first colour of a node is its kind together with its degree, since a graph convolution sees the degree of every
    node that it reaches. Each round gives a node a new colour for its own one and those of its neighbours. Two nodes
    with the same colour after L rounds have the same features in every network of L layers.

    Args:
        adjacency: Adjacency of each graph, shape (n, n).
        kinds: Kind of every node of each graph, shape (n,).
        hops: Number of rounds, at least 0. None goes on until no round tells more nodes apart.

    Returns:
        The colours of every graph's nodes, shape (n,). They can be compared between the graphs of one call alone.

    Raises:
        ValueError: If `hops` is no integer of at least 0.

    Examples:
        In a path of four equal nodes the ends differ from the nodes between:

        >>> import numpy as np
        >>> from gia_jax.metrics.isomorphism import wl_colors
        >>> path = np.eye(4, k=1, dtype=bool) | np.eye(4, k=-1, dtype=bool)
        >>> wl_colors([path], [np.zeros(4, int)])[0].tolist()
        [0, 1, 1, 0]
    """
    if hops is not None:
        _check.integer(0, hops=hops)
    neighbours = [[np.flatnonzero(row) for row in np.asarray(one, bool)] for one in adjacency]
    signs: list[list[Any]] = [
        [(int(kind), len(around)) for kind, around in zip(own, rows, strict=True)]
        for own, rows in zip(kinds, neighbours, strict=True)
    ]
    colors = _numbered(signs)
    rounds, count = 0, len({color for one in colors for color in one.tolist()})
    while hops is None or rounds < hops:
        signs = [
            [(int(one[v]), tuple(sorted(one[around].tolist()))) for v, around in enumerate(rows)]
            for one, rows in zip(colors, neighbours, strict=True)
        ]
        colors, rounds = _numbered(signs), rounds + 1
        before, count = count, len({color for one in colors for color in one.tolist()})
        if count == before:
            break  # the next round would tell no more apart either
    return colors


def same_colors(
    first: tuple[Bool[np.ndarray, "n n"], Int[np.ndarray, " n"]],
    second: tuple[Bool[np.ndarray, "m m"], Int[np.ndarray, " m"]],
    *,
    hops: int | None = None,
) -> bool:
    """Tells whether two graphs have every colour of `wl_colors` equally often.

    No network of `hops` layers tells such graphs apart, whatever its weights are, so no attack on its update does.

    Args:
        first: Adjacency and kinds of the nodes of a graph.
        second: Adjacency and kinds of the nodes of the other graph.
        hops: Number of rounds, at least 0. None goes on until no round tells more nodes apart.

    Returns:
        Whether the two graphs have the same colours.

    Examples:
        Two rings of three nodes and one of six:

        >>> import numpy as np
        >>> from gia_jax.metrics.isomorphism import isomorphism, same_colors
        >>> triangle = ~np.eye(3, dtype=bool)
        >>> two, one = np.kron(np.eye(2, dtype=bool), triangle), np.roll(np.eye(6, dtype=bool), 1, 0)
        >>> rings = ((two, np.zeros(6, int)), (one | one.T, np.zeros(6, int)))
        >>> same_colors(*rings), isomorphism(*rings)
        (True, None)
    """
    found, wanted = wl_colors([first[0], second[0]], [first[1], second[1]], hops=hops)
    return Counter(found.tolist()) == Counter(wanted.tolist())


def isomorphism(
    first: tuple[Bool[np.ndarray, "n n"], Int[np.ndarray, " n"]],
    second: tuple[Bool[np.ndarray, "m m"], Int[np.ndarray, " m"]],
) -> Int[np.ndarray, " n"] | None:
    """Finds an order of a graph's nodes in which it is another graph, with the kinds of the nodes.

    Args:
        first: Adjacency and kinds of the nodes of a graph.
        second: Adjacency and kinds of the nodes of the other graph.

    Returns:
        The order p, with which `first[0][p][:, p]` equals `second[0]` and `first[1][p]` equals `second[1]`, or None
        where there is none.

    Raises:
        ImportError: If networkx is not installed, which the extra `demo` brings. It is needed only for graphs that have
            the same colours.

    Examples:
        >>> import numpy as np
        >>> from gia_jax.metrics.isomorphism import isomorphism
        >>> star = np.zeros((3, 3), bool)
        >>> star[0, 1:] = star[1:, 0] = True
        >>> kinds = np.array([0, 1, 2])
        >>> isomorphism((star, kinds), (star[[2, 0, 1]][:, [2, 0, 1]], kinds[[2, 0, 1]])).tolist()
        [2, 0, 1]
    """
    if len(first[1]) != len(second[1]):
        return None
    found, wanted = wl_colors([first[0], second[0]], [first[1], second[1]])
    if Counter(found.tolist()) != Counter(wanted.tolist()):
        return None
    try:
        import networkx as nx
        from networkx.algorithms.isomorphism import GraphMatcher
    except ImportError as error:
        raise ImportError("exact graphs need the extra 'demo': pip install 'gia-jax[demo]'") from error
    graphs = []
    for adjacency, colors in ((second[0], wanted), (first[0], found)):
        graph = nx.from_numpy_array(np.asarray(adjacency, int))
        nx.set_node_attributes(graph, dict(enumerate(colors.tolist())), "color")
        graphs.append(graph)
    # Nodes of different colours never correspond, which leaves little to search.
    matcher = GraphMatcher(*graphs, node_match=lambda one, other: one["color"] == other["color"])
    if not matcher.is_isomorphic():
        return None
    return np.array([matcher.mapping[v] for v in range(len(found))], int)


def _numbered(signs: list[list[Any]]) -> list[np.ndarray]:
    """Gives equal signs the same number, in the order in which they first occur in any of the graphs."""
    numbers: dict[Any, int] = {}
    return [np.array([numbers.setdefault(sign, len(numbers)) for sign in one], int) for one in signs]
