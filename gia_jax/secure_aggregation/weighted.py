"""Means weighted by the clients' numbers of records, with the numbers inside the sum.

McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017, for the mean;
Bonawitz et al., CCS 2017, for its way through the sum: each client puts in its weight beside its update times the
weight, so that the server learns the mean and the total, not who holds how many.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Updates
from gia_jax.secure_aggregation.protocol import (
    AggregationProtocol,
    ServerView,
    aggregate_residues,
    decode,
    divided,
    quantized,
)


class WeightedMean(NamedTuple):
    """What the server learns from a weighted run.

    Attributes:
        mean: Weighted mean of the contributors' updates, a tree like one of them. For gradients of the mean loss,
            weighted by numbers of examples, it is the gradient of the union of their batches.
        total: Sum of the contributors' weights.
        view: The server's view of the run, whose vectors begin with the weight: what an attack observes of the sum is
            `mean`, not `observe(view, "aggregate", ...)`.

    Examples:
        The view's sum begins with the total of the weights:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import secure_aggregation as sa
        >>> protocol = sa.plain_sum(2, clip=1.0)
        >>> found = sa.weighted_mean(jax.random.key(0), protocol, jnp.array([[0.0], [0.4]]), [1, 3], max_weight=3)
        >>> found.total, int(found.view.total[0]), found.mean.shape
        (4, 4, (1,))
    """

    mean: Updates
    total: int
    view: ServerView


def weighted_mean(
    key: PRNGKeyArray,
    protocol: AggregationProtocol,
    updates: Updates,
    weights: Sequence[int],
    *,
    max_weight: int,
    dropouts: Mapping[int, int] | None = None,
    insecure_seed: int | None = None,
) -> WeightedMean:
    """Runs a protocol on weights and weighted updates: a client of weight w counts as w clients with its update.

    An entry of the mean is off by less than one step, 1 / `protocol.quantizer.scale`, from that of the clipped updates.
    The total tells the server the size of the joint batch, all that `labels.bias_counts` needs beside the mean.

    Args:
        key: Random key of the clients' stochastic rounding: client i draws from `fold_in(key, i)`.
        protocol: Protocol that gives the server the sum, with `bits` small enough for num_clients times `max_weight`.
        updates: Updates of all clients: a tree of floats, every leaf with a leading axis of the protocol's number of
            clients. They are clipped and rounded before they are weighted.
        weights: Weight of every client, each known to that client alone, from 1 to `max_weight`.
        max_weight: Largest weight that a client may have, at least 1. It is public.
        dropouts: The first round that a client does not answer, by client. By default all clients answer every round.
        insecure_seed: Seed of a reproducible run, an integer of at least 0, for experiments only: whoever knows it
            knows every secret. None draws every secret from the operating system.

    Returns:
        The mean, the total and the view.

    Raises:
        ValueError: If `max_weight` is no integer of at least 1, the weights are not one integer from 1 to `max_weight`
            for each client, the sum could wrap around, the server does not learn it from this protocol, or `aggregate`
            refuses the other arguments.
        AggregationAborted: If too few clients answered, or a party refused a message.

    Examples:
        The client of weight 3 counts three times, and the server learns only the mean and the total:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import secure_aggregation as sa
        >>> protocol = sa.secagg(2, threshold=2, clip=1.0)
        >>> found = sa.weighted_mean(jax.random.key(0), protocol, jnp.array([[0.0], [0.4]]), [1, 3], max_weight=3)
        >>> found.total, round(float(found.mean[0]), 2)
        (4, 0.3)
    """
    count = protocol.quantizer.num_clients
    if len(weights) != count:
        raise ValueError(f"weights must be {count}, one for each client, got {len(weights)}")
    _check.integer(max_weight=max_weight)
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | np.integer) or not 1 <= weight <= max_weight:
            raise ValueError(f"weights must be integers from 1 to max_weight={max_weight}, got {weight!r}")
    # The bound on the sum, of as many clients as the weights stand for.
    dataclasses.replace(protocol.quantizer, num_clients=count * max_weight)
    residues, like = quantized(key, protocol, updates)
    own = np.asarray(weights, np.uint64)[:, None]
    weighted = np.concatenate([own, own * residues % protocol.quantizer.modulus], axis=1).astype(np.uint32)
    pair = (jax.ShapeDtypeStruct((), np.float32), like)
    view = aggregate_residues(protocol, weighted, like=pair, dropouts=dropouts, insecure_seed=insecure_seed)
    if view.total is None:
        raise ValueError(f"protocol must give the server the sum, got {view.protocol} without")
    total = int(view.total[0])
    mean = divided(decode(protocol.quantizer, view.total[1:], like), total, like)
    return WeightedMean(mean, total, view)
