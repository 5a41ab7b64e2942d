"""How many labels were recovered."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gia_jax import _check


def label_overlap(recovered: Array | np.ndarray, truth: Array | np.ndarray) -> Float[Array, ""]:
    """The share of the batch's labels, as a multiset, that were recovered: sum over classes of min(n, n*) / b.

    Args:
        recovered: Class indices (b,) or probabilities (b, c), of which the largest counts; a row with a NaN, like a
            negative index, is no class and recovers nothing.
        truth: Class indices or probabilities of the b true labels.

    Returns:
        A number in [0, 1]; the order of the labels plays no part. NaN where a traced `truth` holds something that is no
        label.

    Raises:
        ValueError: The two have different lengths or none, are neither integers of shape (b,) nor probabilities of
            shape (b, c), or a concrete `truth` holds a negative index or a NaN.
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
    """Class indices, and whether each is one; -1 for a row with a NaN."""
    if labels.ndim == 2:
        labels = jnp.where(jnp.isnan(labels).any(1), -1, jnp.argmax(labels, -1))
    return jnp.asarray(labels), jnp.asarray(labels) >= 0
