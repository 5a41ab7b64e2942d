"""The client of federated SGD, which takes one gradient step, and the losses that clients train with."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

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
    """Builds the mean softmax cross-entropy of a classifier.

    Args:
        apply_fn: Function `(params, inputs) -> logits` of shape (b, c), or (b, *t, c) where an example has several
            labels, such as one for each token or pixel.

    Returns:
        A function `(params, batch) -> loss`, the mean in nats, for class indices (b, *t) or class probabilities (b, *t,
        c), in float32 or wider. It raises ValueError for labels of another shape or type, or concrete ones that are no
        classes or no probabilities. Traced ones make the loss NaN.

    Examples:
        Logits of zeros predict both classes with probability 0.5, a loss of log 2:

        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, clients
        >>> loss_fn = clients.cross_entropy(lambda params, inputs: inputs @ params)
        >>> print(f"{loss_fn(jnp.zeros((3, 2)), Batch(jnp.ones((4, 3)), jnp.array([0, 1, 1, 0]))):.2f}")
        0.69
    """

    def loss_fn(params: Any, batch: Batch) -> Float[Array, ""]:
        _check.one_array("batch.labels", batch.labels)
        return classification_loss(apply_fn(params, batch.inputs), batch.labels)

    return loss_fn


def classification_loss(logits: Shaped[Array, "b *t c"], labels: Shaped[Array, "..."]) -> Float[Array, ""]:
    """Computes the mean softmax cross-entropy in nats, in float32 or wider.

    Args:
        logits: Logits of shape (b, *t, c).
        labels: Class indices of shape (b, *t), or class probabilities of shape (b, *t, c).

    Returns:
        The mean loss. It is NaN where traced labels are no classes or no probabilities.

    Raises:
        ValueError: If labels have another shape or type, or concrete ones are no classes or no probabilities.
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
    """Returns the loss, or NaN where a label is no class: multiplied by NaN, so that its gradient is NaN as well."""
    return loss * jnp.where(jnp.all((labels >= 0) & (labels < num_classes)), 1.0, jnp.nan)


def binary_cross_entropy(apply_fn: ApplyFn) -> LossFn:
    """Builds the mean logistic loss log(1 + e^(-y z)) of a classifier with one output z, in float32 or wider.

    Args:
        apply_fn: Function `(params, inputs) -> z` of shape (b, 1).

    Returns:
        A function `(params, batch) -> loss`, the mean in nats, for the integer labels 0 (y = -1) and 1 (y = 1), shape
        (b,). It raises ValueError for outputs or labels of another shape, and for other labels where they are concrete.
        Where these are traced the loss is NaN.

    Examples:
        An output of 0 predicts both classes with probability 0.5, a loss of log 2:

        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, clients
        >>> loss_fn = clients.binary_cross_entropy(lambda params, inputs: inputs @ params)
        >>> print(f"{loss_fn(jnp.zeros((3, 1)), Batch(jnp.ones((2, 3)), jnp.array([0, 1]))):.2f}")
        0.69
    """

    def loss_fn(params: Params, batch: Batch) -> Float[Array, ""]:
        _check.one_array("batch.labels", batch.labels)
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
    """Builds the mean squared error of a regression, in float32 or wider.

    Args:
        apply_fn: Function `(params, inputs) -> outputs` of shape (b, *t).

    Returns:
        A function `(params, batch) -> loss`, the mean over all entries of (outputs - labels)^2, for real labels of the
        outputs' shape. It raises ValueError for any other labels.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, clients
        >>> loss_fn = clients.squared_error(lambda params, inputs: inputs @ params)
        >>> float(loss_fn(jnp.ones(2), Batch(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([1.0, 0.0]))))
        2.5
    """

    def loss_fn(params: Params, batch: Batch) -> Float[Array, ""]:
        _check.one_array("batch.labels", batch.labels)
        outputs, labels = widened(apply_fn(params, batch.inputs)), batch.labels
        if jnp.shape(labels) != outputs.shape:
            raise ValueError(f"batch.labels must have the outputs' shape {outputs.shape}, got {jnp.shape(labels)}")
        if not (jnp.issubdtype(labels.dtype, jnp.floating) or jnp.issubdtype(labels.dtype, jnp.integer)):
            raise ValueError(f"batch.labels must be real numbers, got {labels.dtype}")
        return jnp.mean(jnp.square(outputs - labels))

    return loss_fn


def federated_sgd(loss_fn: LossFn, *, lowering: Lowering = "auto") -> ClientFn:
    """Builds a client that shares the gradient of its loss on one batch.

    Args:
        loss_fn: Function `(params, batch) -> loss`, a scalar, such as `cross_entropy(apply_fn)`. It may close over
            traced values.
        lowering: How convolutions are computed: "matmul" as matrix products, "native" as they are, "auto" chooses the
            first on CPU and the second elsewhere.

    Returns:
        The client, a function `(params, batch) -> gradient`, a tree like `params`. Reverse mode through it costs one
        forward-over-reverse product. `jvp`, `linearize` and `jacfwd` work as well.

    Raises:
        ValueError: If `lowering` is unknown. The client raises it if `loss_fn` does not return a scalar or refuses the
            batch, or if `params` has an integer leaf.

    Examples:
        For logits of zeros the gradient of the bias is the mean of (0.5, 0.5) minus the one-hot labels:

        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, clients
        >>> apply_fn = lambda params, inputs: inputs @ params["kernel"] + params["bias"]
        >>> client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        >>> params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
        >>> update = client_fn(params, Batch(jnp.ones((4, 3)), jnp.array([0, 0, 0, 1])))
        >>> update["bias"].tolist()
        [-0.25, 0.25]
    """
    gradient_fn = parameter_gradient(loss_fn, lowering=lowering)

    def client_fn(params: Params, batch: Batch) -> Updates:
        return gradient_fn(params, batch)

    return client_fn


class Draws(NamedTuple):
    """A loss that is called several times, and may draw anew each time.

    Attributes:
        loss_fn: Function `(params, batch) -> loss`, a scalar. With `key` it is a function `(key) -> loss_fn` that
            returns such a loss.
        key: Key that the key of every call is split off. None for a loss that draws nothing.
    """

    loss_fn: LossFn | Callable[[PRNGKeyArray], LossFn]
    key: PRNGKeyArray | None

    def keys(self, count: int) -> Key[Array, " n"] | None:
        """Returns a key for each of `count` calls, or None for a loss that draws nothing."""
        return None if self.key is None else jax.random.split(self.key, count)

    def of(self, own: PRNGKeyArray | None) -> LossFn:
        """Returns the loss of the call that has the key `own`, which is None for a loss that draws nothing."""
        return cast(LossFn, self.loss_fn if own is None else cast(Callable[[PRNGKeyArray], LossFn], self.loss_fn)(own))

    def check(self, params: Params, batch: Batch) -> None:
        """Lets the loss refuse concrete data, before the calls are mapped or scanned and the data traced."""
        check_data(self.of(self.key), params, batch)

    def check_apart(self, client: str, params: Params, batch: Batch) -> None:
        """Lets the model refuse, in the name of `client`, that its examples are taken apart. Nothing is computed.

        The loss is called outside of the cache of `jax.jit`, in which a refusal would be skipped.

        Args:
            client: Name of the client, for the error message.
            params: Parameters of the model.
            batch: Batch of the client, with at least one example.

        Raises:
            ValueError: If the model normalises by the statistics of its own batch, or draws although there is no key.
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
    """Builds a client that keeps the gradients of its examples apart.

    Args:
        loss_fn: Function `(params, batch) -> loss`, a scalar. It is called with batches of one example. With `loss_key`
            it is a function `(key) -> loss_fn` that returns such a loss.
        loss_key: Key of a loss that draws, such as one of `models.stochastic`: every example gets a key of its own,
            split off this one. With None the loss draws nothing.
        lowering: How convolutions are computed: "matmul" as matrix products, "native" as they are, "auto" chooses the
            first on CPU and the second elsewhere.

    Returns:
        The client, a function `(params, batch) -> gradients`, in which every leaf has a leading axis of the batch's
        size. For a loss that is a mean over examples, their mean is what `federated_sgd` shares.

    Raises:
        ValueError: If `lowering` is unknown. The client raises it for an empty batch, for a model with batch
            normalisation in training mode, which mixes the examples, and for one of `models.stochastic` without
            `loss_key`, because all examples would share one draw.

    Examples:
        The gradient of w . x with respect to w is x, for each example:

        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, clients
        >>> client_fn = clients.per_example(lambda params, batch: jnp.mean(batch.inputs @ params))
        >>> client_fn(jnp.zeros(2), Batch(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([0, 1]))).tolist()
        [[1.0, 2.0], [3.0, 4.0]]
    """
    lowers_to_matmul(lowering)  # refuses an unknown one here
    loss = Draws(loss_fn, loss_key)

    def client_fn(params: Params, batch: Batch) -> Updates:
        size = _check.examples(batch.inputs)
        loss.check_apart("per_example", params, batch)
        loss.check(params, batch)

        def one(example: Batch, own: PRNGKeyArray | None) -> Updates:
            return parameter_gradient(loss.of(own), lowering=lowering)(params, example)

        singles = jax.tree.map(lambda leaf: leaf[:, None], batch)
        return jax.vmap(one)(singles, loss.keys(size))

    return client_fn
