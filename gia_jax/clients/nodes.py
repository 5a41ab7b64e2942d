"""The loss of clients whose labels belong to the nodes of graphs."""

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from gia_jax import _check
from gia_jax.base import Batch, LossFn, Params
from gia_jax.models.functional import ApplyFn
from gia_jax.precision import widened


def node_cross_entropy(apply_fn: ApplyFn) -> LossFn:
    """Builds the mean softmax cross-entropy over the labelled nodes of a batch of graphs.

    Nodes without a label, and padding, have the label -1 and play no part. With one label for each graph the loss is
    that of one target node, as a client with sampled neighbourhoods computes it.

    Args:
        apply_fn: Function `(params, inputs) -> logits` of shape (b, n, c), such as that of a graph network with the
            readout "none".

    Returns:
        A function `(params, batch) -> loss`, the mean in nats in float32 or wider, for integer labels of shape (b, n).
        It raises ValueError for labels of another shape or type, or concrete ones that are below -1, no class, or all
        -1. Traced ones of this kind make the loss NaN.

    Examples:
        Logits of zeros predict both classes with probability 0.5, a loss of log 2 for each of the two labelled nodes:

        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, clients
        >>> loss_fn = clients.node_cross_entropy(lambda params, inputs: inputs["nodes"] @ params)
        >>> batch = Batch({"nodes": jnp.ones((1, 3, 4))}, jnp.array([[1, 0, -1]]))
        >>> print(f"{loss_fn(jnp.zeros((4, 2)), batch):.2f}")
        0.69
    """

    def loss_fn(params: Params, batch: Batch) -> Float[Array, ""]:
        logits, labels = widened(apply_fn(params, batch.inputs)), batch.labels
        if logits.ndim != 3:
            raise ValueError(f"apply_fn must return logits of shape (b, n, c), got {logits.shape}")
        if jnp.shape(labels) != logits.shape[:2] or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"batch.labels must be integers of shape {logits.shape[:2]}, got {labels.dtype} of shape {labels.shape}"
            )
        num_classes = logits.shape[-1]
        if _check.is_concrete(labels):
            classes = np.asarray(labels)  # NumPy also where a trace goes on around concrete labels
            low, high = int(classes.min()), int(classes.max())
            if low < -1 or not 0 <= high < num_classes:
                raise ValueError(
                    f"batch.labels must be classes below {num_classes}, -1 for nodes without one, and not -1 "
                    f"everywhere, got labels from {low} to {high}"
                )
        valid = jnp.all((labels >= -1) & (labels < num_classes)) & jnp.any(labels >= 0)
        known = labels >= 0
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.where(known, labels, 0))
        return jnp.sum(losses * known) / jnp.sum(known) * jnp.where(valid, 1.0, jnp.nan)

    return loss_fn
