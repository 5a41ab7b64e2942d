"""One gradient step: the client of federated SGD."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gia_jax.base import Batch, ClientFn, LossFn, Params, Updates
from gia_jax.clients.gradient import parameter_gradient
from gia_jax.lowering import Lowering


def cross_entropy(apply_fn) -> LossFn:
    """The mean softmax cross-entropy of a classifier.

    Args:
        apply_fn: `(params, inputs) -> logits` of shape (b, c).

    Returns:
        `(params, batch) -> ` mean loss in nats, for class indices (b,) or class probabilities (b, c); see
        `classification_loss`.
    """

    return lambda params, batch: classification_loss(apply_fn(params, batch.inputs), batch.labels)


def classification_loss(
    logits: Float[Array, "b c"], labels: Int[Array, "b *c"] | Float[Array, "b c"]
) -> Float[Array, ""]:
    """The mean softmax cross-entropy in nats, for class indices (b,) or class probabilities (b, c).

    Raises:
        ValueError: Rows of integers, such as zeros and a one.
    """
    if jnp.issubdtype(labels.dtype, jnp.integer):
        if labels.ndim > 1:
            got = f"{labels.dtype} of shape {labels.shape}"
            raise ValueError(f"labels must be class indices (b,) or probabilities (b, c), got {got}")
        return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))
    return jnp.mean(optax.losses.softmax_cross_entropy(logits, labels))


def binary_cross_entropy(apply_fn) -> LossFn:
    """The mean logistic loss log(1 + e^(-y z)) of a classifier with one output z.

    Args:
        apply_fn: `(params, inputs) -> z` of shape (b, 1).

    Returns:
        `(params, batch) -> ` mean loss in nats, for labels 0 (y = -1) and 1 (y = 1), shape (b,).
    """

    def loss_fn(params: Params, batch: Batch) -> Float[Array, ""]:
        logits = apply_fn(params, batch.inputs)
        if logits.shape[1:] != (1,):
            raise ValueError(f"apply_fn must return outputs of shape (b, 1), got {logits.shape}")
        return jnp.mean(optax.losses.sigmoid_binary_cross_entropy(logits[:, 0], batch.labels))

    return loss_fn


def federated_sgd(loss_fn: LossFn, *, lowering: Lowering = "auto") -> ClientFn:
    """A client that shares the gradient of its loss on one batch.

    Args:
        loss_fn: `(params, batch) -> ` scalar, such as `cross_entropy(apply_fn)`. It may close over traced values.
        lowering: How convolutions are computed: "matmul", "native" or "auto" (see `parameter_gradient`).

    Returns:
        `(params, batch) -> gradient`, a tree like `params`. Reverse mode through it costs one forward-over-reverse
        product; `jvp`, `linearize` and `jacfwd` work as well.

    Raises:
        ValueError: If `loss_fn` does not return a scalar, `params` has an integer leaf, or `lowering` is unknown.
    """
    gradient_fn = parameter_gradient(loss_fn, lowering=lowering)

    def client_fn(params: Params, batch: Batch) -> Updates:
        return gradient_fn(params, batch)

    return client_fn


def per_example(loss_fn: LossFn, *, lowering: Lowering = "auto") -> ClientFn:
    """A client that keeps the gradients of its examples apart.

    Args:
        loss_fn: As for `federated_sgd`; it sees batches of one example.
        lowering: As for `federated_sgd`.

    Returns:
        `(params, batch) -> gradients`, every leaf with a leading axis of the batch's size. For a loss that is a mean
        over examples, their mean is what `federated_sgd` shares.
    """
    gradient_fn = parameter_gradient(loss_fn, lowering=lowering)

    def client_fn(params: Params, batch: Batch) -> Updates:
        singles = jax.tree.map(lambda leaf: leaf[:, None], batch)
        return jax.vmap(gradient_fn, in_axes=(None, 0))(params, singles)

    return client_fn
