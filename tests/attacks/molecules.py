"""Ten molecules of TUDataset, written out, and networks to attack."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gia_jax import Batch, Observation, ThreatModel, clients, models, observe
from gia_jax.models.layers import symmetric_uniform

NUM_KINDS, MAX_DEGREE = 9, 4

# Name, kind of each node, edges. PTC_MR 84 and 196 have gradients whose span lacks one dimension of that of the stars.
GRAPHS = [
    ("MUTAG 75", "0 0 0 0 0 0 1 2 2 5", "0-1 0-5 1-2 2-3 3-4 3-9 4-5 4-6 6-7 6-8"),
    (
        "MUTAG 0",
        "0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 2 2",
        "0-1 0-5 1-2 2-3 3-4 3-9 4-5 4-6 6-7 7-8 8-9 8-13 9-10 10-11 11-12 12-13 12-14 14-15 14-16",
    ),
    ("MUTAG 143", "0 0 0 0 0 0 5 1 2 2 5", "0-1 0-5 1-2 2-3 2-10 3-4 3-7 4-5 5-6 7-8 7-9"),
    (
        "MUTAG 157",
        "0 0 2 1 0 0 0 0 0 0 0 0 0 0 0 0 0 1 2 2",
        "0-1 1-2 1-3 3-4 4-5 4-9 5-6 6-7 7-8 7-12 8-9 8-10 10-11 11-12 11-16 12-13 13-14 14-15 15-16 15-17 17-18 17-19",
    ),
    ("MUTAG 97", "0 0 0 0 1 0 0 0 0 0 1 2 2", "0-1 0-9 1-2 2-3 2-7 3-4 4-5 5-6 6-7 7-8 8-9 8-10 10-11 10-12"),
    (
        "MUTAG 54",
        "0 0 0 0 0 0 0 0 0 0 0 1 2 2",
        "0-1 1-2 1-10 2-3 2-7 3-4 4-5 5-6 6-7 7-8 8-9 9-10 10-11 11-12 11-13",
    ),
    ("PTC_MR 84", "7 5 3 5 5 5 5 5 5 7", "0-1 1-2 1-9 2-3 3-4 3-8 4-5 5-6 6-7 7-8 8-9"),
    ("PTC_MR 299", "2 5 5 5 5 3 3 5 5 5 5 5 5", "0-1 1-2 1-6 2-3 3-4 3-5 5-6 6-7 7-8 7-12 8-9 9-10 10-11 11-12"),
    ("PTC_MR 18", "1 2 2 5 5 6 2 5 5 6 2 5 5 6", "0-1 0-2 0-6 0-10 2-3 3-4 4-5 6-7 7-8 8-9 10-11 11-12 12-13"),
    ("PTC_MR 196", "5 8 5 8 5 6", "0-1 0-2 0-4 2-3 4-5"),
]


class Molecule(NamedTuple):
    kinds: np.ndarray
    adjacency: np.ndarray

    @property
    def nodes(self) -> np.ndarray:
        """One-hot kinds and degrees."""
        return np.concatenate(
            [np.eye(NUM_KINDS)[self.kinds], np.eye(MAX_DEGREE + 1)[self.adjacency.sum(1).astype(int)]], 1
        )


def adjacency_of(edges: str, size: int) -> np.ndarray:
    adjacency = np.zeros((size, size))
    for edge in edges.split():
        i, j = map(int, edge.split("-"))
        adjacency[i, j] = adjacency[j, i] = 1
    return adjacency


MOLECULES = {
    name: Molecule(np.array(kinds.split(), int), adjacency_of(edges, len(kinds.split())))
    for name, kinds, edges in GRAPHS
}


class Net(NamedTuple):
    params: Any
    client_fn: Any


@functools.cache
def network(num_features: int = NUM_KINDS + MAX_DEGREE + 1, width: int = 300, seed: int = 0, **settings: Any) -> Net:
    """A GCN of two layers in float64, with a compiled client; the same one for the same settings."""
    settings = {"bias_init": symmetric_uniform(0.3)} | settings
    module = models.GCN(num_features, 2, widths=(width, width), rngs=nnx.Rngs(seed), **settings)
    apply_fn, params = models.functional(module)
    client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
    return Net(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params), client_fn)


def inputs_of(nodes: np.ndarray, adjacency: np.ndarray, size: int = 20) -> dict[str, np.ndarray]:
    room = size - len(nodes)
    return {
        "nodes": np.pad(nodes, ((0, room), (0, 0)))[None],
        "adjacency": np.pad(adjacency, (0, room))[None],
        "mask": (np.arange(size) < len(nodes))[None].astype(float),
    }


def seen(net: Net, inputs: dict[str, Any], label: int = 1, **more: Any) -> Observation:
    """What the server sees of one graph."""
    batch = Batch(jax.tree.map(jnp.asarray, inputs), jnp.array([label]))
    found = observe(jax.random.key(0), ThreatModel(), net.client_fn, net.params, batch)
    return found._replace(extra={**found.extra, **more})
