"""What every label rule needs: the gradient of the last layer, the size of the batch, and labels from counts."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from gia_jax.base import Observation, Updates
from gia_jax.threat import granted


class Dense(NamedTuple):
    """The last layer, or its gradient: logits = h @ kernel + bias."""

    kernel: Float[Array, "d c"]
    bias: Float[Array, " c"] | None


ClassifierFn = Callable[[Updates], Dense]


def dense(*path: str | int) -> ClassifierFn:
    """Names the last layer by its path in the parameters; it is never guessed.

    Args:
        *path: Keys from the root to the layer, such as "head" or "linear", 2. The layer holds "kernel" and
            "bias" (flax) or "w" and "b" (haiku); for anything else write the function yourself.

    Returns:
        `(params or update) -> Dense`; when called it raises ValueError where the path leads nowhere.
    """

    def classifier_fn(tree: PyTree[Array]) -> Dense:
        layer = tree
        for key in path:
            try:
                layer = layer[key]
            except (KeyError, IndexError, TypeError):
                raise ValueError(f"the classifier's path {path} does not exist: {key!r} not found") from None
        for kernel, bias in (("kernel", "bias"), ("w", "b")):
            if kernel in layer:
                return Dense(layer[kernel], layer.get(bias))
        raise ValueError(f"the classifier at {path} must hold 'kernel' or 'w', got {sorted(layer)}")

    return classifier_fn


def bias_gradient(rule: str, classifier_fn: ClassifierFn, observation: Observation) -> Float[Array, " c"]:
    """The gradient of the last bias; ValueError where the layer has none."""
    bias = classifier_fn(observation.update).bias
    if bias is None:
        raise ValueError(f"{rule} needs a bias in the last layer, got none")
    return bias


def batch_size(observation: Observation) -> int:
    """The number of labels to find, where it is granted; ValueError where granted labels are probabilities."""
    labels = observation.extra.get("labels")
    if labels is not None and labels.ndim > 1:
        raise ValueError(f"label rules find one class an example, got probabilities of shape {labels.shape}")
    return granted(observation, "inputs_like").shape[0]


def labels_from_counts(counts: Float[Array, " c"], size: int) -> Int[Array, " b"]:
    """The `size` labels whose integer counts n, n >= 0, sum n = size, are nearest to `counts` in least squares.

    One label after the other goes to the class with the largest remainder counts - n; the marginal costs grow with n,
    so this greedy choice is the optimum.
    """

    def emit(remaining: Float[Array, " c"], _: None) -> tuple[Float[Array, " c"], Int[Array, ""]]:
        label = jnp.argmax(remaining)
        return remaining.at[label].add(-1), label

    return jax.lax.scan(emit, counts, None, length=size)[1]


def greedy_labels(values: Float[Array, " c"], impact: Float[Array, ""], offset: Array, size: int) -> Int[Array, " b"]:
    """Every class of negative value once, most negative first; then, of what is left, always the most negative.

    Args:
        values: Gradient sums by class.
        impact: What one example of a class adds to the class's value, < 0; it is taken off for each label given.
        offset: Taken off all values before the second stage.
        size: Labels to give.

    Returns:
        The labels.
    """

    def emit(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        values, first = carry
        once = jnp.any(first)
        label = jnp.argmin(jnp.where(once, jnp.where(first, values, jnp.inf), values - offset))
        return (values.at[label].add(-impact), first.at[label].set(False)), label

    return jax.lax.scan(emit, (values, values < 0), None, length=size)[1]
