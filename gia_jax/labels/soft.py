"""The label of one example as probabilities, such as those of label smoothing, MixUp or a teacher network.

Wang, Liang, He, Towards Eliminating Hard Label Constraints in Gradient Inversion Attacks, ICLR 2024.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gia_jax import _check
from gia_jax.base import LabelFn, Observation, Scalar
from gia_jax.labels.classifier import ClassifierFn, Dense, last_gradient, of_mean_loss
from gia_jax.precision import widened_tree
from gia_jax.threat import granted

NUM_POINTS = 4_096  # of the search, for each sign of the scale
NUM_STARTS = 8
NUM_REFINEMENTS = 40
DIFFERENT = 0.1  # between entries of two labels of which both must not fit


def soft_labels(classifier_fn: ClassifierFn, *, num_peaks: int = 2, least_error: float = 1e-5) -> LabelFn:
    """Builds the rule that finds the label of one example as class probabilities, from the last layer's gradient.

    The layer z = h W + b has the gradients h e^T and e, where e = p - y is the error of the prediction p = softmax(z).
    The label y adds up to 1.

    With a bias all is in closed form, for any y: the gradient of the kernel divided by that of the bias is h, which
    gives p, and y = p - e.

    Without a bias the gradient h e^T fixes h only up to a scale. For each scale there is one y. The rule takes that of
    which all entries but the `num_peaks` largest are equal, as they are of a hard label, of a smoothed one, and of a
    mixture of `num_peaks` of these. With e_max the largest magnitude in e, it searches log e_max on a grid, for both
    signs of the scale, for the least variance of these entries of y / e_max, and refines the best points by Gauss and
    Newton. Where an entirely different label fits about as well, none is returned: so it is for most labels of another
    kind, such as a teacher's, and where the network is so sure that p does not depend on the scale.

    Departures: without a bias the paper minimises the variance of y itself, which also vanishes as the scale grows, and
    bounds the scale. Divided by e_max it does not. With a bias the paper searches in the same way; that is not needed.

    Args:
        classifier_fn: Function that picks the last layer, with or without a bias, such as `dense("head")`.
        num_peaks: Number of classes whose probability may differ from that of all others, at least 1. It is 1 for hard
            and smoothed labels, and k for mixtures of k images. More are allowed than there are. It has no meaning with
            a bias.
        least_error: Least e_max that is searched, in (0, 1). It has no meaning with a bias.

    Returns:
        The rule, a function `(observation) -> labels` with probabilities of shape (1, c), in float32 or wider. They are
        NaN where the gradient is not finite or 0, or without a bias does not tell the label. It raises ValueError for a
        batch of more than one, where the bias gradient is not that of a mean loss (inside of a trace the labels are
        NaN), and without a bias for fewer than `num_peaks` + 3 classes.

    Raises:
        ValueError: If `num_peaks` is not a positive integer, or `least_error` is not in (0, 1).

    Examples:
        A smoothed label, with and without a bias in the layer:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, clients, labels, observe
        >>> def apply_fn(params, inputs):
        ...     return inputs @ params["head"]["kernel"] + params["head"].get("bias", 0.0)
        >>> client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        >>> batch = Batch(jnp.array([[1.0, 2.0]]), jnp.array([[0.04, 0.04, 0.84, 0.04, 0.04]]))
        >>> layer = {"kernel": jnp.array([[0.3, -0.5, 0.2, 0.1, 0.0], [0.0, 0.4, 0.2, -0.3, 0.1]])}
        >>> rule = labels.soft_labels(labels.dense("head"))
        >>> for head in (layer | {"bias": jnp.zeros(5)}, layer):
        ...     observation = observe(jax.random.key(0), ThreatModel(), client_fn, {"head": head}, batch)
        ...     print(*(f"{probability:.2f}" for probability in rule(observation)[0]))
        0.04 0.04 0.84 0.04 0.04
        0.04 0.04 0.84 0.04 0.04
    """
    _check.integer(num_peaks=num_peaks)
    _check.scalar(least_error=least_error)
    if not 0 < least_error < 1:
        raise ValueError(f"least_error must be in (0, 1), got {least_error!r}")

    def label_fn(observation: Observation) -> Float[Array, "1 c"]:
        size = _check.examples(granted(observation, "inputs_like"), name="observation.extra['inputs_like']")
        if size != 1:
            raise ValueError(f"soft_labels finds one label, got a batch of {size}: use bias_counts")
        gradient = last_gradient(classifier_fn, observation.update)
        layer = widened_tree(classifier_fn(observation.params))
        if gradient.bias is None:
            found = _by_search(gradient.kernel, layer, num_peaks, least_error)
        else:
            found = _in_closed_form(gradient.kernel, gradient.bias, layer)
            found = of_mean_loss("soft_labels", classifier_fn, observation, found)
        found = jnp.maximum(found, 0)  # by rounding, or by noise on the update
        return jnp.where(jnp.all(jnp.isfinite(gradient.kernel)), found / jnp.sum(found), jnp.nan)[None]

    return label_fn


def _in_closed_form(kernel: Float[Array, "d c"], error: Float[Array, " c"], layer: Dense) -> Float[Array, " c"]:
    """Returns the label, from the gradients of the kernel and of the bias. It is NaN where that of the bias is 0."""
    largest = jnp.max(jnp.abs(error))
    relative = error / largest
    features = (kernel / largest) @ relative / (relative @ relative)  # least squares over all classes
    return jax.nn.softmax(features @ layer.kernel + _shift(layer)) - error


def _shift(layer: Dense) -> Float[Array, "*c"]:
    """Returns the bias of the last layer, or 0."""
    return jnp.zeros((), layer.kernel.dtype) if layer.bias is None else layer.bias


def _by_search(kernel: Float[Array, "d c"], layer: Dense, num_peaks: int, least_error: float) -> Float[Array, " c"]:
    """Returns the label, from the gradient of a layer without a bias."""
    num_classes = kernel.shape[1]
    if num_classes < num_peaks + 3:
        raise ValueError(f"num_peaks must be at most the number of classes less 3, {num_classes - 3}, got {num_peaks}")
    # The kernel's gradient is length * direction * shape^T, where the direction has length 1, and the shape a largest
    # magnitude of 1. It is read from all columns: the longest one alone would be as right where nothing is rounded.
    scaled = kernel / jnp.max(jnp.abs(kernel))
    longest = scaled[:, jnp.argmax(jnp.sum(jnp.square(scaled), 0))]
    direction = scaled @ (longest @ scaled)
    direction = direction / jnp.linalg.norm(direction)
    shape = direction @ kernel
    length = jnp.max(jnp.abs(shape))
    shape, slope = shape / length, direction @ layer.kernel

    def label_of(sign: Scalar, log_error: Scalar) -> Float[Array, " c"]:
        error = jnp.exp(log_error)
        return jax.nn.softmax(sign * length / error * slope + _shift(layer)) - sign * error * shape

    def residuals(sign: Scalar, log_error: Scalar) -> Float[Array, " r"]:
        rest = jnp.sort(label_of(sign, log_error))[: num_classes - num_peaks] / jnp.exp(log_error)
        return rest - jnp.mean(rest)

    def variance(sign: Scalar, log_error: Scalar) -> Float[Array, ""]:
        return jnp.mean(jnp.square(residuals(sign, log_error)))

    grid = jnp.linspace(math.log(least_error), 0, NUM_POINTS, dtype=kernel.dtype)
    signs = jnp.array([[1.0], [-1.0]], kernel.dtype)
    heights = jnp.vectorize(variance)(signs, grid)
    walls = jnp.pad(heights, ((0, 0), (1, 1)), constant_values=jnp.inf)
    is_lowest = (heights <= walls[:, :-2]) & (heights <= walls[:, 2:])
    _, starts = jax.lax.top_k(-jnp.where(is_lowest, heights, jnp.inf).ravel(), NUM_STARTS)

    def refined(start: Array) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, " c"]]:
        sign, first = jnp.where(start < NUM_POINTS, 1, -1).astype(kernel.dtype), grid[start % NUM_POINTS]

        def improve(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
            at, height, share = carry
            values, slopes = jax.jvp(lambda t: residuals(sign, t), (at,), (jnp.ones_like(at),))
            new = jnp.clip(at - share * (values @ slopes) / (slopes @ slopes), grid[0], grid[-1])
            lower = variance(sign, new)
            better = lower < height
            carry = jnp.where(better, new, at), jnp.where(better, lower, height), jnp.where(better, share, share / 2)
            return carry, None

        (at, height, _), _ = jax.lax.scan(
            improve, (first, variance(sign, first), jnp.ones_like(first)), None, length=NUM_REFINEMENTS
        )
        label = label_of(sign, at)
        return jnp.where(jnp.min(label) < -1e-2, jnp.inf, height), at, label

    lowest, places, labels = jax.vmap(refined)(starts)
    best = jnp.argmin(lowest)
    others = jnp.vectorize(label_of, signature="(),()->(c)")(signs, grid)
    differs = jnp.any(jnp.abs(others - labels[best]) > DIFFERENT, -1)
    rounding = jnp.square(jnp.finfo(kernel.dtype).eps / jnp.exp(places[best]))
    is_unique = jnp.min(heights, initial=jnp.inf, where=differs) > 4 * jnp.maximum(lowest[best], rounding)
    return jnp.where(is_unique, labels[best], jnp.nan)
