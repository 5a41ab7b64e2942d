"""The stages of the attack by spans and counting, each against what is known of it."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from molecules import MOLECULES, inputs_of, network, seen

from gia_jax.attacks.graph_spans.candidates import (
    Stars,
    Trees,
    Types,
    all_stars,
    all_trees,
    completed_stars,
    consistent,
    num_stars,
    num_trees,
    spanned_stars,
    star_inputs,
    tree_weights,
)
from gia_jax.attacks.graph_spans.counts import System, handshakes, solutions
from gia_jax.attacks.graph_spans.network import Layer, activate, forward, layers, members, span
from gia_jax.attacks.graph_spans.pooled import pooled
from gia_jax.attacks.graph_spans.realization import Budget, realizations

pytestmark = pytest.mark.usefixtures("x64")

EPS = float(np.finfo(float).eps)


def normalized(adjacency: np.ndarray) -> np.ndarray:
    looped = adjacency + np.eye(len(adjacency))
    scale = looped.sum(1) ** -0.5
    return looped * scale[:, None] * scale


def parts_of(nodes: np.ndarray, adjacency: np.ndarray) -> tuple[Types, Stars, Trees, Counter]:
    """Types, stars and trees of a graph, and how often each tree occurs, found by looking at the graph."""
    size, degrees = len(nodes), adjacency.sum(1).astype(int)
    rows = np.concatenate([nodes, degrees[:, None]], 1)
    distinct, kind = np.unique(rows, axis=0, return_inverse=True)
    types = Types(distinct[:, :-1], distinct[:, -1].astype(int))
    around = adjacency.astype(int) @ np.eye(len(distinct), dtype=int)[kind.ravel()]
    found, star = np.unique(np.c_[kind, around], axis=0, return_inverse=True)
    stars = Stars(found[:, 0], found[:, 1:])
    around = adjacency.astype(int) @ np.eye(len(found), dtype=int)[star.ravel()]
    last, tree = np.unique(np.c_[star, around], axis=0, return_inverse=True)
    assert len(star) == size
    return types, stars, Trees(last[:, 0], last[:, 1:]), Counter(tree.ravel().tolist())


@pytest.mark.parametrize("name", ["MUTAG 143", "PTC_MR 299"])
def test_stars_and_trees_enter_the_layers_as_the_nodes_of_the_graph_do(name: str) -> None:
    molecule = MOLECULES[name]
    nodes, mixing = molecule.nodes, normalized(molecule.adjacency)
    types, stars, trees, _ = parts_of(nodes, molecule.adjacency)
    averages = star_inputs(types, stars)
    assert len(averages) == len(np.unique((mixing @ nodes).round(9), axis=0))
    for row in mixing @ nodes:
        assert np.abs(averages - row).sum(1).min() < 1e-12
    hidden = np.tanh(averages[:, :4])
    of_nodes = mixing @ np.tanh((mixing @ nodes)[:, :4])
    for row in of_nodes:
        assert np.abs(tree_weights(types, stars, trees) @ hidden - row).sum(1).min() < 1e-12


def test_all_stars_and_trees_are_listed_once() -> None:
    types = Types(np.eye(3), np.array([0, 1, 3]))
    pieces = list(all_stars(types))
    listed = np.concatenate([np.c_[piece.centres, piece.neighbours] for piece in pieces])
    # No neighbour has no neighbours: 1 star of the first centre, 2 of the second and 4 of the third.
    assert len(listed) == len(np.unique(listed, axis=0)) == num_stars(types) == 1 + 2 + 4
    assert (listed[:, 1:].sum(1) == types.degrees[listed[:, 0]]).all()
    assert not listed[:, 1].any()
    stars = Stars(listed[:, 0], listed[:, 1:])
    trees = all_trees(stars)
    rows = np.c_[trees.stars, trees.neighbours]
    assert len(rows) == len(np.unique(rows, axis=0)) == num_trees(stars)
    # A star of one neighbour of the third type has as many trees as that type has stars with the second: 3.
    middle = int(np.flatnonzero((listed == [1, 0, 0, 1]).all(1))[0])
    assert (trees.stars == middle).sum() == 3


def test_stars_without_a_star_for_a_neighbour_are_dropped_in_turn() -> None:
    types = Types(np.eye(3), np.array([1, 2, 1]))
    # a - b and b - (a, c) are there, and c - b is not: so the second goes, and the first after it.
    stars = Stars(np.array([0, 1]), np.array([[0, 1, 0], [1, 0, 1]]))
    assert not len(consistent(types, stars).centres)
    whole = Stars(np.array([0, 1, 2]), np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]]))
    assert len(consistent(types, whole).centres) == 3


def _stars_kept(name: str, dtype: type, complete: bool) -> tuple[bool, int]:
    net, molecule = network(), MOLECULES[name]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), net.params)
    inputs = jax.tree.map(lambda leaf: leaf.astype(dtype), inputs_of(molecule.nodes, molecule.adjacency))
    update = seen(net._replace(params=params), inputs).update
    types, stars, _, _ = parts_of(molecule.nodes, molecule.adjacency)
    first = layers("params", params, nodewise=False).first
    gradient = layers("update", update, nodewise=False).second.kernel
    space = span(gradient, spacing=float(np.finfo(dtype).eps), noise=None, miss=1e-3)
    kept = spanned_stars(types, first, jax.nn.relu, space, miss=1e-3)
    if complete:
        kept = next(completed_stars(types, first, jax.nn.relu, space, kept, miss=1e-3))
    wanted = set(map(tuple, np.c_[stars.centres, stars.neighbours].tolist()))
    got = set(map(tuple, np.c_[kept.centres, kept.neighbours].tolist()))
    return wanted <= got, len(got) - len(wanted)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", MOLECULES)
def test_the_span_keeps_all_true_stars_and_few_others(name: str, dtype: type) -> None:
    lacks_one = name in ("PTC_MR 84", "PTC_MR 196")
    keeps_all, others = _stars_kept(name, dtype, complete=lacks_one)
    assert keeps_all
    assert others <= 6
    if lacks_one:
        assert not _stars_kept(name, dtype, complete=False)[0]


def test_the_gradient_lies_in_the_span_of_the_hidden_rows_and_fills_it() -> None:
    net, molecule = network(), MOLECULES["MUTAG 143"]
    update = seen(net, inputs_of(molecule.nodes, molecule.adjacency)).update
    gradient, first = np.asarray(update["layer1"]["kernel"]), layers("params", net.params, nodewise=False).first
    hidden = activate(jax.nn.relu, forward(normalized(molecule.adjacency) @ molecule.nodes, first))
    basis = np.linalg.qr(np.unique(hidden.round(12), axis=0).T)[0]
    outside = gradient - basis @ (basis.T @ gradient)
    assert np.linalg.norm(outside) < 1e-10 * np.linalg.norm(gradient)
    space = span(gradient, spacing=EPS, noise=None, miss=1e-3)
    assert int(space.rank) == basis.shape[1]
    assert members(space, hidden, miss=1e-3).all()


def test_pure_stars_are_collinear_without_biases_and_not_with_them() -> None:
    types = Types(np.eye(2)[[0, 0, 0]], np.array([1, 2, 3]))
    stars = Stars(np.array([0, 1, 2]), np.array([[0, 1, 0], [1, 0, 1], [0, 3, 0]]))
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(2, 50)), rng.normal(size=50)
    for layer, rank in ((Layer(kernel, None), 1), (Layer(kernel, bias), 3)):
        hidden = activate(jax.nn.relu, forward(star_inputs(types, stars), layer))
        assert np.linalg.matrix_rank(hidden / np.linalg.norm(hidden, axis=1, keepdims=True), tol=1e-8) == rank


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("classes", [2, 5])
def test_error_and_features_of_the_last_layer_are_found(has_bias: bool, classes: int) -> None:
    rng = np.random.default_rng(classes)
    layer = Layer(rng.normal(size=(30, classes)), rng.normal(size=classes) if has_bias else None)
    features = rng.normal(size=30) / 5
    logits = forward(features[None], layer)[0]
    error = np.exp(logits) / np.exp(logits).sum() - np.eye(classes)[1]
    gradient = Layer(np.outer(features, error), error if has_bias else None)
    found = pooled(gradient, layer)
    best = min(found, key=lambda one: float(np.abs(one.features - features).max()))
    assert best.label == 1
    np.testing.assert_allclose(best.features, features, rtol=0, atol=1e-10)
    np.testing.assert_allclose(best.error, error, rtol=0, atol=1e-10)


def _equations(columns: np.ndarray, target: np.ndarray, rows: np.ndarray | None = None) -> System:
    rows = np.zeros((0, columns.shape[1]), int) if rows is None else rows
    return System(columns, target, 0.0, rows)


SETTINGS = {"tolerance": 1e-12, "max_solutions": 3, "seconds": 5.0}


def test_counts_are_whole_numbers_of_the_smallest_graph() -> None:
    columns, counts = np.random.default_rng(0).normal(size=(8, 4)), np.array([2, 0, 4, 6])
    found, mismatch = solutions(_equations(columns, columns @ counts / 12), range(1, 20), **SETTINGS)
    assert [one.tolist() for one in found] == [[1, 0, 2, 3]]
    assert mismatch < 1e-12
    assert [one.tolist() for one in solutions(_equations(columns, columns @ counts / 12), [12], **SETTINGS)[0]] == [
        counts.tolist()
    ]
    assert [one.tolist() for one in solutions(_equations(columns, columns @ counts), None, **SETTINGS)[0]] == [
        counts.tolist()
    ]


def test_what_no_counts_explain_is_said() -> None:
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(8, 4))
    found, mismatch = solutions(_equations(columns, rng.normal(size=8)), range(1, 20), **SETTINGS)
    assert not found
    assert mismatch > 0.1
    weights = columns @ np.array([0.1, 0.2, 0.3, 0.4]) + 0  # whole numbers of ten nodes, not of nine
    assert not solutions(_equations(columns, weights), range(1, 10), **SETTINGS)[0]


def test_the_integer_programme_lists_ties() -> None:
    # The third column is the mean of the first two, so that only their sum with it is known.
    columns = np.random.default_rng(0).normal(size=(8, 2)) @ np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    target = columns @ np.array([3, 1, 2]) / 6
    found, _ = solutions(_equations(columns, target), [6], **SETTINGS)
    assert len(found) > 1
    assert all(2 * one[0] + one[2] == 8 and one.sum() == 6 for one in found)
    # An equation that only integers of one kind satisfy leaves one of them.
    (one,), _ = solutions(_equations(columns, target, np.array([[1, -3, 0]])), [6], **SETTINGS)
    assert one.tolist() == [3, 1, 2]


@pytest.mark.parametrize("name", MOLECULES)
def test_every_edge_of_a_graph_has_two_ends(name: str) -> None:
    _, stars, trees, counts = parts_of(MOLECULES[name].nodes, MOLECULES[name].adjacency)
    numbers = np.array([counts[i] for i in range(len(trees.stars))])
    rows = handshakes(stars, trees)
    assert len(rows)
    assert not (rows @ numbers).any()


# One tree: a node of degree 3 among such nodes.
CUBIC = Trees(np.array([0]), np.array([[3]]))


@pytest.mark.parametrize(
    ("size", "connected", "min_cycle", "number"),
    # Numbers of connected cubic graphs: OEIS A002851; of girth 4 and more: A014371; of girth 5 and more: A014372.
    [
        (4, True, 3, 1),
        (6, True, 3, 2),
        (8, True, 3, 5),
        (8, False, 3, 6),
        (8, True, 4, 2),
        (10, True, 5, 1),
        (5, True, 3, 0),
    ],
)
def test_all_cubic_graphs_are_drawn_once(size: int, connected: bool, min_cycle: int, number: int) -> None:
    budget = Budget(100_000)
    found = list(realizations(CUBIC, np.array([size]), connected=connected, min_cycle=min_cycle, budget=budget))
    assert len(found) == number
    assert budget.left > 0
    for graph in found:
        assert (graph.adjacency.sum(0) == 3).all()
        assert (graph.adjacency == graph.adjacency.T).all()
        assert not np.diag(graph.adjacency).any()


@pytest.mark.parametrize("name", ["MUTAG 75", "MUTAG 97", "PTC_MR 18"])
def test_graphs_that_are_drawn_have_the_trees_asked_for(name: str) -> None:
    nodes, adjacency = MOLECULES[name].nodes, MOLECULES[name].adjacency
    types, stars, trees, counts = parts_of(nodes, adjacency)
    numbers = np.array([counts[i] for i in range(len(trees.stars))])
    found = list(realizations(trees, numbers, connected=False, min_cycle=3, budget=Budget(20_000)))
    assert found
    for graph in found:
        own = parts_of(types.features[stars.centres[trees.stars[graph.trees]]], graph.adjacency)
        assert sorted(own[3].values()) == sorted(counts.values())
        np.testing.assert_array_equal(own[2].neighbours, trees.neighbours)


def test_a_search_that_is_cut_short_says_so() -> None:
    budget = Budget(5)
    assert not list(realizations(CUBIC, np.array([8]), connected=True, min_cycle=3, budget=budget))
    assert budget.left < 0


def test_no_noise_level_is_needed_for_a_span_of_whole_numbers() -> None:
    space = span(np.eye(4)[:, :2], spacing=EPS, noise=0.0, miss=1e-3)
    assert members(space, np.eye(4), miss=1e-3).tolist() == [True, True, False, False]
    assert jnp.isfinite(space.noise)
