"""Victims of the command line whose clients aggregate their updates by a protocol."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from gia_jax._compile import RUN_ONCE
from gia_jax.base import Batch, Observation
from gia_jax.cli.cases import Case
from gia_jax.cli.protocols import TARGETS
from gia_jax.defenses.protected import Protected
from gia_jax.secure_aggregation.observe import Ciphertext, observe
from gia_jax.secure_aggregation.protocol import AggregationProtocol, aggregate
from gia_jax.threat import ThreatModel, grants, stack


def see_aggregated(
    case: Case, protected: Protected, protocol: AggregationProtocol, key: PRNGKeyArray, *, known: bool
) -> dict[str, tuple[Case, Observation | Ciphertext]]:
    """Runs a round of the protocol for every victim, and returns what the server then holds of one client and of all.

    Args:
        case: Victims, each of which is a group of clients. Its batch is that of all clients, in equal parts.
        protected: Client with its defenses, which every one of them is.
        protocol: Protocol for as many clients.
        key: Random key of the clients, the rounding and the threat model.
        known: Whether labels are granted.

    Returns:
        For every name in `TARGETS` a pair. Its first part is the case with the data behind the target. The second is
        the observations, with a leading axis of victims, or a `Ciphertext`.

    Raises:
        ValueError: If the number of clients does not divide the batch.
    """
    victims, size = case.truth.labels.shape
    clients = protocol.quantizer.num_clients
    if size % clients:
        raise ValueError(f"case must have batches of a multiple of {clients} examples, got {size}")
    threat, params = ThreatModel(labels=known), protected.params
    key_clients, key_rounds, key_threat = jax.random.split(key, 3)

    def share(key: PRNGKeyArray, batch: Batch) -> tuple[Batch, Any]:
        key_encode, key_client = jax.random.split(key)
        return protected.share(key_encode, key_client, batch, case.others)

    parts = jax.tree.map(lambda leaf: leaf.reshape(victims, clients, -1, *leaf.shape[2:]), case.truth)
    encodings, updates = jax.jit(jax.vmap(jax.vmap(share)), compiler_options=RUN_ONCE)(
        jax.random.split(key_clients, (victims, clients)), parts
    )
    seen: dict[str, list[Any]] = {target: [] for target in TARGETS}
    for v in range(victims):
        batches, shared = jax.tree.map(lambda leaf, v=v: leaf[v], (encodings, updates))
        view = aggregate(jax.random.fold_in(key_rounds, v), protocol, shared)
        behind = {
            "client:0": jax.tree.map(lambda leaf: leaf[0], batches),
            "aggregate": jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batches),
        }
        for target, batch in behind.items():
            extra = grants(jax.random.fold_in(key_threat, v), threat, batch)
            seen[target].append(observe(view, target, params, extra=extra))
    first = case._replace(truth=jax.tree.map(lambda leaf: leaf[:, : size // clients], case.truth))
    return {"client:0": (first, _stacked(seen["client:0"])), "aggregate": (case, _stacked(seen["aggregate"]))}


def _stacked(seen: Sequence[Any]) -> Observation | Ciphertext:
    """Returns the observations of all victims as one. One ciphertext stands for all."""
    if isinstance(seen[0], Ciphertext):
        return seen[0]
    return stack(seen)
