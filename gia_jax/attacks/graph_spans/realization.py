"""Graphs in which every tree occurs a given number of times.

A tree says how many neighbours of each star a node has, and nothing about which of them. Graphs of the same counts have
the same gradient, so that all of them are answers. They are listed by a search that joins open half-edges, and goes
back where that ends in none.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from gia_jax.attacks.graph_spans.candidates import Trees


@dataclass
class Budget:
    """Number of joined half-edges that a search may still try."""

    left: int

    def spend(self) -> bool:
        """Takes one off, and tells whether there was one."""
        self.left -= 1
        return self.left >= 0


class Drawn(NamedTuple):
    """A graph, by the tree of every node and the adjacency."""

    trees: Int[np.ndarray, " n"]
    adjacency: Int[np.ndarray, "n n"]


def realizations(
    trees: Trees, counts: Int[np.ndarray, " r"], *, connected: bool, min_cycle: int, budget: Budget
) -> Iterator[Drawn]:
    """Lists graphs with given counts of trees, each once up to isomorphism.

    Args:
        trees: Trees, of which only those that occur play a part.
        counts: Number of nodes of every tree.
        connected: Whether only connected graphs are listed.
        min_cycle: Length of the shortest cycle that a graph may have, at least 3.
        budget: Number of joins that the search may try. It is changed, and below 0 where the search was cut short.

    Yields:
        The graphs.
    """
    seen: dict[tuple, list[tuple[Drawn, list[int]]]] = {}  # with the colours of the nodes
    for graph in _grown(_Search(trees, counts.tolist(), connected, min_cycle, budget)):
        key, colours = _signature(graph)
        others = seen.setdefault(key, [])
        if not any(_isomorphic(graph, other, colours, of_other) for other, of_other in others):
            others.append((graph, colours))
            yield graph


@dataclass
class _Search:
    """A graph that is being drawn."""

    trees: Trees
    unplaced: list[int]
    connected: bool
    min_cycle: int
    budget: Budget
    placed: list[int] = field(default_factory=list)  # tree of each node
    needs: list[dict[int, int]] = field(default_factory=list)  # open half-edges of each node, by the star they lead to
    near: list[list[int]] = field(default_factory=list)  # neighbours of each node, in the order they were joined

    def add(self, tree: int) -> int:
        """Places a node, and returns its index."""
        self.unplaced[tree] -= 1
        row = self.trees.neighbours[tree]
        self.placed.append(tree)
        self.needs.append({int(s): int(row[s]) for s in np.flatnonzero(row)})
        self.near.append([])
        return len(self.placed) - 1

    def drop(self) -> None:
        """Takes back the node that was placed last."""
        self.unplaced[self.placed.pop()] += 1
        self.needs.pop()
        self.near.pop()

    def star(self, node: int) -> int:
        """Returns the star of a node."""
        return int(self.trees.stars[self.placed[node]])

    def join(self, a: int, b: int, sign: int = 1) -> None:
        """Joins two nodes, or with sign -1 parts them again."""
        for one, other in ((a, b), (b, a)):
            self.needs[one][self.star(other)] -= sign
            if sign > 0:
                self.near[one].append(other)
            else:
                self.near[one].pop()

    def may_close(self, a: int, b: int) -> bool:
        """Tells whether an edge between two nodes closes no cycle that is too short."""
        reached, front = {a}, [a]
        for _ in range(self.min_cycle - 2):
            front = [n for node in front for n in self.near[node] if n not in reached]
            reached.update(front)
        return b not in reached


def _grown(search: _Search) -> Iterator[Drawn]:
    """Completes a graph in all ways: the first open half-edge leads to a node that is there, or to a new one."""
    node, star = next(
        ((i, s) for i, needs in enumerate(search.needs) for s, count in needs.items() if count > 0), (None, None)
    )
    if node is None or star is None:
        yield from _next_component(search)
        return
    own = search.star(node)
    # Nodes are completed in their order, so that partners chosen for this one come later. Those of one star are chosen
    # in order too, as only their set matters: first nodes that are there, then new ones.
    chosen = [n for n in search.near[node] if n > node and search.star(n) == star]
    created = [n for n in chosen if search.near[n][0] == node]
    for other in range(max([node, *chosen]) + 1, 0 if created else len(search.placed)):
        if search.star(other) != star or search.needs[other].get(own, 0) == 0 or other in search.near[node]:
            continue
        if not search.may_close(node, other):
            continue
        if not search.budget.spend():
            return
        search.join(node, other)
        yield from _grown(search)
        search.join(node, other, -1)
    for tree in np.flatnonzero((search.trees.stars == star) & (search.trees.neighbours[:, own] > 0)).tolist():
        if search.unplaced[tree] == 0 or (created and tree < search.placed[created[-1]]):
            continue
        if not search.budget.spend():
            return
        other = search.add(tree)
        search.join(node, other)
        yield from _grown(search)
        search.join(node, other, -1)
        search.drop()


def _next_component(search: _Search) -> Iterator[Drawn]:
    """Starts another component, or returns the graph where no node is left."""
    left = [tree for tree, count in enumerate(search.unplaced) if count]
    if not left:
        size = len(search.placed)
        adjacency = np.zeros((size, size), int)
        for node, near in enumerate(search.near):
            adjacency[node, near] = 1
        yield Drawn(np.array(search.placed, int), adjacency)
    elif not (search.connected and search.placed):
        # Some component holds a node of this tree; the rarest has the fewest places for it.
        search.add(min(left, key=lambda tree: search.unplaced[tree]))
        yield from _grown(search)
        search.drop()


def _signature(graph: Drawn) -> tuple[tuple, list[int]]:
    """Returns what isomorphic graphs share: the colours of nodes, refined until no two more can be told apart."""
    colours = graph.trees.tolist()
    near = [np.flatnonzero(row).tolist() for row in graph.adjacency]
    classes = len(set(colours))
    while True:
        colours = [hash((own, tuple(sorted(colours[j] for j in js)))) for own, js in zip(colours, near, strict=True)]
        if len(set(colours)) == classes:
            return tuple(sorted(Counter(colours).items())), colours
        classes = len(set(colours))


def _isomorphic(a: Drawn, b: Drawn, colours_a: list[int], colours_b: list[int]) -> bool:
    """Tells whether two graphs of equal signatures are the same but for the order of nodes."""
    size = len(colours_a)
    rarity = Counter(colours_a)
    order: list[int] = []
    while len(order) < size:  # next to nodes that are mapped already, the rarest first
        left = [i for i in range(size) if i not in order]
        order.append(min(left, key=lambda i: (-int(a.adjacency[i, order].sum()) if order else 0, rarity[colours_a[i]])))
    image: list[int] = []

    def extend() -> bool:
        if len(image) == size:
            return True
        node = order[len(image)]
        links = a.adjacency[node, order[: len(image)]]
        for other in range(size):
            if other in image or colours_b[other] != colours_a[node]:
                continue
            if np.array_equal(b.adjacency[other, image], links):
                image.append(other)
                if extend():
                    return True
                image.pop()
        return False

    return extend()
