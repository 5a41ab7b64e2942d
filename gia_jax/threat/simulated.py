"""Observations of a simulated client, which is run on data of its own."""

import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import Batch, ClientFn, Observation, Params
from gia_jax.threat.entries import first_round, grants
from gia_jax.threat.model import ThreatModel


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
    """Runs a client on its batch, and returns what the adversary sees of it under a threat model.

    Args:
        key: Random key that shuffles the granted labels. Never pass it on to an attack.
        threat: Threat model, which says what the adversary is granted.
        client_fn: Client, a function `(params, batch) -> update`.
        params: Parameters that the server sent.
        batch: The client's examples. Nothing of them reaches the observation unless it is granted.
        num_classes: Number of classes, where the labels are classes. They must then be indices below it, shape (b, *t),
            or probabilities, shape (b, *t, num_classes). None leaves the labels unchecked, for losses on other targets.
        statistics: Batch-normalisation statistics of the client's forward pass. They are granted if `threat.statistics`
            is set.
        batch_indices: Positions in `batch` of the examples of each of t rounds, shape (t, b), for a client of several
            rounds such as `clients.vertical_sgd`. Every leaf of its update has a leading axis of length t. They are
            granted if `threat.batch_indices` is set.
        draws: Random key of a client that draws numbers, such as one with a loss from `models.stochastic`. It is
            granted if `threat.draws` is set.

    Returns:
        The observation. It holds arrays only, so that `jax.vmap` over keys and batches observes many victims.

    Raises:
        ValueError: If the batch is empty, its labels are out of range or not one for each example, the inputs, the
            labels, the parameters or the update are not finite, the update has not the structure and shapes of
            `params`, or what the threat model grants was not given.

    Examples:
        Known labels are shuffled, since the order of a batch is no part of its gradient:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, observe
        >>> def client_fn(params, batch):  # gradient of the mean output of a linear model
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> params = {"kernel": jnp.array([1.0, 1.0])}
        >>> batch = Batch(jnp.array([[0.0, 2.0], [2.0, 4.0]]), jnp.array([3, 7]))
        >>> seen = observe(jax.random.key(0), ThreatModel(labels=True), client_fn, params, batch)
        >>> seen.update["kernel"].tolist(), sorted(seen.extra["labels"].tolist()), seen.extra["inputs_like"].tolist()
        ([1.0, 3.0], [3, 7], [[0.0, 0.0], [0.0, 0.0]])
    """
    _check.batch(batch.inputs, batch.labels, num_classes)
    _check.finite("params", params)
    update = client_fn(params, batch)
    one_round = update if batch_indices is None else first_round(update, len(batch_indices))
    _check.same_structure("update", one_round, "params", params)
    _check.finite("update", update)
    extra = grants(key, threat, batch, statistics=statistics, batch_indices=batch_indices, draws=draws)
    return Observation(params, update, extra)
