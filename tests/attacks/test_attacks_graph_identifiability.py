"""What is said about a graph before an attack, on graphs where it is known."""

import jax.numpy as jnp
import numpy as np
import pytest
from molecules import MOLECULES, adjacency_of, inputs_of, network, seen

from gia_jax import attacks
from gia_jax.attacks.graph_identifiability import GraphIdentifiability

pytestmark = pytest.mark.usefixtures("x64")

TRIANGLE = adjacency_of("0-1 1-2 2-0", 3)


def told(nodes: np.ndarray, adjacency: np.ndarray, width: int = 40, **settings: object) -> GraphIdentifiability:
    net = network(nodes.shape[1], width, **settings)
    known = {key: settings[key] for key in ("activation", "activate_last", "readout") if key in settings}
    return attacks.graph_identifiability(net.params, nodes, adjacency, 1, **known)


@pytest.mark.parametrize(
    ("adjacency", "dimension"),
    # A + I is singular where A has the eigenvalue -1: of paths those of 2, 5, 8, ... nodes, and complete graphs.
    [
        (adjacency_of("0-1", 2), 1),
        (adjacency_of("0-1 1-2", 3), 0),
        (adjacency_of("0-1 1-2 2-3 3-4", 5), 1),
        (TRIANGLE, 2),
    ],
)
def test_the_blind_dimension_is_that_of_the_null_space(adjacency: np.ndarray, dimension: int) -> None:
    assert told(np.eye(5)[: len(adjacency)], adjacency).blind_dimension == dimension


def test_twins_and_colours_are_counted() -> None:
    nodes = np.eye(2)[[0, 0, 1]]
    numbers = told(nodes, TRIANGLE)
    assert (numbers.num_types, numbers.num_stars, numbers.num_trees, numbers.num_nodes) == (2, 2, 2, 3)
    assert numbers.num_twins == 3
    path = told(np.ones((7, 1)), adjacency_of("0-1 1-2 2-3 3-4 4-5 5-6", 7))
    # Ends and others; ends, next to ends and others; and those two steps from an end apart from the middle.
    assert (path.num_types, path.num_stars, path.num_trees, path.num_twins) == (2, 3, 4, 0)


def test_homogeneity_shows_without_biases_alone() -> None:
    nodes, adjacency = np.eye(2)[np.zeros(6, int)], adjacency_of("0-1 1-2 2-3 3-4 4-5 1-4", 6)
    without, with_them = told(nodes, adjacency, use_bias=False), told(nodes, adjacency)
    assert without.num_collinear > 0
    assert without.hidden_rank == 1
    assert "share a direction" in without.reason
    assert with_them.num_collinear == 0
    assert with_them.hidden_rank > 1


def test_a_span_that_lacks_a_dimension_is_told() -> None:
    for name, missing in (("PTC_MR 84", 1), ("MUTAG 75", 0)):
        numbers = told(MOLECULES[name].nodes, MOLECULES[name].adjacency, 300)
        assert numbers.hidden_rank - numbers.gradient_rank == missing
        assert numbers.num_stars - numbers.mixing_rank == missing
        assert numbers.is_recoverable


def test_narrow_networks_and_linear_last_layers_are_refused_with_the_reason() -> None:
    nodes, adjacency = MOLECULES["MUTAG 157"].nodes, MOLECULES["MUTAG 157"].adjacency
    narrow = told(nodes, adjacency, 6)
    assert not narrow.is_recoverable
    assert "there are 12 stars in 6 dimensions" in narrow.reason
    linear = told(nodes, adjacency, activate_last=False)
    assert linear.gradient_rank == 1
    assert not linear.is_recoverable
    assert "cotangents" in linear.reason
    nodewise = told(nodes, adjacency, 300, activate_last=False, readout="nodewise", use_bias=False)
    assert nodewise.is_recoverable


def test_the_rank_is_that_of_the_clients_gradient() -> None:
    molecule, net = MOLECULES["PTC_MR 18"], network(activation=jnp.tanh)
    update = seen(net, inputs_of(molecule.nodes, molecule.adjacency)).update
    gradient = np.asarray(update["layer1"]["kernel"])
    gradient = gradient / np.linalg.norm(gradient, axis=0)
    numbers = told(molecule.nodes, molecule.adjacency, 300, activation=jnp.tanh)
    assert np.linalg.matrix_rank(gradient, tol=1e-11) == numbers.gradient_rank


def test_bad_input_is_refused() -> None:
    net = network(2, 40)
    for nodes, adjacency, label, message in (
        (np.eye(3), TRIANGLE, 0, r"nodes must have shape \(n, 2\) with n > 0, as layer0 has, got \(3, 3\)"),
        (np.ones((2, 2)), TRIANGLE, 0, r"adjacency must have shape \(2, 2\), as there are 2 nodes, got \(3, 3\)"),
        (np.ones((3, 2)), np.eye(3), 0, "adjacency must be of 0 and 1, symmetric and without loops"),
        (np.ones((3, 2)), TRIANGLE, 2, "label must be an integer from 0 to 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            attacks.graph_identifiability(net.params, nodes, adjacency, label)
