"""The attack by spans and counting: what it must find, what it must not, and what it may look at."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from molecules import MAX_DEGREE, MOLECULES, NUM_KINDS, Molecule, adjacency_of, inputs_of, network, seen

from gia_jax import attacks
from gia_jax.attacks.graph_spans import GraphSpans, Limits, as_reconstruction
from gia_jax.metrics import isomorphism, same_colors

pytestmark = pytest.mark.usefixtures("x64")

BLOCKS = {"blocks": [NUM_KINDS, MAX_DEGREE + 1], "degree_block": 1}


def attack(net: Any, observation: Any, **settings: Any) -> GraphSpans:
    return attacks.graph_spans(net.client_fn, **{**BLOCKS, **settings})(observation)


def answers(found: GraphSpans) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(graph.adjacency > 0, graph.nodes[:, :NUM_KINDS].argmax(1)) for graph in found.graphs]


def truth_of(molecule: Molecule) -> tuple[np.ndarray, np.ndarray]:
    return molecule.adjacency > 0, molecule.kinds


def has_truth(found: GraphSpans, molecule: Molecule) -> bool:
    return any(isomorphism(answer, truth_of(molecule)) is not None for answer in answers(found))


@pytest.mark.parametrize("name", MOLECULES)
def test_the_trees_of_molecules_are_found_and_the_molecule_is_among_the_answers(name: str) -> None:
    net, molecule = network(), MOLECULES[name]
    found = attack(net, seen(net, inputs_of(molecule.nodes, molecule.adjacency)))
    assert found.label == 1
    assert any(same_colors(answer, truth_of(molecule), hops=2) for answer in answers(found))
    assert has_truth(found, molecule)
    assert max(graph.mismatch for graph in found.graphs) < 1e-13
    # The counts of the smallest solution are those of the molecule, or a common factor below them.
    assert len(molecule.kinds) % int(found.counts[0].sum()) == 0


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({"readout": "sum"}, {"readout": "sum"}),
        ({"activation": jnp.tanh}, {"activation": jnp.tanh}),
        ({"use_bias": False}, {}),
        (
            {"readout": "nodewise", "activate_last": False, "use_bias": False, "readout_widths": (60, 30)},
            {"readout": "nodewise", "activate_last": False},
        ),
    ],
    ids=["sum", "tanh", "no biases", "as in GRAIN"],
)
def test_other_networks_give_it_away_too(settings: dict[str, Any], known: dict[str, Any]) -> None:
    net, molecule = network(**settings), MOLECULES["MUTAG 143"]
    assert has_truth(attack(net, seen(net, inputs_of(molecule.nodes, molecule.adjacency)), **known), molecule)


def test_the_degree_need_not_be_a_feature() -> None:
    net, molecule = network(NUM_KINDS), MOLECULES["MUTAG 143"]
    observation = seen(net, inputs_of(np.eye(NUM_KINDS)[molecule.kinds], molecule.adjacency))
    found = attack(net, observation, blocks=[NUM_KINDS], degree_block=None, max_degree=MAX_DEGREE)
    assert has_truth(found, molecule)


def test_features_need_not_be_one_hot() -> None:
    net, molecule = network(), MOLECULES["MUTAG 75"]
    rows = [np.eye(NUM_KINDS), np.eye(MAX_DEGREE + 1)]
    scaled = [(block - 0.2) / 0.4 for block in rows]
    nodes = np.concatenate([scaled[0][molecule.kinds], scaled[1][molecule.adjacency.sum(1).astype(int)]], 1)
    # Nothing is 0, so that all 45 types are possible; few of them are in the span.
    found = attack(net, seen(net, inputs_of(nodes, molecule.adjacency)), blocks=scaled)
    assert len(found.types.degrees) < 20
    assert has_truth(found, molecule)


@pytest.mark.parametrize("name", ["MUTAG 75", "MUTAG 157", "PTC_MR 84", "PTC_MR 18"])
def test_a_gradient_in_float32_is_enough(name: str) -> None:
    net, molecule = network(), MOLECULES[name]
    net = net._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), net.params))
    inputs = jax.tree.map(lambda leaf: leaf.astype(np.float32), inputs_of(molecule.nodes, molecule.adjacency))
    observation = seen(net, inputs)
    assert observation.update["head"]["kernel"].dtype == jnp.float32
    found = attack(net, observation)
    assert has_truth(found, molecule)
    assert 0 < found.graphs[0].mismatch < 1e-4


def _noisy(observation: Any, noise: float) -> Any:
    rng = np.random.default_rng(0)
    return observation._replace(
        update=jax.tree.map(lambda leaf: leaf + noise * rng.normal(size=leaf.shape), observation.update)
    )


def test_little_noise_of_a_known_size_does_not_stop_it_and_much_noise_does() -> None:
    net, molecule = network(), MOLECULES["MUTAG 143"]
    observation = seen(net, inputs_of(molecule.nodes, molecule.adjacency))
    leaves = jax.tree.leaves(observation.update)
    level = float(np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in leaves) / sum(leaf.size for leaf in leaves)))
    assert has_truth(attack(net, _noisy(observation, 1e-5 * level), noise=1e-5 * level), molecule)
    assert not attack(net, _noisy(observation, 1e-5 * level)).graphs  # one who does not know of it
    assert not has_truth(attack(net, _noisy(observation, level), noise=level), molecule)


def test_a_network_that_is_narrower_than_the_stars_are_many_hides_the_graph() -> None:
    net, molecule = network(width=6), MOLECULES["MUTAG 157"]
    nodes, adjacency = molecule.nodes, molecule.adjacency
    told = attacks.graph_identifiability(net.params, nodes, adjacency, 1)
    assert not told.is_recoverable
    found = attack(net, seen(net, inputs_of(nodes, adjacency)), limits=Limits(seconds=0.5, counts=1))
    assert not has_truth(found, molecule)
    assert found.stopped != "complete"


@pytest.mark.parametrize(
    ("num_features", "settings", "expected"),
    [(NUM_KINDS + MAX_DEGREE + 1, {}, True), (NUM_KINDS, {"use_bias": False}, False)],
    ids=["plain", "labels alone, without biases"],
)
def test_what_is_said_beforehand_comes_true(num_features: int, settings: dict[str, Any], expected: bool) -> None:
    # Without biases all stars of atoms of one kind have one direction, so that the span keeps stars of every shape.
    net, molecule = network(num_features, **settings), MOLECULES["MUTAG 75"]
    nodes, limits = molecule.nodes[:, :num_features], Limits(completions=0, trees=500)
    known = {**BLOCKS, "max_degree": MAX_DEGREE, "max_nodes": 20, "limits": limits}
    known |= {} if num_features > NUM_KINDS else {"blocks": [NUM_KINDS], "degree_block": None}
    told = attacks.graph_identifiability(net.params, nodes, molecule.adjacency, 1, **known)
    found = attack(net, seen(net, inputs_of(nodes, molecule.adjacency)), **known)
    is_found = any(same_colors(answer, truth_of(molecule), hops=2) for answer in answers(found))
    assert told.is_recoverable == is_found == expected
    if expected:
        assert told.num_counts == 1
        assert (told.num_kept, told.num_candidates) == (len(found.stars.centres), len(found.trees.stars))
    else:
        assert told.num_collinear > 0
        assert "limits.trees" in told.reason
        assert found.stopped.startswith("limits.trees")


def test_two_rings_of_five_and_one_of_ten_are_both_answers() -> None:
    net = network(4, 20)
    ten = np.roll(np.eye(10), 1, 0)
    five = np.kron(np.eye(2), np.roll(np.eye(5), 1, 0))
    nodes = np.concatenate([np.ones((10, 1)), np.eye(3)[np.full(10, 2)]], 1)
    both = [seen(net, inputs_of(nodes, ring + ring.T, 10)) for ring in (ten, five)]
    for one, other in zip(*(jax.tree.leaves(observation.update) for observation in both), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-15)
    found = attack(net, both[0]._replace(extra={"inputs": {"mask": jnp.ones((1, 10))}}), blocks=[1, 3], max_nodes=10)
    rings = sorted(sorted(_component_sizes(graph.adjacency)) for graph in found.graphs)
    assert rings == [[3, 3, 4], [3, 7], [4, 6], [5, 5], [10]]
    assert found.stopped == "complete"
    connected = attack(net, both[1], blocks=[1, 3], max_nodes=10, connected=True)
    assert [len(graph.adjacency) for graph in connected.graphs] == list(range(3, 11))  # means do not tell the size
    assert [len(g.adjacency) for g in attack(net, both[1], blocks=[1, 3], connected=True, min_cycle=9).graphs] == [
        9,
        10,
    ]


def _component_sizes(adjacency: np.ndarray) -> list[int]:
    reach = np.linalg.matrix_power(adjacency + np.eye(len(adjacency)), len(adjacency)) > 0
    return [int(row.sum()) for row in np.unique(reach, axis=0)]


def test_equal_nodes_without_a_degree_say_so_by_several_counts() -> None:
    # Averages over equal nodes of equal degrees are all the same: rings, pairs and single nodes.
    net = network(1, 20)
    ring = np.roll(np.eye(6), 1, 0)
    observation = seen(net, inputs_of(np.ones((6, 1)), ring + ring.T, 6), num_nodes=jnp.array(6))
    found = attack(net, observation, blocks=[1], degree_block=None, max_degree=2)
    assert len(found.counts) > 1
    assert all(graph.mismatch < 1e-13 for graph in found.graphs)


def test_nothing_of_the_victim_is_looked_at_after_it_was_observed() -> None:
    net, molecule = network(), MOLECULES["MUTAG 75"]
    inputs = inputs_of(molecule.nodes, molecule.adjacency)
    observation = seen(net, inputs)
    before = attack(net, observation)
    for array in (*inputs.values(), molecule.nodes):
        array[:] = np.nan
    after = attack(net, observation)
    assert before.stopped == after.stopped
    for one, other in zip(before.graphs, after.graphs, strict=True):
        np.testing.assert_array_equal(one.adjacency, other.adjacency)
        np.testing.assert_array_equal(one.nodes, other.nodes)


def test_the_answers_come_as_a_reconstruction() -> None:
    net, molecule = network(), MOLECULES["MUTAG 75"]
    found = attack(net, seen(net, inputs_of(molecule.nodes, molecule.adjacency)))
    reconstruction = as_reconstruction(found, num_nodes=12)
    assert bool(reconstruction.is_finite)
    assert reconstruction.batch.labels.tolist() == [1]
    update = net.client_fn(net.params, reconstruction.batch)
    wanted = seen(net, inputs_of(molecule.nodes, molecule.adjacency)).update
    for one, other in zip(jax.tree.leaves(update), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="num_nodes must be at least the graph's 10, got 3"):
        as_reconstruction(found, num_nodes=3)


def test_limits_stop_the_search_and_are_reported() -> None:
    net, molecule = network(), MOLECULES["MUTAG 97"]
    observation = seen(net, inputs_of(molecule.nodes, molecule.adjacency))
    for name, reached in (("stars", "there are"), ("trees", "there are"), ("branches", "2 half-edges")):
        stopped = attack(net, observation, limits=Limits(completions=0, **{name: 2})).stopped
        assert stopped.startswith(f"limits.{name}: {reached}")
    one = attack(net, observation, limits=Limits(graphs=1))
    assert len(one.graphs) == 1
    assert one.stopped.startswith("limits.graphs: 1 graphs")


def test_a_gradient_of_several_graphs_is_not_taken_for_one() -> None:
    net = network()
    parts = [
        seen(net, inputs_of(MOLECULES[name].nodes, MOLECULES[name].adjacency), label)
        for name, label in (("MUTAG 75", 0), ("MUTAG 143", 1))
    ]
    update = jax.tree.map(lambda a, b: (a + b) / 2, *(part.update for part in parts))
    assert not attack(net, parts[0]._replace(update=update), limits=Limits(completions=2)).graphs


def test_bad_input_is_refused_in_one_line() -> None:
    net, molecule = network(), MOLECULES["MUTAG 75"]
    observation = seen(net, inputs_of(molecule.nodes, molecule.adjacency))
    deeper = observation._replace(params={**observation.params, "layer2": observation.params["layer1"]})
    with pytest.raises(ValueError, match=r"params must be those of a GCN of two layers, .* got .*'layer2'"):
        attack(net, deeper)
    sage = {**observation.params, "layer0": {"self": {}, "neighbours": {}}}
    with pytest.raises(ValueError, match=r"params\['layer0'\] must hold the kernel, .* got \['neighbours', 'self'\]"):
        attack(net, observation._replace(params=sage))
    with pytest.raises(ValueError, match="blocks must have 14 features, as layer0 has, got 8"):
        attack(net, observation, blocks=[3, 5])
    two = observation._replace(extra={"inputs_like": {"nodes": jnp.zeros((2, 20, 14))}})
    with pytest.raises(ValueError, match=r"needs a batch of one graph, .* got nodes of shape \(2, 20, 14\)"):
        attack(net, two)
    with pytest.raises(ValueError, match="max_nodes must be given where the shape of the inputs is not granted"):
        attack(net, observation._replace(extra={}))
    for settings, message in (
        ({"blocks": []}, "blocks must be matrices of at least one row"),
        ({"degree_block": None}, "max_degree must be given where no block of features tells the degree"),
        ({"degree_block": 2}, "degree_block must be an integer from 0 to 1, got 2"),
        ({"readout": "max"}, "readout must be 'mean', 'sum' or 'nodewise', got 'max'"),
        ({"min_cycle": 2}, "min_cycle must be an integer of at least 3, got 2"),
        ({"miss": 0.0}, r"miss must be in \(0, 1\), got 0"),
        ({"noise": -1.0}, "noise must not be negative, got -1"),
        ({"tolerance": 0.0}, "tolerance must be positive, got 0"),
        ({"limits": Limits(graphs=0)}, "limits.graphs must be an integer of at least 1, got 0"),
    ):
        build = inspect.unwrap(attacks.graph_spans)  # beneath the type checker of the tests, which refuses it first
        with pytest.raises(ValueError, match=message):
            build(net.client_fn, **{**BLOCKS, **settings})
    with jax.enable_x64(False), pytest.raises(ValueError, match="graph_spans needs float64"):
        attack(net, observation)


def test_an_isolated_node_and_a_single_edge_are_found() -> None:
    net = network()
    for kinds, edges in (("0", ""), ("0 1", "0-1"), ("0 1 2", "0-1"), ("3 3", "0-1")):
        molecule = Molecule(np.array(kinds.split(), int), adjacency_of(edges, len(kinds.split())))
        found = attack(net, seen(net, inputs_of(molecule.nodes, molecule.adjacency, 4)))
        assert has_truth(found, molecule)
