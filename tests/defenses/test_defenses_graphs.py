"""Every defense of a client of graphs, whose inputs are a tree of arrays."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gia_jax import Batch, Observation, ThreatModel, clients, labels, models
from gia_jax.data import pad_graphs
from gia_jax.defenses import kept_features, live_share_pruned
from gia_jax.defenses.mixing import as_probabilities
from gia_jax.defenses.protected import DEFENSES, Protected, live_shares, parse, protect
from gia_jax.models.layers import symmetric_uniform

HEAD = labels.dense("head")
MODULE = models.GCN(3, 2, widths=(8, 6), bias_init=symmetric_uniform(0.3), rngs=nnx.Rngs(0))
APPLY_FN, PARAMS = models.functional(MODULE)
ENCODINGS = [name for name, facts in DEFENSES.items() if facts.acts_on == "input"]
# The rest at settings under which each of them changes the update of four graphs.
SETTINGS = {"clip": "norm=0.01", "gaussian": "scale=0.1", "laplace": "scale=0.1", "precode": "size=4"}
SETTINGS |= {"dpsgd": "noise_multiplier=0.5,norm=0.1"}


def ring(count: int) -> np.ndarray:
    return np.roll(np.eye(count), 1, 1) + np.roll(np.eye(count), -1, 1)


def batch_of(sizes: list[int], num_nodes: int) -> Batch:
    """Rings of atoms, padded."""
    rng = np.random.default_rng(0)
    nodes = [np.eye(3)[rng.integers(0, 3, size)] for size in sizes]
    arrays = pad_graphs([ring(size) for size in sizes], nodes, num_nodes=num_nodes)
    inputs = dict(zip(("nodes", "adjacency", "mask"), map(jnp.asarray, arrays), strict=True))
    return Batch(inputs, jnp.arange(len(sizes)) % 2)


BATCH = batch_of([3, 4, 5, 6], 7)


def protected_by(name: str) -> Protected:
    colon = ":" if name in SETTINGS else ""
    return protect(parse(name + colon + SETTINGS.get(name, "")), MODULE, num_classes=2)


def seen_of(protected: Protected, key: jax.Array, batch: Batch = BATCH) -> Observation:
    threat = ThreatModel(labels=True, inputs=("mask",))
    return jax.jit(lambda key: protected.observe(key, threat, batch))(key)


def norm(tree: Any) -> float:
    return float(optax.tree.norm(tree))


@pytest.mark.parametrize("name", [name for name in DEFENSES if name not in ENCODINGS])
def test_every_defense_changes_the_update_of_graphs_and_the_attacker_of_it_runs(name: str) -> None:
    protected = protected_by(name)
    seen = seen_of(protected, jax.random.key(1))
    assert jax.tree.map(jnp.shape, seen.update) == jax.tree.map(jnp.shape, protected.params)
    np.testing.assert_array_equal(seen.extra["inputs"]["mask"], BATCH.inputs["mask"])
    undefended = clients.federated_sgd(clients.cross_entropy(protected.apply_fn))(protected.params, BATCH)
    change = norm(optax.tree.sub(seen.update, undefended)) / norm(undefended)
    assert 1e-3 < change < 1e3
    assumed = protected.assumed_fn(protected.params, BATCH)
    objective_fn = protected.adapt_fn(lambda one, other: jnp.square(optax.tree.norm(optax.tree.sub(one, other))))
    assert np.isfinite(objective_fn(assumed, seen.update))


@pytest.mark.parametrize("name", ENCODINGS)
def test_what_mixes_examples_refuses_graphs_and_says_who_does(name: str) -> None:
    message = rf"batch\.inputs must be one array of shape \(b, \*d\) for {name}, got a dict"
    with pytest.raises(ValueError, match=message):
        seen_of(protected_by(f"{name}:k=2"), jax.random.key(1))


def test_dp_sgd_clips_every_graph() -> None:
    """Without noise it is the mean of the graphs' own gradients, each shortened to the norm."""
    client_fn = clients.federated_sgd(clients.cross_entropy(APPLY_FN))
    singles = [client_fn(PARAMS, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], BATCH)) for i in range(4)]
    lengths = sorted(norm(single) for single in singles)
    bound = (lengths[1] + lengths[2]) / 2  # two of them are longer
    assert lengths[1] < 0.99 * bound < bound < 0.99 * lengths[2]
    clipped = [jax.tree.map(lambda leaf, g=g: leaf * min(1, bound / norm(g)), g) for g in singles]
    wanted = jax.tree.map(lambda *leaves: sum(leaves) / 4, *clipped)
    protected = protect(parse(f"dpsgd:noise_multiplier=0,norm={bound}"), MODULE, num_classes=2)
    found = seen_of(protected, jax.random.key(1)).update
    assert norm(optax.tree.sub(found, wanted)) < 1e-5 * norm(wanted)


@functools.cache
def scores_by_hand() -> np.ndarray:
    """|dr_i / d(X, A)| / (|r_i| + 0.1) of the pooled features, added over the graphs."""
    total = np.zeros(6)
    for i in range(4):
        one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], BATCH.inputs)

        def features(nodes: jax.Array, adjacency: jax.Array, mask: jax.Array = one["mask"]) -> jax.Array:
            hidden = MODULE.embeddings({"nodes": nodes, "adjacency": adjacency, "mask": mask})[-1]
            return jnp.sum(hidden[0], 0) / jnp.sum(mask)

        values = features(one["nodes"], one["adjacency"])
        jacobians = jax.jacrev(features, (0, 1))(one["nodes"], one["adjacency"])
        squares = sum(np.square(np.asarray(part)).reshape(6, -1).sum(1) for part in jacobians)
        total += np.sqrt(squares) / (np.abs(values) + 0.1)
    return total


@pytest.mark.parametrize("ratio", [0.34, 0.5, 0.84])
def test_soteria_scores_features_by_nodes_and_edges(ratio: float) -> None:
    kept = kept_features(APPLY_FN, HEAD, PARAMS, BATCH.inputs, ratio=ratio)
    scores = scores_by_hand()
    gone = scores[~np.asarray(kept)]
    assert len(gone) == int(6 * ratio)
    assert gone.max() <= scores[np.asarray(kept)].min()


def test_soteria_does_not_see_padding_and_estimates_from_directions() -> None:
    padded = batch_of([3, 4, 5, 6], 12).inputs
    options = {"ratio": 0.5}
    kept = kept_features(APPLY_FN, HEAD, PARAMS, BATCH.inputs, **options)
    np.testing.assert_array_equal(kept_features(APPLY_FN, HEAD, PARAMS, padded, **options), kept)
    many = kept_features(APPLY_FN, HEAD, PARAMS, BATCH.inputs, **options, num_probes=4_096)
    np.testing.assert_array_equal(many, kept)


def test_shares_of_live_features_are_those_of_each_victim() -> None:
    victims = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), BATCH.inputs)
    shares = live_shares(parse("soteria:ratio=0.5"), APPLY_FN, PARAMS, victims)
    for i, share in enumerate(shares):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], victims)
        assert share == pytest.approx(float(live_share_pruned(APPLY_FN, HEAD, PARAMS, one, ratio=0.5)), abs=1e-6)
    with pytest.raises(ValueError, match=r"inputs\['mask'\] must be floating \(v, b, \*d\), nothing of it 0, got"):
        inspect.unwrap(live_shares)(parse("soteria"), APPLY_FN, PARAMS, victims | {"mask": jnp.ones(2)})


def test_a_tree_without_numbers_to_move_is_refused() -> None:
    def embedded(params: Any, inputs: Any) -> jax.Array:
        return params["table"][inputs["codes"]] @ params["head"]["kernel"]

    params = {"table": jnp.ones((5, 4)), "head": {"kernel": jnp.ones((4, 2))}}
    with pytest.raises(ValueError, match="inputs must be of a floating-point type, got int32"):
        kept_features(embedded, HEAD, params, {"codes": jnp.zeros(3, jnp.int32)}, ratio=0.5)
    # Beside numbers that move, categories stay as they are.
    inputs = {"codes": jnp.arange(3), "numbers": jax.random.normal(jax.random.key(0), (3, 4))}

    def both(params: Any, inputs: Any) -> jax.Array:
        hidden = params["table"][inputs["codes"]] * inputs["numbers"] * jnp.array([1.0, 2.0, 3.0, 4.0])
        return hidden @ params["head"]["kernel"]

    # A derivative of j for feature j, whose value is j times the number.
    kept = kept_features(both, HEAD, params, inputs, ratio=0.25)
    wanted = [float(jnp.sum(j / (jnp.abs(j * inputs["numbers"][:, j - 1]) + 0.1))) for j in range(1, 5)]
    assert np.flatnonzero(~np.asarray(kept)).tolist() == [int(np.argmin(wanted))]


def test_labels_of_graphs_become_probabilities() -> None:
    rows = as_probabilities(BATCH, 2)
    assert rows.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    encoding, _ = protected_by("none").share(*jax.random.split(jax.random.key(0)), BATCH, soft_classes=2)
    assert encoding.labels.shape == (4, 2)
