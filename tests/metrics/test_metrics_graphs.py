"""Scores of graphs: against scikit-learn, after matching, and of the same graph in another order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, r2_score, roc_auc_score

from gia_jax.data import FeatureBlock
from gia_jax.metrics import graph_scores, graph_similarity, isomorphism, match_nodes, same_colors, wl_colors
from gia_jax.metrics.graphs import _auc, _average_precision, _r_squared, _weighted_f1
from gia_jax.metrics.node_order import permuted, propagation

LABEL = FeatureBlock("label", ("C", "N", "O"))
BLOCKS = (LABEL,)


def graph(edges: list[tuple[int, int]], labels: list[int], size: int | None = None) -> dict[str, np.ndarray]:
    count, size = len(labels), len(labels) if size is None else size
    adjacency, nodes = np.zeros((size, size)), np.zeros((size, 3))
    for i, j in edges:
        adjacency[i, j] = adjacency[j, i] = 1
    nodes[:count] = np.eye(3)[labels]
    return {"nodes": nodes, "adjacency": adjacency, "mask": (np.arange(size) < count) * 1.0}


# A ring of six with a chain of three: many nodes look alike.
TRUTH = graph([(i, (i + 1) % 6) for i in range(6)] + [(0, 6), (6, 7), (6, 8)], [0, 0, 0, 0, 0, 0, 1, 2, 2])
ORDER = np.array([4, 8, 1, 0, 7, 5, 3, 6, 2])


def random_graph(seed: int, count: int = 9) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    soft = np.triu(rng.uniform(0, 1, (count, count)), 1)
    return {"nodes": rng.dirichlet(np.ones(3), count), "adjacency": soft + soft.T, "mask": np.ones(count)}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_shares_of_edges_and_categories_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true, soft = rng.uniform(size=20) < 0.3, rng.integers(0, 6, 20) / 5  # with ties
    if 0 < true.sum() < len(true):
        assert _auc(soft, true) == pytest.approx(roc_auc_score(true, soft))
        assert _average_precision(soft, true) == pytest.approx(average_precision_score(true, soft))
    found, wanted = rng.integers(0, 4, (2, 20))
    assert _weighted_f1(found, wanted) == pytest.approx(f1_score(wanted, found, average="weighted", zero_division=0))
    one, other = rng.normal(size=(2, 20))
    assert _r_squared(one, other) == pytest.approx(r2_score(other, one))


def test_a_graph_in_another_order_is_the_graph() -> None:
    scores = graph_scores(permuted(TRUTH, ORDER), TRUTH, BLOCKS)
    assert scores == graph_scores(TRUTH, TRUTH, BLOCKS)
    assert (scores.node_mse, scores.propagated_mse, scores.node_accuracy, scores.label_accuracy) == (0, 0, 1, 1)
    assert (scores.edge_auc, scores.edge_ap, scores.edge_f1, scores.edge_count_error) == (1, 1, 1, 0)
    assert scores.is_exact
    assert scores.same_colors
    np.testing.assert_allclose(graph_similarity(TRUTH, TRUTH, BLOCKS, hops=5), 1)
    np.testing.assert_allclose(graph_similarity(permuted(TRUTH, ORDER), TRUTH, BLOCKS, hops=5), 1)
    # Edges and categories need not be 0 and 1 to be read as such.
    soft = {"nodes": 0.4 * TRUTH["nodes"] + 0.1, "adjacency": 0.2 + 0.5 * TRUTH["adjacency"], "mask": TRUTH["mask"]}
    scores = graph_scores(permuted(soft, ORDER), TRUTH, BLOCKS)
    assert scores.is_exact
    assert (scores.node_accuracy, scores.edge_auc, scores.edge_f1) == (1, 1, 1)
    assert scores.node_mse == pytest.approx(np.mean((soft["nodes"] - TRUTH["nodes"]) ** 2))


def test_all_scores_are_of_one_order_of_nodes() -> None:
    found = random_graph(0)
    order = match_nodes(found, TRUTH, BLOCKS)
    assert sorted(order) == list(range(9))
    scores, moved = graph_scores(found, TRUTH, BLOCKS), permuted(found, order)
    rows, columns = np.triu_indices(9, 1)
    soft, true = moved["adjacency"][rows, columns], TRUTH["adjacency"][rows, columns] > 0
    assert scores.edge_auc == pytest.approx(roc_auc_score(true, soft))
    assert scores.edge_ap == pytest.approx(average_precision_score(true, soft))
    assert scores.edge_f1 == pytest.approx(f1_score(true, soft > 0.5))
    assert scores.edge_count_error == abs((soft > 0.5).sum() - 9)
    assert scores.node_mse == pytest.approx(np.mean((moved["nodes"] - TRUTH["nodes"]) ** 2))
    means = [propagation(one) @ one["nodes"] for one in (moved, TRUTH)]
    assert scores.propagated_mse == pytest.approx(np.mean((means[0] - means[1]) ** 2))
    assert scores.label_accuracy == np.mean(moved["nodes"].argmax(1) == TRUTH["nodes"].argmax(1))
    assert not scores.is_exact

    # The order has the least cost of all, here of some.
    def cost(order: np.ndarray) -> float:
        one = permuted(found, order)
        total = np.sum((one["adjacency"].sum(1) - TRUTH["adjacency"].sum(1)) ** 2)
        for k in range(3):
            mixed = [np.linalg.matrix_power(propagation(g), k) @ g["nodes"] for g in (one, TRUTH)]
            total += np.sum((mixed[0] - mixed[1]) ** 2)
        return float(total)

    rng = np.random.default_rng(1)
    assert all(cost(order) <= cost(rng.permutation(9)) for _ in range(50))


def test_matching_makes_the_edges_of_chance_look_better_than_chance() -> None:
    before, after = [], []
    rows, columns = np.triu_indices(9, 1)
    true = TRUTH["adjacency"][rows, columns] > 0
    for seed in range(60):
        # A guess with the right kinds of nodes, whose edges are random.
        guess = random_graph(seed) | {"nodes": TRUTH["nodes"]}
        guess["adjacency"] = (guess["adjacency"] > 0.75) * guess["adjacency"]
        before.append(_auc(guess["adjacency"][rows, columns], true))
        after.append(graph_scores(guess, TRUTH, BLOCKS).edge_auc)
    assert abs(np.mean(before) - 0.5) < 0.04
    assert np.mean(after) > np.mean(before) + 0.03


def test_graphs_of_other_sizes_lose_the_nodes_that_they_lack() -> None:
    padded = {
        name: np.pad(array, [(0, 4)] + [(0, 4 * (name == "adjacency"))] * (array.ndim - 1))
        for name, array in TRUTH.items()
    }
    assert graph_scores(permuted(padded, np.arange(13)[::-1]), TRUTH, BLOCKS) == graph_scores(TRUTH, TRUTH, BLOCKS)
    smaller = graph([(0, 1)], [1, 2])
    truth = graph([(0, 1), (1, 2)], [1, 2, 0])
    scores = graph_scores(smaller, truth, BLOCKS)
    assert (scores.node_accuracy, scores.edge_count_error, scores.is_exact) == (2 / 3, 1, False)
    assert scores.node_mse == pytest.approx(1 / 9)
    assert scores.edge_f1 == pytest.approx(2 / 3)
    assert graph_scores(truth, smaller, BLOCKS).node_accuracy == 2 / 3
    assert graph_similarity(smaller, truth, BLOCKS)[0] == pytest.approx(2 / 3)
    nothing = {name: np.zeros_like(array) for name, array in truth.items()}
    assert graph_scores(nothing, truth, BLOCKS).node_accuracy == 0
    np.testing.assert_array_equal(graph_similarity(nothing, truth, BLOCKS), 0)


def test_what_is_not_finite_counts_as_nothing() -> None:
    found = TRUTH | {"nodes": np.where(np.arange(9)[:, None] == 0, np.nan, TRUTH["nodes"])}
    scores = graph_scores(found, TRUTH, BLOCKS)
    assert (scores.node_mse, scores.propagated_mse) == (np.inf, np.inf)
    assert (scores.node_accuracy, scores.edge_auc, scores.edge_f1, scores.is_exact) == (0, 0.5, 0, False)
    np.testing.assert_array_equal(graph_similarity(found, TRUTH, BLOCKS), 0)


def test_scores_without_a_meaning_are_nan() -> None:
    lonely = graph([], [0, 1])
    scores = graph_scores(lonely, lonely)
    assert np.isnan([scores.edge_auc, scores.edge_ap, scores.label_accuracy]).all()
    assert (scores.edge_f1, scores.is_exact) == (1.0, True)


def test_numbers_are_right_within_their_tolerance() -> None:
    moved = TRUTH | {"nodes": TRUTH["nodes"] + 0.09}
    assert graph_scores(moved, TRUTH).node_accuracy == 1
    assert graph_scores(moved, TRUTH).is_exact
    assert graph_scores(moved, TRUTH, tolerance=0.05).node_accuracy == 0
    assert not graph_scores(moved, TRUTH, tolerance=0.05).is_exact


def test_similarity_by_hand() -> None:
    truth = graph([(0, 1), (1, 2), (2, 3)], [0, 1, 1, 2])
    found = graph([(0, 1), (1, 2), (2, 3)], [0, 1, 1, 1])
    # Of the categories 0, 1, 2 with F1 1, 0.8 and 0, one in four nodes is 0, two are 1, and one is 2.
    assert graph_similarity(found, truth, BLOCKS)[0] == pytest.approx(0.25 + 0.5 * 0.8)
    rng = np.random.default_rng(0)
    kernel = rng.uniform(-1, 1, (3, 300)) * np.sqrt(6 / 303)
    after, before = (np.maximum(propagation(one) @ one["nodes"] @ kernel, 0) for one in (found, truth))
    order = match_nodes(found, truth, BLOCKS)
    wanted = r2_score(before.ravel(), after[order].ravel())
    assert graph_similarity(found, truth, BLOCKS)[1] == pytest.approx(max(0, wanted))
    far = graph([(0, 1), (0, 2), (0, 3)], [2, 0, 0, 0])
    assert graph_similarity(far, truth, BLOCKS)[1] == 0


def test_colors_tell_what_a_network_can() -> None:
    ring = np.roll(np.eye(10, dtype=bool), 1, 0)
    fives = np.kron(np.eye(2, dtype=bool), np.roll(np.eye(5, dtype=bool), 1, 0))
    rings = [(one | one.T, np.zeros(10, int)) for one in (ring, fives)]
    assert same_colors(*rings)
    assert isomorphism(*rings) is None
    marked = [(adjacency, np.arange(10) // 9) for adjacency, _ in rings]
    assert not same_colors(*marked)
    # The mark is more than two steps away from what differs.
    assert [same_colors(*marked, hops=hops) for hops in range(4)] == [True, True, True, False]
    path = np.eye(4, k=1, dtype=bool) | np.eye(4, k=-1, dtype=bool)
    colors = wl_colors([path, path[:3, :3]], [np.array([0, 0, 0, 1]), np.zeros(3, int)])
    assert len(set(colors[0].tolist())) == 4
    assert colors[1].tolist()[0] == colors[1].tolist()[2]
    # Other graphs of one call do not end the rounds early.
    assert len(set(wl_colors([path], [np.zeros(4, int)], hops=0)[0].tolist())) == 2


def test_an_isomorphism_keeps_edges_and_kinds() -> None:
    adjacency, kinds = TRUTH["adjacency"] > 0, TRUTH["nodes"].argmax(1)
    moved = (adjacency[ORDER][:, ORDER], kinds[ORDER])
    order = isomorphism(moved, (adjacency, kinds))
    assert order is not None
    np.testing.assert_array_equal(moved[0][order][:, order], adjacency)
    np.testing.assert_array_equal(moved[1][order], kinds)
    assert isomorphism(moved, (adjacency, np.roll(kinds, 1))) is None
    assert isomorphism(moved, (adjacency[:8, :8], kinds[:8])) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: graph_scores({"nodes": TRUTH["nodes"]}, TRUTH), r"found must be a dict of .*, got \['nodes'\]"),
        (lambda: graph_scores(TRUTH | {"mask": np.ones(8)}, TRUTH), r"found must have arrays of shape \(n, f\), "),
        (lambda: graph_scores(TRUTH | {"nodes": np.ones((9, 2))}, TRUTH), "must have the 3 features of truth, got 2"),
        (lambda: graph_scores(TRUTH, TRUTH, [LABEL, LABEL]), "blocks must have the 3 columns of the features, got 6"),
        (lambda: graph_scores(TRUTH, TRUTH, hops=-1), "hops must be an integer of at least 0, got -1"),
        (lambda: graph_scores(TRUTH, TRUTH, tolerance=-0.1), r"tolerance must not be negative, got -0\.1"),
        (lambda: graph_similarity(TRUTH, TRUTH, BLOCKS, hops=6), "hops must be an integer from 0 to 5, got 6"),
        (
            lambda: graph_similarity(TRUTH, TRUTH, [FeatureBlock("attributes", ("a", "b", "c"))]),
            r"blocks must hold a one-hot one, got \['attributes'\]",
        ),
        (lambda: wl_colors([np.eye(2, dtype=bool)], [np.zeros(2, int)], hops=-1), "hops must be an integer of at le"),
    ],
)
def test_wrong_arguments_are_named(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
