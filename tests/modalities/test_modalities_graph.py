"""Graphs: unknowns become symmetric padded graphs, grants stay as they are, scores are of matched graphs."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.image import imread

from gia_jax import (
    Batch,
    Observation,
    ThreatModel,
    clients,
    gradient_matching,
    metrics,
    modalities,
    models,
    observe,
    run,
)
from gia_jax.data import FeatureBlock, pad_graphs
from gia_jax.matching import graph_priors
from gia_jax.metrics.node_order import permuted
from gia_jax.modalities.graph import FIELDS
from gia_jax.models.layers import symmetric_uniform
from gia_jax.report.graph_plots import graph_grid

BLOCKS = (FeatureBlock("label", ("C", "N", "O")), FeatureBlock("attributes", ("charge",)))
SIZE, WIDTH = 6, 4


def adjacency(edges: list[tuple[int, int]], count: int) -> np.ndarray:
    found = np.zeros((count, count))
    for i, j in edges:
        found[i, j] = found[j, i] = 1
    return found


def batch_of(*graphs: tuple[list[tuple[int, int]], list[int]], labels: list[int] | None = None) -> Batch:
    edges = [adjacency(*[pairs, len(kinds)]) for pairs, kinds in graphs]
    nodes = [np.concatenate([np.eye(3)[kinds], 0.3 * np.arange(len(kinds))[:, None]], 1) for _, kinds in graphs]
    arrays = pad_graphs(edges, nodes, num_nodes=SIZE)
    labels = [i % 2 for i in range(len(graphs))] if labels is None else labels
    return Batch(dict(zip(("nodes", "adjacency", "mask"), map(jnp.asarray, arrays), strict=True)), jnp.array(labels))


PATH = ([(0, 1), (1, 2), (2, 3)], [0, 1, 0, 2])
RING = ([(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)], [0, 0, 1, 0, 2])
BOTH = batch_of(PATH, RING)


def unknowns_of(modality: Any, batch: Batch, seed: int = 0) -> Any:
    seen = Observation({}, {}, {"inputs_like": jax.tree.map(jnp.zeros_like, batch.inputs), "inputs": batch.inputs})
    return modality.init_fn(jax.random.key(seed), seen)


@pytest.mark.parametrize("edges", ["sigmoid", "box"])
def test_whatever_is_searched_is_a_batch_of_graphs(edges: str) -> None:
    modality = modalities.graph(BLOCKS, SIZE, grants=["mask"], edges=edges)
    start = unknowns_of(modality, BOTH)
    assert jax.tree.map(jnp.shape, start) == {"nodes": (2, SIZE, WIDTH), "edges": (2, 15), "known_mask": (2, SIZE)}
    assert float(jnp.std(start["nodes"])) == pytest.approx(0.1, rel=0.3)
    far = jax.tree.map(lambda leaf: 3 * jax.random.normal(jax.random.key(1), leaf.shape), start)
    far["known_mask"] = start["known_mask"]
    far = far if modality.project_fn is None else modality.project_fn(far)
    assert (modality.project_fn is None) == (edges == "sigmoid")
    for unknowns in (start, far):
        inputs = modality.decode_fn(unknowns, BOTH.labels).inputs
        found = np.asarray(inputs["adjacency"])
        np.testing.assert_array_equal(found, found.swapaxes(1, 2))
        assert np.all((found >= 0) & (found <= 1))
        assert not np.any(np.diagonal(found, axis1=1, axis2=2))
        np.testing.assert_array_equal(inputs["mask"], BOTH.inputs["mask"])
        assert not np.any(found[0, 4:])
        assert not np.any(inputs["nodes"][0, 4:])
        np.testing.assert_allclose(np.asarray(inputs["nodes"])[1, :5, :3].sum(1), 1, rtol=1e-5)
        np.testing.assert_array_equal(inputs["nodes"][1, :5, 3], unknowns["nodes"][1, :5, 3])
    first = np.asarray(modality.decode_fn(start, BOTH.labels).inputs["adjacency"])[1, :5, :5]
    np.testing.assert_allclose(first[np.triu_indices(5, 1)], 1 / (1 + np.e), atol=0.08)


def test_every_pair_of_nodes_has_an_unknown_of_its_own() -> None:
    modality = modalities.graph(BLOCKS, 4, edges="box")
    for place, (i, j) in enumerate(zip(*np.triu_indices(4, 1), strict=True)):
        unknowns = {"nodes": jnp.zeros((1, 4, WIDTH)), "edges": jnp.zeros((1, 6)).at[0, place].set(1.0)}
        found = modality.decode_fn(unknowns, ()).inputs["adjacency"][0]
        np.testing.assert_array_equal(found, adjacency([(int(i), int(j))], 4))


def test_what_is_granted_is_no_unknown() -> None:
    structure = modalities.graph(BLOCKS, SIZE, grants=["adjacency", "mask"])
    start = unknowns_of(structure, BOTH)
    assert set(start) == {"nodes", "known_adjacency", "known_mask"}
    decoded = structure.decode_fn(start, BOTH.labels).inputs
    np.testing.assert_array_equal(decoded["adjacency"], BOTH.inputs["adjacency"])
    assert structure.main == next(iter(structure.score_fn(BOTH, BOTH).scores)) == "nodes"
    features = modalities.graph(BLOCKS, SIZE, grants=["nodes", "mask"])
    start = unknowns_of(features, BOTH)
    assert set(start) == {"edges", "known_nodes", "known_mask"}
    np.testing.assert_array_equal(features.decode_fn(start, BOTH.labels).inputs["nodes"], BOTH.inputs["nodes"])
    nothing = modalities.graph(BLOCKS, SIZE)
    assert np.all(nothing.decode_fn(unknowns_of(nothing, BOTH), BOTH.labels).inputs["mask"] == 1)


def graph_of(batch: Batch, place: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(array[place]) for name, array in batch.inputs.items()}


def turned(batch: Batch, orders: list[list[int]]) -> Batch:
    """The graphs in the opposite order, and their nodes in the orders given."""
    graphs = [graph_of(batch, i) for i in range(len(orders))]
    moved = [permuted(graph, np.array(order)) for graph, order in zip(graphs, orders, strict=True)][::-1]
    return Batch({name: np.stack([one[name] for one in moved]) for name in batch.inputs}, batch.labels[::-1])


ORDERS = [[5, 2, 0, 3, 1, 4], [1, 4, 0, 2, 5, 3]]


def test_neither_the_order_of_graphs_nor_that_of_nodes_plays_a_part() -> None:
    modality = modalities.graph(BLOCKS, SIZE)
    scores = modality.score_fn(turned(BOTH, ORDERS), BOTH).scores
    best = {
        "edges": 1,
        "edge_ap": 1,
        "edge_f1": 1,
        "nodes": 1,
        "node_mse": 0,
        "propagated_mse": 0,
        "colors": 1,
        "exact": 1,
    }
    assert list(scores) == list(best) == list(FIELDS)
    for name, wanted in best.items():
        np.testing.assert_allclose(scores[name], [wanted] * 2, atol=1e-12)
    victims = jax.tree.map(lambda *leaves: jnp.stack(leaves), BOTH, batch_of(RING, PATH, labels=[0, 1]))
    found = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), BOTH)
    side_by_side = modality.score_fn(found, victims).scores
    np.testing.assert_array_equal(side_by_side["exact"], np.ones((2, 2)))
    # With a granted structure nodes are known by their places.
    granted = modalities.graph(BLOCKS, SIZE, grants=["adjacency"])
    assert granted.score_fn(turned(BOTH, ORDERS), BOTH).scores["nodes"].max() < 1
    with pytest.raises(ValueError, match=r"found must hold the graphs of truth, \(2,\), got \(1,\)"):
        modality.score_fn(batch_of(PATH), BOTH)
    with pytest.raises(ValueError, match=r"inputs must be a dict of 'nodes', 'adjacency' and 'mask', got .*"):
        modality.draw_fn({"truth": Batch({"nodes": jnp.zeros((1, 2, 2))}, jnp.zeros(1))}, Path("nowhere"))


def test_a_reconstruction_that_is_not_finite_is_worth_nothing() -> None:
    modality = modalities.graph(BLOCKS, SIZE)
    broken = BOTH._replace(inputs=BOTH.inputs | {"nodes": BOTH.inputs["nodes"].at[1].set(jnp.nan)})
    scores = modality.score_fn(broken, BOTH).scores
    np.testing.assert_array_equal(scores["exact"], [1, 0])
    np.testing.assert_array_equal(scores["node_mse"], [0, np.inf])


def test_guesses_are_matched_as_reconstructions_are_and_one_finds_what_is_public() -> None:
    modality = modalities.graph(BLOCKS, SIZE)
    others = batch_of(([(0, 1)], [0, 0]), ([(0, 1), (0, 2), (0, 3)], [0, 1, 1, 1]), ([(0, 1), (1, 2)], [2, 2, 2]))
    guesses = modality.guess_fn(BOTH, others)
    assert list(guesses) == ["mean graph", "random graph", "nearest graph", "nearest of the class"]
    np.testing.assert_allclose(guesses["mean graph"], 0.5)
    shown = turned(BOTH, ORDERS)
    public = Batch(
        {name: np.concatenate([others.inputs[name], shown.inputs[name]]) for name in shown.inputs},
        np.concatenate([others.labels, shown.labels]),
    )
    found = modality.guess_fn(BOTH, public)
    np.testing.assert_array_equal(found["nearest graph"], 1)
    np.testing.assert_array_equal(found["nearest of the class"], 1)
    assert "nearest of the class" not in modality.guess_fn(BOTH, public._replace(labels=jnp.zeros((5, 2))))
    parts = {name: array[:, :5] for name, array in others.inputs.items()}
    smaller = Batch(parts | {"adjacency": parts["adjacency"][..., :5]}, others.labels)
    with pytest.raises(ValueError, match=r"public must hold graphs of the shapes .*'nodes': "):
        modality.guess_fn(BOTH, smaller)


def test_graphs_are_drawn_with_nodes_in_their_places(tmp_path: Path) -> None:
    modality = modalities.graph(BLOCKS, SIZE)
    path = tmp_path / "graphs.png"
    modality.draw_fn({"original": BOTH, "reconstruction": turned(BOTH, ORDERS)}, path)
    image = imread(path)
    assert image.shape[0] > 600
    assert image.shape[1] > 600
    # What was found exactly looks the same as the original: there is nothing in the red of errors.
    red = np.all(np.abs(image[..., :3] - np.array([0.84, 0.15, 0.16])) < 0.03, -1)
    assert red.sum() == 0
    missed = BOTH._replace(inputs=BOTH.inputs | {"adjacency": 1 - jnp.eye(SIZE) - BOTH.inputs["adjacency"]})
    modality.draw_fn({"original": BOTH, "reconstruction": missed}, path)
    image = imread(path)
    assert np.all(np.abs(image[..., :3] - np.array([0.84, 0.15, 0.16])) < 0.03, -1).sum() > 20
    captions = {"reconstruction": ["AUC 0.500", "AUC 0.250"]}
    graph_grid(
        {name: [graph_of(BOTH, i) for i in range(2)] for name in ("original", "reconstruction")},
        BLOCKS,
        path,
        captions=captions,
        title="Two graphs",
    )
    top = image.shape[0] // 12  # where the title is
    assert np.mean(imread(path)[:top, ..., :3] < 0.5) > np.mean(image[:top, ..., :3] < 0.5)
    with pytest.raises(ValueError, match=r"captions\['reconstruction'\] must be a line for each of the 1 graphs"):
        graph_grid({"original": [graph_of(BOTH, 0)]}, BLOCKS, path, captions=captions)
    with pytest.raises(ValueError, match=r"as many graphs each, at least one, got \{'a': 1, 'b': 0\}"):
        graph_grid({"a": [graph_of(BOTH, 0)], "b": []}, BLOCKS, path)
    with pytest.raises(ValueError, match="columns must hold graphs, got none"):
        modality.draw_fn({}, path)


def test_a_dollar_in_a_text_of_a_drawing_is_no_formula(tmp_path: Path) -> None:
    text = "$\\alpha_{$ 5 $"  # no formula that matplotlib could read
    blocks = [BLOCKS[0]._replace(names=(text,) * len(BLOCKS[0].names)), *BLOCKS[1:]]
    graph_grid({text: [graph_of(BOTH, 0)]}, blocks, tmp_path / "graphs.png", captions={text: [text]}, title=text)
    assert imread(tmp_path / "graphs.png").size


def test_priors_by_hand() -> None:
    inputs = {name: np.asarray(array, np.float64) for name, array in BOTH.inputs.items()}
    inputs["adjacency"] = 0.5 * inputs["adjacency"]
    batch, nothing = Batch(jax.tree.map(jnp.asarray, inputs), BOTH.labels), Observation({}, {}, {})
    wanted = np.zeros(3)
    for nodes, edges, mask in zip(*(inputs[name] for name in ("nodes", "adjacency", "mask")), strict=True):
        laplacian = np.diag(edges.sum(1)) - edges
        sums = np.trace(nodes.T @ laplacian @ nodes), edges.sum() / 2, (edges * (1 - edges)).sum() / 2
        wanted += np.array(sums) / mask.sum() / 2
    every = (graph_priors.smoothness, graph_priors.sparsity, graph_priors.binarity)
    np.testing.assert_allclose([float(prior(batch, nothing)) for prior in every], wanted, rtol=1e-5)
    weights = {"smoothness_weight": 0.1, "sparsity_weight": 2.0, "binarity_weight": 3.0}
    prior_fn = modalities.graph(BLOCKS, SIZE, **weights).prior_fn
    assert prior_fn is not None
    assert float(prior_fn(batch, nothing)) == pytest.approx(0.1 * wanted[0] + 2 * wanted[1] + 3 * wanted[2], rel=1e-5)
    assert modalities.graph(BLOCKS, SIZE).prior_fn is None
    with pytest.raises(ValueError, match=r"batch\.inputs must be a dict of 'nodes', 'adjacency' and 'mask', got "):
        graph_priors.sparsity(Batch(jnp.ones((1, 3)), BOTH.labels), nothing)


def attacked(modality: Any, truth: Batch, num_steps: int, seed: int = 2) -> Any:
    module = models.GCN(
        WIDTH, 2, widths=(24, 24), activation=jnp.tanh, bias_init=symmetric_uniform(0.3), rngs=nnx.Rngs(3)
    )
    apply_fn, params = models.functional(module)
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    threat = ThreatModel(labels=True, inputs=("mask", "nodes"))
    seen = observe(jax.random.key(1), threat, client_fn, params, truth, num_classes=2)
    attack = gradient_matching(client_fn, **modality.matching())
    found, info = jax.jit(lambda key: run(attack, key, seen, num_steps=num_steps))(jax.random.key(seed))
    return found, info, metrics.explained(client_fn, seen, found.batch)


def test_a_structure_is_found_where_features_are_granted_and_a_little_of_both_where_not() -> None:
    truth = batch_of(PATH)
    granted = modalities.graph(BLOCKS, SIZE, grants=["mask", "nodes"])
    found, info, explained = attacked(granted, truth, 300)
    assert bool(found.is_finite)
    assert float(explained.share) > 0.99
    scores = granted.score_fn(found.batch, truth).scores
    np.testing.assert_array_equal([scores["exact"], scores["edges"]], 1)
    # Without the grant the update is matched as well, and is explained by another graph.
    joint = modalities.graph(BLOCKS, SIZE, grants=["mask"])
    found, info, explained = attacked(joint, truth, 300)
    assert float(info.match[-1]) < 0.05 * float(info.match[0])
    assert float(explained.share) > 0.9
    assert joint.score_fn(found.batch, truth).scores["exact"][0] == 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": ()}, r"blocks must have at least one column, got \[\]"),
        ({"max_nodes": 0}, "max_nodes must be an integer of at least 1, got 0"),
        ({"blocks": ["label"]}, r"blocks must be a sequence of data.FeatureBlock, got \['label'\]"),
        ({"blocks": None}, "blocks must be a sequence of data.FeatureBlock, got None"),
        ({"max_nodes": 10**6}, "max_nodes must fit into memory"),
        ({"grants": ["size"]}, r"grants must be a sequence of names out of \('nodes', .*\), got \['size'\]"),
        ({"grants": "mask"}, "grants must be a sequence of names out of .*, got 'mask'"),
        ({"grants": ["nodes", "adjacency"]}, "grants must leave nodes or adjacency unknown, got both"),
        ({"sparsity_weight": -1.0}, r"^sparsity_weight must not be negative, got -1\.0"),
        ({"binarity_weight": np.inf}, "^binarity_weight must be finite, got inf"),
        ({"smoothness_weight": None}, "^smoothness_weight must be a single number, got None"),
        ({"dtype": "word"}, "dtype must be a floating-point type, got 'word'"),
        ({"dtype": jnp.int32}, "dtype must be a floating-point type"),
        ({"hops": -1}, "hops must be an integer of at least 0, got -1"),
    ],
)
def test_what_is_wrong_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modalities.graph(**({"blocks": BLOCKS, "max_nodes": SIZE} | arguments))


def test_an_observation_of_other_graphs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"inputs_like'\] must be graphs of the shapes \{'nodes': \(5, 4\), .* got \{"):
        unknowns_of(modalities.graph(BLOCKS, 5), BOTH)
    seen = Observation({}, {}, {"inputs_like": BOTH.inputs})
    with pytest.raises(ValueError, match="the threat model does not grant 'inputs'"):
        modalities.graph(BLOCKS, SIZE, grants=["mask"]).init_fn(jax.random.key(0), seen)
    seen.extra["inputs"] = {"nodes": BOTH.inputs["nodes"]}
    with pytest.raises(ValueError, match=r"does not grant the inputs' 'mask', got \['nodes'\]"):
        modalities.graph(BLOCKS, SIZE, grants=["mask"]).init_fn(jax.random.key(0), seen)


@pytest.mark.parametrize("function", ["score_fn", "guess_fn"])
def test_graphs_that_cannot_be_scored_are_named(function: str) -> None:
    score = getattr(modalities.graph(BLOCKS, SIZE), function)
    first, second = ("found", "truth") if function == "score_fn" else ("truth", "public")
    without = {name: part for name, part in BOTH.inputs.items() if name != "mask"}
    with pytest.raises(ValueError, match=f"{second}.inputs must be a dict of 'nodes', 'adjacency' and 'mask', got"):
        score(BOTH, Batch(without, BOTH.labels))
    with pytest.raises(ValueError, match=f"{first}.inputs must be a dict of 'nodes', 'adjacency' and 'mask', got"):
        score(Batch(BOTH.inputs["nodes"], BOTH.labels), BOTH)
    with pytest.raises(ValueError, match=rf"{second}.inputs must be finite, got nan at {second}.inputs\['nodes'\]"):
        score(BOTH, Batch(BOTH.inputs | {"nodes": BOTH.inputs["nodes"] * np.nan}, BOTH.labels))
    with pytest.raises(ValueError, match=f"{second}.inputs must be graphs, at least one, of nodes"):
        score(BOTH, jax.tree.map(lambda leaf: leaf[:0], BOTH))
    with pytest.raises(ValueError, match=f"{second}.inputs must be graphs, at least one, of nodes"):
        score(BOTH, Batch(BOTH.inputs | {"mask": BOTH.inputs["mask"][:, :2]}, BOTH.labels))
