"""What every label rule needs: the gradient of the last layer, the size of the batch, and labels from counts.

Rules compute in float32 or wider. Where what they read is not finite, the labels are -1, which is no class.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import Observation, Updates
from gia_jax.matching.initializations import as_granted, granted_like
from gia_jax.precision import wide_dtype, widened, widened_tree
from gia_jax.threat import granted

MARGIN = 1e-2  # how far below -1 the negative entries of a mean loss's bias gradient may add up to, by rounding


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


def last_gradient(classifier_fn: ClassifierFn, update: Updates) -> Dense:
    """The gradient of the last layer, widened."""
    return widened_tree(classifier_fn(update))


def bias_gradient(rule: str, classifier_fn: ClassifierFn, observation: Observation) -> Float[Array, " c"]:
    """The gradient of the last bias, widened; raises ValueError where the layer has none."""
    bias = last_gradient(classifier_fn, observation.update).bias
    if bias is None:
        raise ValueError(f"{rule} needs a bias in the last layer, got none")
    return bias


def of_mean_loss(
    rule: str, classifier_fn: ClassifierFn, observation: Observation, values: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """The values that a rule reads, if the bias gradient can be that of a mean loss: the rule depends on its scale.

    A cross-entropy's entries add up to 0, and a mean's negative ones to no less than -1. What adds up to 0 and goes
    further below is the gradient of a sum; what does not add up to 0, such as noise, says nothing of the scale. The sum
    over a batch in which all classes are about as frequent as predicted stays above -1, and is not noticed.

    Returns:
        The values. Inside of a trace, where the gradient is known too late to raise, they are NaN if it is another.

    Raises:
        ValueError: For a concrete gradient of a loss that is not a mean.
    """
    bias = classifier_fn(observation.update).bias
    if bias is None:
        return values
    rounding = 4 * float(jnp.finfo(bias.dtype).eps)
    wide = widened(bias)
    negative = jnp.sum(jnp.minimum(wide, 0))
    balanced = jnp.abs(jnp.sum(wide)) <= max(1e-4, rounding) * jnp.sum(jnp.abs(wide))
    scaled = balanced & (negative < -1 - max(MARGIN, rounding))
    if _check.is_concrete(scaled) and bool(scaled):
        raise ValueError(
            f"{rule} needs the gradient of a mean loss: the negative entries of the last bias add up to "
            f"{float(negative):.7g}, below -1; divide the update by the batch size"
        )
    return jnp.where(scaled, jnp.nan, values)


def batch_size(observation: Observation) -> int:
    """The number of labels to find, where it is granted; raises ValueError for granted labels that are no classes."""
    labels = observation.extra.get("labels", jnp.zeros(0, jnp.int32))
    leaves = jax.tree.leaves(labels)
    if len(leaves) != 1 or leaves[0] is not labels:
        raise ValueError(f"label rules find one class an example, got labels in a {type(labels).__name__}")
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"label rules find one class an example, got labels {labels.dtype} of shape {labels.shape}")
    return granted(observation, "inputs_like").shape[0]


def dummy_inputs(key: PRNGKeyArray, observation: Observation, count: int) -> Float[Array, "n *d"]:
    """`count` standard normal inputs of the granted shape and type, drawn in float32 or wider."""
    like = granted_like(observation)
    return as_granted(jax.random.normal(key, (count, *like.shape[1:]), wide_dtype(like.dtype)), observation)


def check_dummies(observation: Observation, num_dummies: int) -> None:
    """Raises ValueError for more dummy inputs than fit into memory."""
    _check.fits(num_dummies * math.prod(granted_like(observation).shape[1:]), num_dummies=num_dummies)


def attackers_key(key: PRNGKeyArray | None, observation: Observation) -> PRNGKeyArray:
    """The key of a rule that draws; None derives one from the bits of the observed update.

    A fixed key would draw the client's own data wherever these were drawn from that key too.
    """
    if key is not None:
        return key

    def summed(leaf: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * min(leaf.dtype.itemsize, 4)}")
        return _hash(bits.ravel().astype(jnp.uint32))

    leaves = [leaf for leaf in jax.tree.leaves(observation.update) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    total = _hash(jnp.stack([summed(leaf) for leaf in leaves]))
    return jax.random.fold_in(jax.random.key(int.from_bytes(b"dumm")), total)


def _hash(words: Array) -> Array:
    """The sum of the words modulo 2^32, each times an odd number that belongs to its place."""
    odd = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
    return jnp.sum(words * (odd * jnp.uint32(2_654_435_761)), dtype=jnp.uint32)


def or_none(labels: Int[Array, " b"], *known: Array) -> Int[Array, " b"]:
    """The labels; -1 where something that they were read from is not finite."""
    finite: Bool[Array, ""] = jnp.all(jnp.stack([jnp.all(jnp.isfinite(values)) for values in known]))
    return jnp.where(finite, labels, -1)


def labels_from_counts(counts: Float[Array, " c"], size: int) -> Int[Array, " b"]:
    """The `size` labels whose integer counts n, n >= 0, sum n = size, are nearest to `counts` in least squares.

    One label after the other goes to the class with the largest remainder counts - n; the marginal costs grow with n,
    so this greedy choice is the optimum.
    """

    def emit(remaining: Float[Array, " c"], _: None) -> tuple[Float[Array, " c"], Int[Array, ""]]:
        label = jnp.argmax(remaining)
        return remaining.at[label].add(-1), label

    return or_none(jax.lax.scan(emit, widened(counts), None, length=size)[1], counts)


def greedy_labels(values: Float[Array, " c"], impact: Float[Array, ""], offset: Array, size: int) -> Int[Array, " b"]:
    """Every class of negative value once, most negative first; then, of what is left, always the most negative.

    Args:
        values: The sums of gradients, one a class.
        impact: What one example of a class adds to the class's value, < 0; it is taken off for each label given.
        offset: What is taken off all values before the second stage.
        size: The number of labels to give.

    Returns:
        The labels.
    """

    def emit(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        values, first = carry
        once = jnp.any(first)
        label = jnp.argmin(jnp.where(once, jnp.where(first, values, jnp.inf), values - offset))
        return (values.at[label].add(-impact), first.at[label].set(False)), label

    found = jax.lax.scan(emit, (values, values < 0), None, length=size)[1]
    return or_none(found, values, impact, offset)
