"""The entries of `Observation.extra`, which hold what the adversary knows beside the parameters and the update."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import Batch, Observation, Updates
from gia_jax.threat.model import ThreatModel


def grants(
    key: PRNGKeyArray,
    threat: ThreatModel,
    batch: Batch,
    *,
    statistics: PyTree[Array] | None = None,
    batch_indices: Int[Array | np.ndarray, "t b"] | None = None,
    draws: PRNGKeyArray | None = None,
) -> dict[str, Any]:
    """Returns what a threat model grants beside the parameters and the update: the entries of `Observation.extra`.

    `observe` does this for a single client. It is of use by itself for an update that comes from elsewhere, such as a
    sum over clients.

    Args:
        key: Random key that shuffles the granted labels.
        threat: Threat model, which says what the adversary is granted.
        batch: Examples behind the update: those of one client, or of all clients behind a sum.
        statistics: Batch-normalisation statistics, granted if `threat.statistics` is set.
        batch_indices: Positions of the examples of each of t rounds, shape (t, b), granted if `threat.batch_indices` is
            set.
        draws: Random key that the client drew from, granted if `threat.draws` is set.

    Returns:
        The entries by name, which `Observation` describes.

    Raises:
        ValueError: If statistics, batch indices or draws are granted and not given, or parts of the inputs are granted
            that there are not, or all of them.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, grants
        >>> batch = Batch(jnp.array([[0.5, -1.0]]), jnp.array([3]))
        >>> entries = grants(jax.random.key(0), ThreatModel(labels=True, label_order=True), batch)
        >>> {name: entry.tolist() for name, entry in entries.items()}
        {'inputs_like': [[0.0, 0.0]], 'labels': [3]}
    """
    extra: dict[str, Any] = {}
    if threat.batch_size:
        extra["inputs_like"] = jax.tree.map(jnp.zeros_like, batch.inputs)
    if threat.labels:
        size = _check.examples(batch.inputs)
        order = jnp.arange(size) if threat.label_order else jax.random.permutation(key, size)
        extra["labels"] = jax.tree.map(lambda leaf: jnp.asarray(leaf)[order], batch.labels)
    if threat.inputs:
        extra["inputs"] = known_parts(batch.inputs, threat.inputs, name="threat.inputs")
    given = beside(statistics, batch_indices, draws)
    for name in ("statistics", "batch_indices", "draws"):
        if getattr(threat, name):
            if name not in given:
                raise ValueError(f"{name} must be given where the threat model grants them, got None")
            extra[name] = given[name]
    return extra


def known_parts(inputs: PyTree[Array], names: Sequence[str], *, name: str) -> dict[str, Array]:
    """Returns the parts of the inputs that an adversary knows.

    Args:
        inputs: Inputs of the client's batch.
        names: Names of the parts.
        name: Name of the argument that has them, for the message.

    Returns:
        The parts by name.

    Raises:
        ValueError: If the inputs are no dict, have no such part, or nothing of them is left unknown.
    """
    if not isinstance(inputs, Mapping):
        kind = type(inputs).__name__
        raise ValueError(f"{name} must name parts of a batch whose inputs are a dict, got {tuple(names)} of {kind}")
    if not set(names) < set(inputs):
        raise ValueError(f"{name} must name some of the parts {sorted(inputs)}, but not all, got {tuple(names)}")
    return {part: inputs[part] for part in names}


def beside(
    statistics: PyTree[Array] | None,
    batch_indices: Int[Array | np.ndarray, "t b"] | None,
    draws: PRNGKeyArray | None,
) -> dict[str, Any]:
    """Returns what is known beside the shape of the batch and its labels, as entries of `Observation.extra`.

    Args:
        statistics: Batch-normalisation statistics of the client's forward pass.
        batch_indices: Positions of the examples of each of t rounds, shape (t, b).
        draws: Random key that the client drew from.

    Returns:
        The entries by name, without those that are None.
    """
    indices = None if batch_indices is None else jnp.asarray(batch_indices)
    every = {"statistics": statistics, "batch_indices": indices, "draws": draws}
    return {name: value for name, value in every.items() if value is not None}


def first_round(update: Updates, num_rounds: int) -> Updates:
    """Checks that an update is of several rounds, and returns that of the first, which must look like the parameters.

    Args:
        update: Update of the rounds, a tree with a leading axis of rounds in every leaf.
        num_rounds: Number of rounds.

    Returns:
        The update of the first round.

    Raises:
        ValueError: If a leaf has another leading axis.
    """
    for path, leaf in jax.tree.leaves_with_path(update):
        if jnp.shape(leaf)[:1] != (num_rounds,):
            name = jax.tree_util.keystr(path)
            raise ValueError(f"update must hold {num_rounds} rounds as batch_indices does, got {leaf.shape} at {name}")
    return jax.tree.map(lambda leaf: leaf[0], update)


def granted(observation: Observation, name: str) -> Any:
    """Returns an entry of `observation.extra`, for the parts of an attack that need it.

    Args:
        observation: Observation that the attack received.
        name: Name of the entry, such as "labels". `Observation` lists the names.

    Returns:
        The entry.

    Raises:
        ValueError: If the threat model does not grant it. The message names the entry and those that are there.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import Observation, granted
        >>> seen = Observation(params={}, update={}, extra={"inputs_like": jnp.zeros((1, 2))})
        >>> granted(seen, "inputs_like").shape
        (1, 2)
        >>> granted(seen, "labels")
        Traceback (most recent call last):
        ValueError: the threat model does not grant 'labels'; observation.extra has ['inputs_like']
    """
    if name not in observation.extra:
        known = sorted(observation.extra) or "nothing"
        raise ValueError(f"the threat model does not grant {name!r}; observation.extra has {known}")
    return observation.extra[name]


def granted_labels(observation: Observation) -> PyTree[Array]:
    """Returns the labels that the threat model grants: the label rule of an adversary that knows them.

    It is the `label_fn` of an attack under a threat model with `labels=True`. `gia_jax.labels` holds rules that infer
    the labels from the update instead.

    Args:
        observation: Observation that the attack received.

    Returns:
        The labels, class indices (b,), class probabilities (b, c), or the targets of the client's loss.

    Raises:
        ValueError: If the threat model does not grant the labels.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import Observation, granted_labels
        >>> granted_labels(Observation(params={}, update={}, extra={"labels": jnp.array([3, 7])})).tolist()
        [3, 7]
    """
    return granted(observation, "labels")
