"""What the adversary sees: the only place where truth becomes observation."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import Batch, ClientFn, Observation, Params, Updates


@dataclass(frozen=True)
class ThreatModel:
    """Who attacks and what it is granted beside the parameters and the update; print it beside every number.

    Attributes:
        name: Who attacks.
        batch_size: Whether the shape of the batch is known (observation.extra["inputs_like"]).
        labels: Whether the labels are known, in no particular order (observation.extra["labels"]).
        label_order: Whether known labels come in the batch's own order. Local steps on minibatches leak through it
            which example was used when; one gradient of the whole batch does not depend on it.
        statistics: Whether the batch-normalisation statistics of the client's forward pass are known
            (observation.extra["statistics"]); True, or their kind where there are several, such as "inferred".
        batch_indices: Whether it is known which records each of several rounds used
            (observation.extra["batch_indices"]).
        draws: Whether the client's own random draws, such as dropout masks and noise layers, are known
            (observation.extra["draws"], the key that they come from).
    """

    name: str = "honest-but-curious server"
    batch_size: bool = True
    labels: bool = False
    label_order: bool = False
    statistics: bool | str = False
    batch_indices: bool = False
    draws: bool = False

    def __post_init__(self) -> None:
        if self.label_order and not self.labels:
            raise ValueError("label_order=True needs labels=True, got labels=False")

    def describe(self) -> str:
        """One line for a table: who attacks, and what it knows."""
        known = ["parameters", "update"]
        known += ["batch size"] if self.batch_size else []
        known += [f"labels ({'in order' if self.label_order else 'unordered'})"] if self.labels else []
        kind = f"{self.statistics} " if isinstance(self.statistics, str) else ""
        known += [f"{kind}batch statistics"] if self.statistics else []
        known += ["batch indices"] if self.batch_indices else []
        known += ["the client's random draws"] if self.draws else []
        return f"{self.name}; knows {', '.join(known)}"


def observe(
    key: PRNGKeyArray,
    threat: ThreatModel,
    client_fn: ClientFn,
    params: Params,
    batch: Batch,
    *,
    num_classes: int | None = None,
    statistics: PyTree[Array] | None = None,
    batch_indices: Int[Array | np.ndarray, "t b"] | None = None,
    draws: PRNGKeyArray | None = None,
) -> Observation:
    """Lets the client work on its batch, and keeps of it what the threat model grants.

    Args:
        key: Randomness of the threat model: it shuffles granted labels. Never pass it on to an attack.
        threat: What the adversary is granted.
        client_fn: `(params, batch) -> update`.
        params: The parameters the server sent.
        batch: The client's data; nothing of it reaches the observation unless granted.
        num_classes: The number of classes, where the labels are classes: then they must be indices (b, *t) below it, or
            (b, *t, num_classes) probabilities. None leaves them to the client's loss.
        statistics: The statistics to grant where `threat.statistics` is True.
        batch_indices: The records of each round of a client of t rounds, such as `clients.vertical_sgd`, whose update
            has a leading axis of rounds; granted where `threat.batch_indices` is True.
        draws: The key of a client that draws, such as one with a loss of `models.stochastic`; granted where
            `threat.draws` is True.

    Returns:
        The observation, all arrays: `vmap` over keys and batches observes many victims.

    Raises:
        ValueError: An empty batch, labels of another number of examples or out of range, non-finite inputs, labels or
            parameters, an update unlike `params`, or granted statistics, batch indices or draws that are missing.
    """
    _check.batch(batch.inputs, batch.labels, num_classes)
    _check.finite("params", params)
    update = client_fn(params, batch)
    one_round = update if batch_indices is None else _first_round(update, len(batch_indices))
    _check.same_structure("update", one_round, "params", params)
    _check.finite("update", update)
    extra = grants(key, threat, batch, statistics=statistics, batch_indices=batch_indices, draws=draws)
    return Observation(params, update, extra)


def grants(
    key: PRNGKeyArray,
    threat: ThreatModel,
    batch: Batch,
    *,
    statistics: PyTree[Array] | None = None,
    batch_indices: Int[Array | np.ndarray, "t b"] | None = None,
    draws: PRNGKeyArray | None = None,
) -> dict[str, Any]:
    """What the threat model grants beside the parameters and the update: `Observation.extra`.

    Args:
        key: Randomness of the threat model: it shuffles granted labels.
        threat: What the adversary is granted.
        batch: The data behind the update: of one client, or of all clients behind a sum.
        statistics: The statistics to grant where `threat.statistics` is True.
        batch_indices: The records of each round, to grant where `threat.batch_indices` is True.
        draws: The key of the client's draws, to grant where `threat.draws` is True.

    Raises:
        ValueError: Granted statistics, batch indices or draws that are missing.
    """
    extra: dict[str, Any] = {}
    if threat.batch_size:
        extra["inputs_like"] = jnp.zeros_like(batch.inputs)
    if threat.labels:
        size = batch.inputs.shape[0]
        order = jnp.arange(size) if threat.label_order else jax.random.permutation(key, size)
        extra["labels"] = jax.tree.map(lambda leaf: jnp.asarray(leaf)[order], batch.labels)
    given = {"statistics": statistics, "batch_indices": batch_indices, "draws": draws}
    for name, value in given.items():
        if getattr(threat, name):
            if value is None:
                raise ValueError(f"{name} must be given where the threat model grants them, got None")
            extra[name] = jnp.asarray(value) if name == "batch_indices" else value
    return extra


def _first_round(update: Updates, num_rounds: int) -> Updates:
    for path, leaf in jax.tree.leaves_with_path(update):
        if jnp.shape(leaf)[:1] != (num_rounds,):
            name = jax.tree_util.keystr(path)
            raise ValueError(f"update must hold {num_rounds} rounds as batch_indices does, got {leaf.shape} at {name}")
    return jax.tree.map(lambda leaf: leaf[0], update)


def granted(observation: Observation, name: str) -> Any:
    """`observation.extra[name]`, or a ValueError that says which grant is missing."""
    if name not in observation.extra:
        known = sorted(observation.extra) or "nothing"
        raise ValueError(f"the threat model does not grant {name!r}; observation.extra has {known}")
    return observation.extra[name]


def granted_labels(observation: Observation) -> PyTree[Array]:
    """The label rule of an adversary that knows the labels."""
    return granted(observation, "labels")
