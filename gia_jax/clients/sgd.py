"""The client of federated SGD, which takes one gradient step, and the losses that clients train with."""

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PRNGKeyArray, Shaped

from gia_jax import _check
from gia_jax.base import Batch, ClientFn, LossFn, Params, Updates
from gia_jax.clients.gradient import check_data, parameter_gradient
from gia_jax.lowering import Lowering, lowers_to_matmul
from gia_jax.models.functional import ApplyFn, examples_apart
from gia_jax.precision import widened


def cross_entropy(apply_fn: ApplyFn) -> LossFn:
    """The mean softmax cross-entropy of a classifier.

    Args:
        apply_fn: `(params, inputs) -> logits` of shape (b, c), or (b, *t, c) where an example has several labels, such
            as one for each token or pixel.

    Returns:
        `(params, batch) -> ` mean loss in nats, for class indices (b, *t) or class probabilities (b, *t, c); see
        `classification_loss`.
    """
    return lambda params, batch: classification_loss(apply_fn(params, batch.inputs), batch.labels)


def classification_loss(logits: Shaped[Array, "b *t c"], labels: Shaped[Array, "..."]) -> Float[Array, ""]:
    """The mean softmax cross-entropy in nats, for class indices (b, *t) or class probabilities (b, *t, c).

    It is computed in float32 or wider. It is NaN where traced class indices are out of range.

    Raises:
        ValueError: Labels of another shape or type, or concrete ones that are no classes or no probabilities.
    """
    num_classes = logits.shape[-1]
    _check.classes(labels, logits.shape[:-1], num_classes)
    logits = widened(logits)
    if labels.ndim == logits.ndim:
        rows = widened(labels)
        valid = jnp.all(rows >= 0) & jnp.all(jnp.sum(rows, -1) <= 1.02)  # the rounding of bfloat16
        return jnp.mean(optax.losses.softmax_cross_entropy(logits, rows)) * jnp.where(valid, 1.0, jnp.nan)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return _nan_unless_classes(jnp.mean(losses), labels, num_classes)


def _nan_unless_classes(loss: Float[Array, ""], labels: Array, num_classes: int) -> Float[Array, ""]:
    """The loss; NaN where a label is no class. It is multiplied by NaN, so that its gradient is NaN as well."""
    return loss * jnp.where(jnp.all((labels >= 0) & (labels < num_classes)), 1.0, jnp.nan)


def binary_cross_entropy(apply_fn: ApplyFn) -> LossFn:
    """The mean logistic loss log(1 + e^(-y z)) of a classifier with one output z, in float32 or wider.

    Args:
        apply_fn: `(params, inputs) -> z` of shape (b, 1).

    Returns:
        `(params, batch) -> ` mean loss in nats, for the integer labels 0 (y = -1) and 1 (y = 1), shape (b,). Others
        are refused with a ValueError where they are concrete, and make the loss NaN where they are traced.
    """

    def loss_fn(params: Params, batch: Batch) -> Float[Array, ""]:
        logits, labels = apply_fn(params, batch.inputs), batch.labels
        if logits.shape[1:] != (1,):
            raise ValueError(f"apply_fn must return outputs of shape (b, 1), got {logits.shape}")
        if jnp.shape(labels) != logits.shape[:1]:
            raise ValueError(f"batch.labels must have shape {logits.shape[:1]}, got {jnp.shape(labels)}")
        _check.classes(labels, logits.shape[:1], 2)
        loss = jnp.mean(optax.losses.sigmoid_binary_cross_entropy(widened(logits)[:, 0], labels))
        return _nan_unless_classes(loss, labels, 2)

    return loss_fn


def squared_error(apply_fn: ApplyFn) -> LossFn:
    """The mean squared error of a regression, in float32 or wider.

    Args:
        apply_fn: `(params, inputs) -> outputs` of shape (b, *t).

    Returns:
        `(params, batch) -> ` mean over all entries of (outputs - labels)^2, for real labels of the outputs' shape; any
        other is refused with a ValueError.
    """

    def loss_fn(params: Params, batch: Batch) -> Float[Array, ""]:
        outputs, labels = widened(apply_fn(params, batch.inputs)), batch.labels
        if jnp.shape(labels) != outputs.shape:
            raise ValueError(f"batch.labels must have the outputs' shape {outputs.shape}, got {jnp.shape(labels)}")
        if not (jnp.issubdtype(labels.dtype, jnp.floating) or jnp.issubdtype(labels.dtype, jnp.integer)):
            raise ValueError(f"batch.labels must be real numbers, got {labels.dtype}")
        return jnp.mean(jnp.square(outputs - labels))

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


class Draws(NamedTuple):
    """A loss that is called several times, and may draw anew each time.

    Attributes:
        loss_fn: `(params, batch) -> ` scalar; with `key`, `(key) -> ` such a loss.
        key: The key that every call's own is split off; None for a loss that draws nothing.
    """

    loss_fn: LossFn | Callable[[PRNGKeyArray], LossFn]
    key: PRNGKeyArray | None

    def keys(self, count: int) -> Key[Array, " n"] | None:
        """A key for each of `count` calls."""
        return None if self.key is None else jax.random.split(self.key, count)

    def of(self, own: PRNGKeyArray | None) -> LossFn:
        """The loss of the call that has this key."""
        return cast(LossFn, self.loss_fn if own is None else cast(Callable[[PRNGKeyArray], LossFn], self.loss_fn)(own))

    def check(self, params: Params, batch: Batch) -> None:
        """Lets the loss refuse concrete data, before the calls are mapped or scanned and the data traced."""
        check_data(self.of(self.key), params, batch)

    def check_apart(self, client: str, params: Params, batch: Batch) -> None:
        """Lets the model refuse, in the name of `client`, that its examples are taken apart; nothing is computed.

        The loss is called outside of the cache of `jax.jit`, in which a refusal would be skipped.
        """
        loss_fn = self.of(self.key)
        loss_fn = getattr(loss_fn, "__wrapped__", loss_fn) if hasattr(loss_fn, "lower") else loss_fn
        with examples_apart(client, draws_anew=self.key is not None):
            # A new function every time, because `eval_shape` has a cache as well.
            jax.eval_shape(lambda *data: loss_fn(*data), params, jax.tree.map(lambda leaf: leaf[:1], batch))


def per_example(
    loss_fn: LossFn | Callable[[PRNGKeyArray], LossFn],
    *,
    loss_key: PRNGKeyArray | None = None,
    lowering: Lowering = "auto",
) -> ClientFn:
    """A client that keeps the gradients of its examples apart.

    Args:
        loss_fn: `(params, batch) -> ` scalar; it sees batches of one example. With `loss_key`, `(key) -> ` such a loss.
        loss_key: The key of a loss that draws, such as one of `models.stochastic`: every example has a key of its own,
            split off this one. None: the loss draws nothing.
        lowering: How convolutions are computed, as for `federated_sgd`.

    Returns:
        `(params, batch) -> gradients`, every leaf with a leading axis of the batch's size. For a loss that is a mean
        over examples, their mean is what `federated_sgd` shares.

    Raises:
        ValueError: When called, for an empty batch, for a model with batch normalisation in training mode, which mixes
            the examples, or for one of `models.stochastic` without `loss_key`: all examples would share one draw.
    """
    lowers_to_matmul(lowering)  # refuses an unknown one here
    loss = Draws(loss_fn, loss_key)

    def client_fn(params: Params, batch: Batch) -> Updates:
        _check.examples(batch.inputs)
        loss.check_apart("per_example", params, batch)
        loss.check(params, batch)

        def one(example: Batch, own: PRNGKeyArray | None) -> Updates:
            return parameter_gradient(loss.of(own), lowering=lowering)(params, example)

        singles = jax.tree.map(lambda leaf: leaf[:, None], batch)
        return jax.vmap(one)(singles, loss.keys(batch.inputs.shape[0]))

    return client_fn
