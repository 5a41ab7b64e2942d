"""How often every tree occurs: the gradient of a graph is a sum over its nodes, which is linear in these numbers.

With the error r of the classifier known, a tree t alone decides what a node adds to the pooled features, h_t, and to
the gradients of the second layer: a_t (x) d_t for the kernel and d_t for the bias, with the average a_t that enters the
layer and d_t = s'(z_t) * (W_head r). So with weights w_t = c_t / n (means) or c_t (sums)

    u = sum w_t h_t,   grad b = sum w_t d_t,   grad W = sum w_t a_t (x) d_t,

and every edge between two stars is seen from both of its ends: two more sides of a linear equation in the counts.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
from jaxtyping import Float, Int

from gia_jax.attacks.graph_spans.candidates import Stars, Trees

SINGULAR = 1e-10  # singular values below this fraction of the largest are zeros: the equations depend on each other
FEASIBLE = 1e-6  # HiGHS takes a row for satisfied within this


class System(NamedTuple):
    """Linear equations for the weights of r trees.

    Attributes:
        matrix: Upper triangle after a reduction by orthogonal matrices, shape (k, r).
        target: Its right side, shape (k,).
        rest: Part of the right side that no weights explain, a length.
        handshakes: Differences that are 0 for every graph, integers, shape (e, r).
    """

    matrix: Float[np.ndarray, "k r"]
    target: Float[np.ndarray, " k"]
    rest: float
    handshakes: Int[np.ndarray, "e r"]


class Seen(NamedTuple):
    """What the update tells about the second layer and the pooled features.

    Attributes:
        pooled: Pooled features u, shape (m,).
        kernel: Gradient of the second kernel, in coordinates of its span, shape (q, k).
        bias: Gradient of the second bias, shape (k,), or None.
    """

    pooled: Float[np.ndarray, " m"]
    kernel: Float[np.ndarray, "q k"]
    bias: Float[np.ndarray, " k"] | None


def system(
    seen: Seen,
    averages: Float[np.ndarray, "r q"],
    hidden: Float[np.ndarray, "r m"],
    cotangents: Float[np.ndarray, "r k"],
    stars: Stars,
    trees: Trees,
) -> System:
    """Builds the equations, each part of them relative to the length of what was observed.

    Args:
        seen: What was observed.
        averages: Averages a_t that enter the second layer, in coordinates of the span.
        hidden: Features h_t after it.
        cotangents: Cotangents d_t before its activation.
        stars: Stars of the trees.
        trees: Trees.

    Returns:
        The equations.
    """
    outer = (averages[:, :, None] * cotangents[:, None]).reshape(len(hidden), -1)
    parts = [(hidden, seen.pooled), (outer, seen.kernel.ravel())]
    parts += [] if seen.bias is None else [(cotangents, seen.bias)]
    lengths = [max(float(np.linalg.norm(target)), np.finfo(float).tiny) for _, target in parts]
    rows = np.concatenate([block.T / length for (block, _), length in zip(parts, lengths, strict=True)])
    target = np.concatenate([goal / length for (_, goal), length in zip(parts, lengths, strict=True)])
    if len(rows) > len(hidden):
        triangle = np.linalg.qr(np.concatenate([rows, target[:, None]], 1)).R
        rest = float(np.linalg.norm(triangle[len(hidden) :, -1]))
        rows, target = triangle[: len(hidden), :-1], triangle[: len(hidden), -1]
    else:
        rest = 0.0
    return System(rows, target, rest, handshakes(stars, trees))


def handshakes(stars: Stars, trees: Trees) -> Int[np.ndarray, "e r"]:
    """Returns the rows whose product with the counts of a graph is 0: edges between two stars, seen from both ends."""
    rows = []
    for a in range(len(stars.centres)):
        for b in range(a):
            row = np.where(trees.stars == a, trees.neighbours[:, b], 0)
            row -= np.where(trees.stars == b, trees.neighbours[:, a], 0)
            if row.any():
                rows.append(row)
    return np.array(rows, int).reshape(len(rows), len(trees.stars))


def mismatch(equations: System, weights: Float[np.ndarray, " r"]) -> float:
    """Computes how far weights are from satisfying the equations, relative to what was observed."""
    error = equations.matrix @ weights - equations.target
    return float(np.hypot(np.linalg.norm(error), equations.rest))


def solutions(
    equations: System,
    sizes: Sequence[int] | None,
    *,
    tolerance: float,
    max_solutions: int,
    seconds: float,
    max_trees: int = 300,
) -> tuple[list[Int[np.ndarray, " r"]], float]:
    """Finds whole numbers of trees that explain what was observed.

    Args:
        equations: Equations for the weights.
        sizes: Numbers of nodes that the graph may have, in ascending order, for means; None for sums.
        tolerance: Relative mismatch of the equations that is taken for rounding.
        max_solutions: Number of solutions that are looked for at most, where there are several.
        seconds: Time that the integer programme may take for each of them.
        max_trees: Number of trees above which there is no integer programme, as it would take too long.

    Returns:
        The counts of every tree, those of the smallest graph first, and the least mismatch of any weights.
    """
    rows = equations.handshakes / np.maximum(np.linalg.norm(equations.handshakes, axis=1, keepdims=True), 1)
    full = np.concatenate([equations.matrix, rows])
    goal = np.concatenate([equations.target, np.zeros(len(rows))])
    lengths = np.maximum(np.linalg.norm(full, axis=0), np.finfo(float).tiny)
    try:
        weights = scipy.optimize.nnls(full / lengths, goal, maxiter=50 * full.shape[1])[0] / lengths
    except RuntimeError:  # it ran past its number of iterations
        return [], float("inf")
    best = mismatch(equations, weights)
    if best > tolerance:
        return [], best
    found = _rounded(equations, weights, sizes, tolerance)
    if full.shape[1] > max_trees:
        return found, best
    left, values, right = np.linalg.svd(full / lengths, full_matrices=False)
    rank = int(np.sum(values > SINGULAR * values[0]))
    if rank < full.shape[1]:
        reduced = right[:rank] * 1.0, left[:, :rank].T @ goal / values[:rank], values[:rank]
        for counts in _programmed(equations, reduced, lengths, sizes, tolerance, max_solutions, seconds):
            if not any(np.array_equal(counts, other) for other in found):
                found.append(counts)
    return sorted(found, key=lambda counts: int(counts.sum()))[:max_solutions], best


def _rounded(
    equations: System, weights: Float[np.ndarray, " r"], sizes: Sequence[int] | None, tolerance: float
) -> list[Int[np.ndarray, " r"]]:
    """Rounds weights to the counts of the smallest graph that explains what was observed, if there is one."""
    for size in (None,) if sizes is None else sizes:
        counts = np.rint(weights * (size or 1)).astype(int)
        if _explains(equations, counts, size, tolerance):
            return [counts]
    return []


def _explains(equations: System, counts: Int[np.ndarray, " r"], size: int | None, tolerance: float) -> bool:
    total = int(counts.sum())
    if total == 0 or (size is not None and total != size) or (equations.handshakes @ counts).any():
        return False
    return mismatch(equations, counts / (size or 1)) <= tolerance


def _programmed(
    equations: System,
    reduced: tuple[np.ndarray, np.ndarray, np.ndarray],
    lengths: Float[np.ndarray, " r"],
    sizes: Sequence[int] | None,
    tolerance: float,
    max_solutions: int,
    seconds: float,
) -> Iterator[Int[np.ndarray, " r"]]:
    """Solves for whole numbers by an integer programme: the smallest graph first, then others of its size at random."""
    directions, goal, values = reduced
    num = len(lengths)
    largest = max(sizes) if sizes is not None else int(1e4)
    # unknowns: the counts, and the number by which weights are multiplied
    slack = FEASIBLE + largest * tolerance / values
    middle = np.concatenate([directions * lengths, -goal[:, None]], 1)
    rows = [scipy.optimize.LinearConstraint(middle, -slack, slack)]
    if len(equations.handshakes):
        exact = np.concatenate([equations.handshakes, np.zeros((len(equations.handshakes), 1))], 1)
        rows.append(scipy.optimize.LinearConstraint(exact, 0, 0))
    if sizes is None:
        limits = scipy.optimize.Bounds(np.r_[np.zeros(num), 1], np.r_[np.full(num, largest), 1])
    else:
        rows.append(scipy.optimize.LinearConstraint(np.r_[np.ones(num), -1.0][None], 0, 0))
        limits = scipy.optimize.Bounds(np.r_[np.zeros(num), min(sizes)], np.full(num + 1, largest))
    rng = np.random.default_rng(0)
    cost = np.r_[np.zeros(num), 1.0]
    for _ in range(max_solutions):
        options = {"time_limit": seconds}
        answer = scipy.optimize.milp(
            cost, constraints=rows, bounds=limits, integrality=np.ones(num + 1), options=options
        )
        if answer.x is None:
            return
        counts = np.rint(answer.x[:num]).astype(int)
        size = None if sizes is None else int(counts.sum())
        if _explains(equations, counts, size, tolerance):
            yield counts
            if size is not None:
                limits = scipy.optimize.Bounds(np.r_[np.zeros(num), size], np.r_[np.full(num, size), size])
        cost = np.r_[rng.normal(size=num), 0.0]
