"""What may stand around a node: its type, its star of neighbours, and its tree of two hops.

A type is a row of features with a degree. A star is a node's type with the types of its neighbours, and a tree is a
star with the stars of the neighbours. A graph convolution of two layers tells nodes apart by their trees, and no more.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from gia_jax import _check
from gia_jax.attacks.graph_spans.network import Activation, Layer, activate, forward, members, parts_outside
from gia_jax.attacks.subspace import Subspace

CHUNK = 4096

Block = int | Float[np.ndarray, "_ _"]


class Types(NamedTuple):
    """Types of nodes, t of them.

    Attributes:
        features: Row of features of each, shape (t, f).
        degrees: Number of neighbours of each, shape (t,).
    """

    features: Float[np.ndarray, "t f"]
    degrees: Int[np.ndarray, " t"]


class Stars(NamedTuple):
    """Stars, s of them: a node with the types of its neighbours.

    Attributes:
        centres: Index of the centre's type, shape (s,).
        neighbours: Number of neighbours of each type, shape (s, t).
    """

    centres: Int[np.ndarray, " s"]
    neighbours: Int[np.ndarray, "s t"]


class Trees(NamedTuple):
    """Trees of two hops, r of them: a star with the stars of its neighbours.

    Attributes:
        stars: Index of the star in the middle, shape (r,).
        neighbours: Number of neighbours of each star, shape (r, s).
    """

    stars: Int[np.ndarray, " r"]
    neighbours: Int[np.ndarray, "r s"]


def known_rows(
    blocks: Sequence[Block], degree_block: int | None, max_degree: int | None
) -> tuple[list[Float[np.ndarray, "_ _"]], int]:
    """Returns the possible rows of each block of the features, and the largest degree.

    Args:
        blocks: Possible rows of every block, as a matrix of them, or as a number k for the k one-hot rows.
        degree_block: Index of the block whose row j says that a node has j neighbours, or None.
        max_degree: Largest number of neighbours, at least 1, or None for the largest one of the degree block.

    Returns:
        The matrix of rows of each block, and the largest degree.

    Raises:
        ValueError: If there are no blocks, a block is no matrix with rows and columns, `degree_block` is no index of a
            block, or both `degree_block` and `max_degree` are None.
    """
    rows = [np.eye(block) if isinstance(block, int | np.integer) else np.asarray(block, float) for block in blocks]
    if not rows or any(block.ndim != 2 or 0 in block.shape for block in rows):
        raise ValueError(f"blocks must be matrices of at least one row, got shapes {[block.shape for block in rows]}")
    if max_degree is not None:
        _check.integer(max_degree=max_degree)
    if degree_block is None:
        if max_degree is None:
            raise ValueError("max_degree must be given where no block of features tells the degree, got None")
        return rows, max_degree
    _check.integer(0, len(rows) - 1, degree_block=degree_block)
    told = len(rows[degree_block]) - 1
    return rows, told if max_degree is None else min(told, max_degree)


def possible_types(
    gradient: Float[np.ndarray, "f d"],
    blocks: Sequence[Float[np.ndarray, "_ _"]],
    degree_block: int | None,
    degrees: Sequence[int],
    *,
    noise: float | None,
    miss: float,
) -> Types:
    """Lists the types of nodes whose features occur at all: a feature that is 0 at every node has a gradient of 0.

    Args:
        gradient: Gradient of the first kernel.
        blocks: Rows that each block of the features may hold.
        degree_block: Index of the block whose row j says that a node has j neighbours, or None.
        degrees: Degrees that a node may have.
        noise: Standard deviation of noise on the gradient, or None for rounding alone.
        miss: Probability with which noise alone makes a feature occur.

    Returns:
        The types, all combinations of the blocks' rows.

    Raises:
        ValueError: If the blocks have more or fewer features than the gradient.
    """
    if len(gradient) != (width := sum(block.shape[1] for block in blocks)):
        raise ValueError(f"blocks must have {len(gradient)} features, as layer0 has, got {width}")
    limit = (noise or 0) * (math.sqrt(gradient.shape[1]) + math.sqrt(-2 * math.log(miss)))
    occurs = np.linalg.norm(gradient, axis=1) > limit
    kept, start = [], 0
    for i, block in enumerate(blocks):
        is_kept = ~(block[:, ~occurs[start : start + block.shape[1]]] != 0).any(1)
        if i == degree_block:
            is_kept &= np.isin(np.arange(len(block)), degrees)
        kept.append(np.flatnonzero(is_kept))
        start += block.shape[1]
    rows, found = [], []
    for choice in itertools.product(*kept):
        row = np.concatenate([block[j] for block, j in zip(blocks, choice, strict=True)])
        for degree in degrees if degree_block is None else (choice[degree_block],):
            rows.append(row)
            found.append(degree)
    return Types(np.array(rows).reshape(len(rows), len(gradient)), np.array(found, int))


def spanned_types(space: Subspace, types: Types, *, miss: float) -> Types:
    """Keeps the types whose features lie in the span of the first layer's gradient.

    Args:
        space: The span.
        types: Types of nodes.
        miss: Probability with which a true type is lost.

    Returns:
        The types that are kept.
    """
    is_kept = members(space, types.features, miss=miss)
    return Types(types.features[is_kept], types.degrees[is_kept])


def num_stars(types: Types) -> int:
    """Counts the stars over some types."""
    outer = int(np.sum(types.degrees > 0))
    return sum(math.comb(outer + k - 1, k) if k else 1 for k in types.degrees.tolist())


def all_stars(types: Types) -> Iterator[Stars]:
    """Lists all stars over some types, in pieces."""
    outer = np.flatnonzero(types.degrees > 0).tolist()
    every = (
        (centre, neighbours)
        for centre, degree in enumerate(types.degrees.tolist())
        for neighbours in itertools.combinations_with_replacement(outer, degree)
    )
    while piece := list(itertools.islice(every, CHUNK)):
        counts = np.zeros((len(piece), len(types.degrees)), int)
        sizes = [len(neighbours) for _, neighbours in piece]
        places = np.repeat(np.arange(len(piece)), sizes), [t for _, neighbours in piece for t in neighbours]
        np.add.at(counts, (places[0], np.array(places[1], int)), 1)
        yield Stars(np.array([centre for centre, _ in piece], int), counts)


def star_inputs(types: Types, stars: Stars) -> Float[np.ndarray, "s f"]:
    """Computes the averages over stars that enter the first layer."""
    scale = 1 / np.sqrt(types.degrees + 1)
    own = scale[stars.centres, None]
    return own * ((stars.neighbours * scale) @ types.features + own * types.features[stars.centres])


def tree_weights(types: Types, stars: Stars, trees: Trees) -> Float[np.ndarray, "r s"]:
    """Computes the weights with which stars enter the second layer at trees."""
    scale = 1 / np.sqrt(types.degrees[stars.centres] + 1)
    weights = scale[trees.stars, None] * trees.neighbours * scale
    weights[np.arange(len(weights)), trees.stars] += scale[trees.stars] ** 2
    return weights


def spanned_stars(types: Types, layer: Layer, activation: Activation, space: Subspace, *, miss: float) -> Stars:
    """Keeps the stars whose hidden features lie in the span of the second layer's gradient.

    Args:
        types: Types of nodes.
        layer: First layer.
        activation: Its activation.
        space: Span of the gradient of the second layer.
        miss: Probability with which a true star is lost.

    Returns:
        The stars in the span.
    """
    kept = []
    for stars in all_stars(types):
        hidden = activate(activation, forward(star_inputs(types, stars), layer))
        kept.append(_pick(stars, members(space, hidden, miss=miss)))
    return _joined(kept, types)


def completed_stars(
    types: Types, layer: Layer, activation: Activation, space: Subspace, kept: Stars, *, miss: float
) -> Iterator[Stars]:
    """Lists the sets of stars that a span of one dimension more would keep.

    The span may lack a dimension of that of the true stars, where some of these only occur in fixed combinations. The
    parts of the true stars outside of the span then lie on one line, which others hardly ever share.

    Args:
        types: Types of nodes.
        layer: First layer.
        activation: Its activation.
        space: Span of the gradient of the second layer.
        kept: Stars in the span.
        miss: Probability with which a true star is lost.

    Yields:
        For every line the stars in the span and on the line. The lines that most stars share come first.
    """
    others, parts, errors = [], [], []
    for stars in all_stars(types):
        hidden = activate(activation, forward(star_inputs(types, stars), layer))
        is_other = ~members(space, hidden, miss=miss)
        others.append(_pick(stars, is_other))
        part, error = parts_outside(space, hidden[is_other])
        parts.append(part)
        errors.append(error)
    rest = _joined(others, types)
    if len(rest.centres) > 1:
        for group in _lines(np.concatenate(parts), np.concatenate(errors)):
            yield _joined([kept, _pick(rest, group)], types)


def _lines(rows: Float[np.ndarray, "n d"], errors: Float[np.ndarray, " n"]) -> list[Int[np.ndarray, " _"]]:
    """Groups rows that lie on one line through 0 within their errors, the largest groups first, without single rows.

    Rows on one line have one ratio of their products with two probes. So those of about the same ratio are compared.
    """
    lengths = np.linalg.norm(rows, axis=1)
    angles = np.maximum(errors / lengths, 1e-9)
    rows = rows / lengths[:, None]
    probes = np.random.default_rng(0).normal(size=(rows.shape[1], 2))
    first, second = (rows @ probes).T
    turns = np.arctan(first / second)
    gaps = angles / np.hypot(first, second) * 2
    order = np.argsort(turns)
    near = np.diff(turns[order]) <= gaps[order][1:] + gaps[order][:-1]
    groups = []
    for run in np.split(order, np.flatnonzero(~near) + 1):
        while len(run) > 1:
            sines = np.sqrt(np.maximum(1 - np.square(rows[run] @ rows[run[0]]), 0))
            is_on = sines <= 2 * (angles[run] + angles[run[0]]) + 1e-7  # the sine itself has lost half of the digits
            if is_on.sum() > 1:
                groups.append(np.sort(run[is_on]))
            run = run[~is_on]
    return sorted(groups, key=len, reverse=True)


def consistent(types: Types, stars: Stars) -> Stars:
    """Drops the stars with a neighbour for which no star is there, until every one has stars for all neighbours."""
    while len(stars.centres):
        # offered[a, b]: a star of centre a with a neighbour of type b
        offered = np.zeros((len(types.degrees),) * 2, bool)
        np.logical_or.at(offered, stars.centres, stars.neighbours > 0)
        is_kept = np.array(
            [offered[n > 0, c].all() for c, n in zip(stars.centres, stars.neighbours, strict=True)], bool
        )
        if is_kept.all():
            break
        stars = _pick(stars, is_kept)
    return stars


def num_trees(stars: Stars) -> int:
    """Counts the trees over some stars."""
    total = 0
    for choices in _choices(stars):
        total += math.prod(math.comb(len(options) + count - 1, count) for options, count in choices)
    return total


def all_trees(stars: Stars) -> Trees:
    """Lists all trees over some stars: every neighbour has a star that contains the type in the middle."""
    middles, counts = [], []
    for star, choices in enumerate(_choices(stars)):
        per_type = [itertools.combinations_with_replacement(options, count) for options, count in choices]
        for picked in itertools.product(*per_type):
            middles.append(star)
            counts.append(np.bincount([s for group in picked for s in group], minlength=len(stars.centres)))
    return Trees(np.array(middles, int), np.array(counts, int).reshape(len(middles), len(stars.centres)))


def _choices(stars: Stars) -> Iterator[list[tuple[list[int], int]]]:
    """Yields, for every star, the stars that the neighbours of each type may have, and the number of neighbours."""
    for centre, neighbours in zip(stars.centres, stars.neighbours, strict=True):
        yield [
            (np.flatnonzero((stars.centres == t) & (stars.neighbours[:, centre] > 0)).tolist(), int(neighbours[t]))
            for t in np.flatnonzero(neighbours)
        ]


def _pick(stars: Stars, index: np.ndarray) -> Stars:
    return Stars(stars.centres[index], stars.neighbours[index])


def _joined(parts: Sequence[Stars], types: Types) -> Stars:
    if not parts:
        return Stars(np.zeros(0, int), np.zeros((0, len(types.degrees)), int))
    return Stars(np.concatenate([p.centres for p in parts]), np.concatenate([p.neighbours for p in parts]))
