"""The stages between the types of nodes and the graphs: stars, trees, counts, and graphs with their certificates."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from gia_jax.attacks.graph_spans.candidates import (
    Stars,
    Types,
    all_trees,
    completed_stars,
    consistent,
    num_stars,
    num_trees,
    spanned_stars,
    spanned_types,
    star_inputs,
    tree_weights,
)
from gia_jax.attacks.graph_spans.counts import Seen, System, solutions, system
from gia_jax.attacks.graph_spans.found import FoundGraph, GraphSpans, Limits, nothing, padded_inputs
from gia_jax.attacks.graph_spans.network import Activation, Layers, activate, forward, span, tail
from gia_jax.attacks.graph_spans.pooled import Pooled
from gia_jax.attacks.graph_spans.realization import Budget, Drawn, realizations
from gia_jax.attacks.subspace import Subspace
from gia_jax.base import Batch, ClientFn, Observation

# Mismatch, in units of the spacing of the update's type, that two orders of summation make at most.
SPACINGS = 256.0


class Known(NamedTuple):
    """What the attacker knows of one update and of how it came about.

    Attributes:
        params: Layers of the network.
        update: Their gradients.
        activation: Activation of the network.
        activate_last: Whether it is applied after the second layer.
        sizes: Numbers of nodes that the graph may have, in ascending order.
        is_sum: Whether the network adds up the nodes, where it would otherwise average over them.
        connected: Whether the graph is connected.
        min_cycle: Length below which it has no cycles.
        noise: Standard deviation of noise on the update, or None for rounding alone.
        miss: Probability with which a true candidate is lost to the noise.
        spacing: Relative spacing of the update's type.
        tolerance: Relative mismatch that is accepted, or None for what the noise explains.
    """

    params: Layers
    update: Layers
    activation: Activation
    activate_last: bool
    sizes: Sequence[int]
    is_sum: bool
    connected: bool
    min_cycle: int
    noise: float | None
    miss: float
    spacing: float
    tolerance: float | None

    def choices(self, every: Types) -> list[Types]:
        """Returns the types in the span of the first layer's gradient, followed by all types if there are more."""
        space = span(self.update.first.kernel, spacing=self.spacing, noise=self.noise, miss=self.miss)
        spanned = spanned_types(space, every, miss=self.miss)
        return [spanned, every] if len(spanned.degrees) < len(every.degrees) else [every]

    def space(self) -> Subspace:
        """Returns the span of the second layer's gradient."""
        return span(self.update.second.kernel, spacing=self.spacing, noise=self.noise, miss=self.miss)

    def accepted(self, *parts: np.ndarray) -> float:
        """Returns the mismatch that errors explain, for parts of the update that count relative to their lengths.

        The squared length of Gaussian noise on k entries is below k + 4 sqrt(k) variances but for one time in a
        hundred, or less.
        """
        if self.tolerance is not None:
            return self.tolerance
        total = SPACINGS * self.spacing
        if self.noise:
            tiny = np.finfo(float).tiny
            shares = [(p.size + 4 * math.sqrt(p.size)) / max(float(np.sum(np.square(p))), tiny) for p in parts]
            total += self.noise * math.sqrt(sum(shares))
        return total


def counted(known: Known, answers: Sequence[Pooled], choices: Sequence[Types], limits: Limits) -> Iterator[GraphSpans]:
    """Yields the results with the stars of the span, and then with those of each way to complete the span.

    It ends where weights of more than `limits.ties` trees explain the update: with further trees the equations would
    leave their numbers open as well.

    Args:
        known: What the attacker knows.
        answers: What error and features of the last layer may be, at least one.
        choices: Sets of types of nodes, in the order in which they are tried.
        limits: How much work may be done.

    Yields:
        The results without graphs, with a reason in `stopped` if there are no counts.
    """
    space = known.space()
    for types in choices:
        found = nothing(answers[0].label, types, "no type of node is in the span of the first layer's gradient")
        if not len(types.degrees):
            yield found
            continue
        if (number := num_stars(types)) > limits.stars:
            yield found._replace(stopped=f"limits.stars: there are {number} stars, more than {limits.stars}")
            continue
        for stars in kept_stars(known, types, space, limits):
            if not len(stars.centres):
                yield found._replace(stars=stars, stopped="no star has stars for all of its neighbours")
                continue
            if (number := num_trees(stars)) > limits.trees:
                stopped = f"limits.trees: there are {number} trees, more than {limits.trees}"
                yield found._replace(stars=stars, stopped=stopped)
                continue
            trees = all_trees(stars)
            for answer in answers:
                named = found._replace(label=answer.label, stars=stars, trees=trees)
                solved, is_explained = _solved(known, answer, named, space, limits)
                yield solved
                if is_explained and number > limits.ties:
                    return


def kept_stars(known: Known, types: Types, space: Subspace, limits: Limits) -> Iterator[Stars]:
    """Yields the stars of the span that have stars for all neighbours, and then the larger sets of each completion.

    Args:
        known: What the attacker knows.
        types: Types of nodes.
        space: Span of the second layer's gradient.
        limits: How much work may be done. A completion counts if it leads to a set of stars that was not yielded yet.

    Yields:
        The sets of stars. The first one may be empty.
    """
    first, activation, miss = known.params.first, known.activation, known.miss
    inside = spanned_stars(types, first, activation, space, miss=miss)
    stars = consistent(types, inside)
    yield stars
    seen, left = {frozenset(), _names(stars)}, limits.completions
    completed = completed_stars(types, first, activation, space, inside, miss=miss)
    while left and (kept := next(completed, None)) is not None:
        stars = consistent(types, kept)
        if (names := _names(stars)) not in seen:
            yield stars
            seen.add(names)
            left -= 1


def _names(stars: Stars) -> frozenset[tuple[int, ...]]:
    return frozenset(map(tuple, np.c_[stars.centres, stars.neighbours].tolist()))


def equations(known: Known, answer: Pooled, found: GraphSpans, space: Subspace) -> tuple[System, float]:
    """Builds the equations for the numbers of trees.

    Args:
        known: What the attacker knows.
        answer: Error and pooled features of the last layer.
        found: Results with types, stars and trees.
        space: Span of the second layer's gradient.

    Returns:
        The equations, and the largest relative mismatch that noise and rounding explain.
    """
    types, stars, trees = found.types, found.stars, found.trees
    basis = np.asarray(space.basis)[:, : int(space.rank)]
    hidden = activate(known.activation, forward(star_inputs(types, stars), known.params.first))
    averages = tree_weights(types, stars, trees) @ hidden
    nodes = types.features[stars.centres[trees.stars]]
    last = forward(averages, known.params.second)
    values, cotangents = tail(known.activation, known.activate_last, known.params, nodes, last, answer.error)
    gradient = known.update.second
    seen = Seen(answer.features, basis.T @ gradient.kernel, gradient.bias)
    parts = [part for part in (seen.kernel, seen.bias, known.update.head.kernel) if part is not None]
    return system(seen, averages @ basis, values, cotangents, stars, trees), known.accepted(*parts, answer.error)


def _solved(
    known: Known, answer: Pooled, found: GraphSpans, space: Subspace, limits: Limits
) -> tuple[GraphSpans, bool]:
    """Solves for the counts of trees, and tells whether real weights of the trees explain the update."""
    linear, tolerance = equations(known, answer, found, space)
    counts, mismatch = solutions(
        linear,
        None if known.is_sum else known.sizes,
        tolerance=tolerance,
        max_solutions=limits.counts,
        seconds=limits.seconds,
        max_trees=limits.ties,
    )
    is_explained = mismatch <= tolerance
    stopped = "no numbers of trees explain the update"
    if is_explained:
        stopped = f"weights of the {len(found.trees.stars)} trees explain the update, and no whole numbers were found"
    return found._replace(counts=tuple(counts), mismatch=mismatch, stopped="" if counts else stopped), is_explained


def drawn(client_fn: ClientFn, observation: Observation, known: Known, found: GraphSpans, limits: Limits) -> GraphSpans:
    """Draws the graphs of the counts, and of their multiples under a mean, and keeps those of the observed gradient.

    The graphs of counts with equal numbers of nodes are drawn in turn.

    Args:
        client_fn: Client that was attacked.
        observation: What the attacker sees.
        known: What the attacker knows.
        found: What was found up to the counts.
        limits: How much work may be done.

    Returns:
        What was found, with the graphs.
    """
    graphs: list[FoundGraph] = []
    budget = Budget(limits.branches)
    update = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(observation.update)])
    tolerance, stopped = known.accepted(update), ""
    for (is_connected, _), group in itertools.groupby(
        _orders(found.counts, known), lambda pair: (pair[1], pair[0].sum())
    ):
        drawings = [
            realizations(found.trees, counts, connected=is_connected, min_cycle=known.min_cycle, budget=budget)
            for counts, _ in group
        ]
        for one in _in_turn(drawings):
            if not is_connected and _is_connected(one.adjacency):
                continue  # it was listed before
            graph = _certified(client_fn, observation, found, one, max(known.sizes))
            if graph.mismatch <= tolerance:
                graphs.append(graph)
            if len(graphs) == limits.graphs:
                stopped = f"limits.graphs: {limits.graphs} graphs were found, and there may be more"
                break
        if budget.left < 0:
            stopped = f"limits.branches: {limits.branches} half-edges were joined, and there may be more graphs"
        if stopped:
            break
    return found._replace(graphs=tuple(graphs), stopped=stopped or _end(found, bool(graphs), limits))


def _in_turn(drawings: list[Iterator[Drawn]]) -> Iterator[Drawn]:
    """Yields one graph of each list in turn, so that counts with many graphs do not crowd out the others."""
    while drawings:
        for drawing in list(drawings):
            if (one := next(drawing, None)) is None:
                drawings.remove(drawing)
            else:
                yield one


def _end(found: GraphSpans, has_graphs: bool, limits: Limits) -> str:
    """Says why the attack ends where the search for graphs of its counts came to an end."""
    if not has_graphs:
        return "no graph of at most the largest size has these numbers of trees"
    if len(found.trees.stars) > limits.ties:
        return f"limits.ties: there are {len(found.trees.stars)} trees, and other numbers of them were not looked for"
    if len(found.counts) == limits.counts > 1:
        return f"limits.counts: {limits.counts} numbers of trees were found, and there may be more"
    return "complete"


def _orders(counts: Sequence[Int[np.ndarray, " _"]], known: Known) -> Iterator[tuple[Int[np.ndarray, " r"], bool]]:
    """Yields counts, those of smaller graphs first, and whether the graph has to be connected."""
    every: dict[bytes, np.ndarray] = {}
    for base in counts:
        smallest = base if known.is_sum else base // np.gcd.reduce(base)
        total = int(smallest.sum())
        factors = [size // total for size in known.sizes if size % total == 0]
        every |= {(smallest * factor).tobytes(): smallest * factor for factor in ([1] if known.is_sum else factors)}
    for is_connected in (True,) if known.connected else (True, False):
        for one in sorted(every.values(), key=lambda one: int(one.sum())):
            yield one, is_connected


def _is_connected(adjacency: Int[np.ndarray, "n n"]) -> bool:
    reached, front = {0}, [0]
    while front:
        front = list({int(j) for i in front for j in np.flatnonzero(adjacency[i])} - reached)
        reached.update(front)
    return len(reached) == len(adjacency)


def _certified(
    client_fn: ClientFn, observation: Observation, found: GraphSpans, one: Drawn, largest: int
) -> FoundGraph:
    """Computes the client's gradient for a graph, and its distance from the update."""
    nodes = found.types.features[found.stars.centres[found.trees.stars[one.trees]]]
    graph = FoundGraph(nodes, one.adjacency, math.inf)
    dtype = jax.tree.leaves(observation.params)[0].dtype
    inputs = padded_inputs(graph, max(largest, len(nodes)), dtype)
    update = client_fn(observation.params, Batch(inputs, jnp.array([found.label])))
    error, length = 0.0, 0.0
    for leaf, own in zip(jax.tree.leaves(observation.update), jax.tree.leaves(update), strict=True):
        seen = np.asarray(leaf, np.float64)
        error += float(np.sum(np.square(np.asarray(own, np.float64) - seen)))
        length += float(np.sum(np.square(seen)))
    return graph._replace(mismatch=math.sqrt(error / length))
