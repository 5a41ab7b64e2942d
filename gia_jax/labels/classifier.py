"""What the label rules share: the gradient of the last layer, the size of the batch, and labels from counts.

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
    """The last layer of a classifier, or its gradient: logits = h @ kernel + bias.

    Attributes:
        kernel: Weights, or their gradient, shape (d, c) for d features and c classes.
        bias: Bias, or its gradient, shape (c,). None for a layer without a bias.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import labels
        >>> layer = labels.Dense(kernel=jnp.eye(2), bias=jnp.array([0.0, 1.0]))
        >>> (jnp.array([3.0, 4.0]) @ layer.kernel + layer.bias).tolist()
        [3.0, 5.0]
    """

    kernel: Float[Array, "d c"]
    bias: Float[Array, " c"] | None


ClassifierFn = Callable[[Updates], Dense]


def dense(*path: str | int) -> ClassifierFn:
    """Names the last layer by its path in the parameters. The layer is never guessed.

    Args:
        *path: Keys from the root of the parameters to the layer, such as "head" or "linear", 2. The layer holds
            "kernel" and "bias" (flax) or "w" and "b" (haiku) of shape (in, out), or "weight" and "bias" (PyTorch,
            equinox) of shape (out, in), which is transposed; the bias only if it has one. For anything else write the
            function yourself.

    Returns:
        A function that maps parameters, or an update, to the `Dense` layer in them. It raises ValueError where the path
        leads nowhere or the layer holds no kernel.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import labels
        >>> params = {"body": {}, "head": {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}}
        >>> layer = labels.dense("head")(params)
        >>> layer.kernel.shape, layer.bias.shape
        ((4, 3), (3,))
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
        if "weight" in layer:
            return Dense(layer["weight"].T, layer.get("bias"))
        raise ValueError(f"the classifier at {path} must hold 'kernel', 'w' or 'weight', got {sorted(layer)}")

    return classifier_fn


def last_gradient(classifier_fn: ClassifierFn, update: Updates) -> Dense:
    """Returns the gradient of the last layer, in float32 or wider.

    Args:
        classifier_fn: Function that picks the last layer from an update.
        update: Update that the client shared, with the sign and scale of a gradient.

    Returns:
        The gradient of the kernel and, where there is one, of the bias.
    """
    return widened_tree(classifier_fn(update))


def bias_gradient(rule: str, classifier_fn: ClassifierFn, observation: Observation) -> Float[Array, " c"]:
    """Returns the gradient of the last bias, in float32 or wider.

    Args:
        rule: Name of the label rule, for the error message.
        classifier_fn: Function that picks the last layer from an update.
        observation: Observation of the attack.

    Returns:
        The gradient, shape (c,).

    Raises:
        ValueError: If the last layer has no bias.
    """
    bias = last_gradient(classifier_fn, observation.update).bias
    if bias is None:
        raise ValueError(f"{rule} needs a bias in the last layer, got none")
    return bias


def of_mean_loss(
    rule: str, classifier_fn: ClassifierFn, observation: Observation, values: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """Returns the values that a rule reads if the bias gradient can be that of a mean loss, whose scale the rule needs.

    The entries of a cross-entropy's gradient add up to 0, and the negative ones of a mean to no less than -1. What adds
    up to 0 and goes further below is the gradient of a sum. What does not add up to 0, such as noise, says nothing of
    the scale. The sum over a batch in which all classes are about as frequent as predicted stays above -1, and is not
    noticed.

    Args:
        rule: Name of the label rule, for the error message.
        classifier_fn: Function that picks the last layer from an update.
        observation: Observation of the attack. Without a bias in the last layer nothing is checked.
        values: Values that the rule computed from the update, of any shape.

    Returns:
        The values. Inside of a trace, where the gradient is known too late to raise, they are NaN if the loss is not a
        mean.

    Raises:
        ValueError: If the gradient is concrete and of a loss that is not a mean.
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
    """Returns the number of labels to find.

    Args:
        observation: Observation of the attack. The threat model grants the shape of the batch.

    Returns:
        The size of the batch.

    Raises:
        ValueError: If the size of the batch is not granted, or granted labels are not one class for each example.
    """
    labels = observation.extra.get("labels", jnp.zeros(0, jnp.int32))
    leaves = jax.tree.leaves(labels)
    if len(leaves) != 1 or leaves[0] is not labels:
        raise ValueError(f"label rules find one class an example, got labels in a {type(labels).__name__}")
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"label rules find one class an example, got labels {labels.dtype} of shape {labels.shape}")
    return _check.examples(granted(observation, "inputs_like"), name="observation.extra['inputs_like']")


def dummy_inputs(key: PRNGKeyArray, observation: Observation, count: int) -> Float[Array, "n *d"]:
    """Draws standard normal inputs of the granted shape and type, in float32 or wider before the cast to that type.

    Args:
        key: Key of this draw.
        observation: Observation of the attack. The threat model grants the shape of the batch.
        count: Number n of inputs.

    Returns:
        The inputs, shape (n, *d).

    Raises:
        ValueError: If the shape of the batch is not granted, or the client's inputs are integers.
    """
    like = granted_like(observation)
    return as_granted(jax.random.normal(key, (count, *like.shape[1:]), wide_dtype(like.dtype)), observation)


def check_dummies(observation: Observation, num_dummies: int) -> None:
    """Checks that dummy inputs fit into memory.

    Args:
        observation: Observation of the attack. The threat model grants the shape of the batch.
        num_dummies: Number of dummy inputs.

    Raises:
        ValueError: If they do not fit, the shape of the batch is not granted, or the client's inputs are integers.
    """
    _check.fits(num_dummies * math.prod(granted_like(observation).shape[1:]), num_dummies=num_dummies)


def attackers_key(key: PRNGKeyArray | None, observation: Observation) -> PRNGKeyArray:
    """Returns the key of a rule that draws.

    A fixed key would draw the client's own data wherever these were drawn from that key too.

    Args:
        key: Key that the user gave. None derives one from the bits of the observed update.
        observation: Observation of the attack.

    Returns:
        The key.
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
    """Returns the sum of the words modulo 2^32, each multiplied by an odd number that belongs to its place."""
    odd = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
    return jnp.sum(words * (odd * jnp.uint32(2_654_435_761)), dtype=jnp.uint32)


def or_none(labels: Int[Array, " b"], *known: Array) -> Int[Array, " b"]:
    """Returns the labels, or -1 for each of them where something that they were read from is not finite.

    Args:
        labels: Labels that a rule found, shape (b,).
        *known: Arrays that the labels were read from.

    Returns:
        Labels of shape (b,).
    """
    finite: Bool[Array, ""] = jnp.all(jnp.stack([jnp.all(jnp.isfinite(values)) for values in known]))
    return jnp.where(finite, labels, -1)


def labels_from_counts(counts: Float[Array, " c"], size: int) -> Int[Array, " b"]:
    """Rounds real class counts to labels.

    The integer counts n with n >= 0 and sum n = size that are nearest to `counts` in least squares are found. One label
    after the other goes to the class with the largest remainder counts - n. The marginal costs grow with n, so that
    this greedy choice is the optimum.

    Args:
        counts: Estimated number of examples of each class, shape (c,). They need not add up to `size`.
        size: Number b of labels.

    Returns:
        Labels of shape (b,), in no particular order. They are -1 where a count is not finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.labels.classifier import labels_from_counts
        >>> sorted(labels_from_counts(jnp.array([1.8, -0.3, 1.1]), 3).tolist())
        [0, 0, 2]
    """

    def emit(remaining: Float[Array, " c"], _: None) -> tuple[Float[Array, " c"], Int[Array, ""]]:
        label = jnp.argmax(remaining)
        return remaining.at[label].add(-1), label

    return or_none(jax.lax.scan(emit, widened(counts), None, length=size)[1], counts)


def greedy_labels(values: Float[Array, " c"], impact: Float[Array, ""], offset: Array, size: int) -> Int[Array, " b"]:
    """Gives every class of negative value once, most negative first, and then always the class that is most negative.

    Args:
        values: Sums of gradients, one for each class, shape (c,).
        impact: What one example of a class adds to the class's value, below 0. It is taken off for each label given.
        offset: What is taken off all values before the second stage, a scalar or an array of shape (c,).
        size: Number b of labels to give.

    Returns:
        Labels of shape (b,). They are -1 where something that they were read from is not finite.

    Examples:
        Classes 0 and 2 get a label each. The third label goes to class 2, which has more left:

        >>> import jax.numpy as jnp
        >>> from gia_jax.labels.classifier import greedy_labels
        >>> values = jnp.array([-1.0, 0.5, -2.0])
        >>> greedy_labels(values, jnp.array(-1.0), jnp.zeros(()), 3).tolist()
        [2, 0, 2]
    """

    def emit(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        values, first = carry
        once = jnp.any(first)
        label = jnp.argmin(jnp.where(once, jnp.where(first, values, jnp.inf), values - offset))
        return (values.at[label].add(-impact), first.at[label].set(False)), label

    found = jax.lax.scan(emit, (values, values < 0), None, length=size)[1]
    return or_none(found, values, impact, offset)
