"""How many labels were recovered."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def label_overlap(recovered: Array, truth: Array) -> Float[Array, ""]:
    """The share of the batch's labels, as a multiset, that were recovered: sum over classes of min(n, n*) / b.

    Args:
        recovered: Class indices (b,) or probabilities (b, c), of which the largest counts.
        truth: Likewise.

    Returns:
        A number in [0, 1]; the order of the labels plays no part.

    Raises:
        ValueError: The two have different lengths.
    """
    recovered, truth = (jnp.argmax(x, -1) if x.ndim == 2 else x for x in (recovered, truth))
    if recovered.shape != truth.shape:
        raise ValueError(f"recovered must have {truth.shape[0]} labels, got {recovered.shape[0]}")
    pairs = jnp.sum(truth[:, None] == truth[None], 1)
    found = jnp.sum(truth[:, None] == recovered[None], 1)
    # Every member of a class of n* labels contributes min(n, n*) / n*.
    return jnp.mean(jnp.minimum(found, pairs) / pairs)
