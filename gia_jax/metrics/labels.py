"""Measures how many labels were recovered."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gia_jax import _check


def label_overlap(recovered: Array | np.ndarray, truth: Array | np.ndarray) -> Float[Array, ""]:
    """Computes the share of the batch's labels, as a multiset, that were recovered: sum over classes of min(n, n*) / b.

    Here n is how often a class was recovered, and n* how often it is in the truth. The order of the labels plays no
    part.

    Args:
        recovered: Recovered class indices (b,) or probabilities (b, c), of which the largest counts. A row with a NaN,
            like a negative index, is no class and recovers nothing.
        truth: Class indices (b,) or probabilities (b, c) of the b true labels.

    Returns:
        The share, in [0, 1]. It is NaN where a traced `truth` holds something that is no label.

    Raises:
        ValueError: If the two have different lengths or none, are neither integers of shape (b,) nor probabilities of
            shape (b, c), have different numbers of classes, or if a concrete `truth` holds a negative index or a NaN.

    Examples:
        One 0 and one 1 were recovered, and the second 0 was not:

        >>> import jax.numpy as jnp
        >>> from gia_jax import metrics
        >>> print(f"{metrics.label_overlap(jnp.array([1, 1, 0]), jnp.array([0, 0, 1])):.2f}")
        0.67
    """
    for name, labels in (("recovered", recovered), ("truth", truth)):
        if jnp.ndim(labels) not in (1, 2) or 0 in labels.shape:
            raise ValueError(f"{name} must have shape (b,) or (b, c), nothing of it 0, got {jnp.shape(labels)}")
        kind = jnp.integer if labels.ndim == 1 else jnp.floating
        if not jnp.issubdtype(labels.dtype, kind):
            wanted = "class indices (b,) of integers or probabilities (b, c)"
            raise ValueError(f"{name} must be {wanted}, got {labels.dtype} of shape {labels.shape}")
    if recovered.shape[0] != truth.shape[0]:
        raise ValueError(f"recovered must have {truth.shape[0]} labels, got {recovered.shape[0]}")
    if recovered.ndim == truth.ndim == 2 and recovered.shape != truth.shape:
        raise ValueError(f"recovered must have {truth.shape[1]} classes, got {recovered.shape[1]}")
    if truth.ndim == 1:
        _check.not_negative(truth=truth)
    elif _check.is_concrete(truth) and np.isnan(np.asarray(truth)).any():
        raise ValueError("truth must be probabilities, got nan")
    (found, _), (expected, known) = _classes(recovered), _classes(truth)
    pairs = jnp.sum(expected[:, None] == expected[None], 1)
    times = jnp.sum(expected[:, None] == found[None], 1)
    # Every member of a class of n* labels contributes min(n, n*) / n*.
    return jnp.where(jnp.all(known), jnp.mean(jnp.minimum(times, pairs) / pairs), jnp.nan)


def _classes(labels: Array | np.ndarray) -> tuple[Int[Array, " b"], Bool[Array, " b"]]:
    """Returns class indices, and whether each is one; a row with a NaN becomes -1."""
    if labels.ndim == 2:
        labels = jnp.where(jnp.isnan(labels).any(1), -1, jnp.argmax(labels, -1))
    return jnp.asarray(labels), jnp.asarray(labels) >= 0


def are_classes(*every: Any) -> bool:
    """Tells whether labels of v victims are class indices (v, b) or probabilities (v, b, c), which can be compared.

    Args:
        every: Labels, of any kind.

    Returns:
        Whether all of them are.
    """
    kinds = ((jnp.integer, 2), (jnp.floating, 3))
    arrays = all(isinstance(one, (jax.Array, np.ndarray)) for one in every)
    return arrays and all(any(jnp.issubdtype(one.dtype, kind) and one.ndim == n for kind, n in kinds) for one in every)
