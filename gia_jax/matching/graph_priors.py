"""Priors of graphs, functions `(batch, observation) -> penalty` of inputs with "nodes", "adjacency" and "mask".

Every prior is a sum divided by the number of a graph's nodes, and a mean over the graphs of the batch, in float32 or
wider. Padding adds nothing.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from gia_jax import _check
from gia_jax.base import Batch, Observation
from gia_jax.precision import widened


def smoothness(batch: Batch, observation: Observation) -> Float[Array, ""]:
    """Computes tr(X^T L X) / n = sum over i < j of A_ij |x_i - x_j|^2 / n, which is low if neighbours are alike.

    Args:
        batch: Dummy batch of graphs.
        observation: Observation of the attack, which is not used.

    Returns:
        The penalty, at least 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, Observation
        >>> from gia_jax.matching import graph_priors
        >>> edge = jnp.array([[[0.0, 0.5], [0.5, 0.0]]])
        >>> inputs = {"nodes": jnp.array([[[1.0], [3.0]]]), "adjacency": edge, "mask": jnp.ones((1, 2))}
        >>> float(graph_priors.smoothness(Batch(inputs, jnp.array([0])), Observation({}, {})))
        1.0
    """
    del observation
    nodes, adjacency, mask = _masked(batch)
    degrees = jnp.sum(adjacency, -1)
    # sum_i d_i |x_i|^2 - sum_ij A_ij x_i . x_j, for a symmetric A
    own = jnp.sum(degrees * jnp.sum(jnp.square(nodes), -1), -1)
    return _mean_by_size(own - jnp.sum(nodes * (adjacency @ nodes), (-2, -1)), mask)


def sparsity(batch: Batch, observation: Observation) -> Float[Array, ""]:
    """Computes sum over i < j of |A_ij| / n, half the mean degree.

    Args:
        batch: Dummy batch of graphs.
        observation: Observation of the attack, which is not used.

    Returns:
        The penalty, at least 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, Observation
        >>> from gia_jax.matching import graph_priors
        >>> edge = jnp.array([[[0.0, 1.0], [1.0, 0.0]]])
        >>> inputs = {"nodes": jnp.ones((1, 2, 1)), "adjacency": edge, "mask": jnp.ones((1, 2))}
        >>> float(graph_priors.sparsity(Batch(inputs, jnp.array([0])), Observation({}, {})))
        0.5
    """
    del observation
    _, adjacency, mask = _masked(batch)
    return _mean_by_size(jnp.sum(jnp.abs(adjacency), (-2, -1)) / 2, mask)


def binarity(batch: Batch, observation: Observation) -> Float[Array, ""]:
    """Computes sum over i < j of A_ij (1 - A_ij) / n, which is 0 if every edge is there or not.

    Args:
        batch: Dummy batch of graphs, with edges in [0, 1].
        observation: Observation of the attack, which is not used.

    Returns:
        The penalty, at least 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, Observation
        >>> from gia_jax.matching import graph_priors
        >>> edge = jnp.array([[[0.0, 0.5], [0.5, 0.0]]])
        >>> inputs = {"nodes": jnp.ones((1, 2, 1)), "adjacency": edge, "mask": jnp.ones((1, 2))}
        >>> float(graph_priors.binarity(Batch(inputs, jnp.array([0])), Observation({}, {})))
        0.125
    """
    del observation
    _, adjacency, mask = _masked(batch)
    return _mean_by_size(jnp.sum(adjacency * (1 - adjacency), (-2, -1)) / 2, mask)


def _masked(batch: Batch) -> tuple[Float[Array, "b n f"], Float[Array, "b n n"], Float[Array, "b n"]]:
    """Returns the arrays of a batch of graphs, with zeros as padding."""
    _check.graphs("batch.inputs", batch.inputs)
    nodes, adjacency, mask = (widened(batch.inputs[name]) for name in _check.GRAPH_PARTS)
    return nodes * mask[..., None], adjacency * mask[..., :, None] * mask[..., None, :], mask


def _mean_by_size(sums: Float[Array, " b"], mask: Float[Array, "b n"]) -> Float[Array, ""]:
    """Divides each graph's sum by its number of nodes, and takes the mean over the graphs."""
    return jnp.mean(sums / jnp.maximum(jnp.sum(mask, -1), 1))
