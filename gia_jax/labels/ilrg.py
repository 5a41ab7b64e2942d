"""Instance-wise Batch Label Restoration via Gradients (Ma et al., iLRG, ICLR 2023)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gia_jax.base import LabelFn, Observation
from gia_jax.labels.classifier import (
    ClassifierFn,
    batch_size,
    bias_gradient,
    labels_from_counts,
    last_gradient,
    of_mean_loss,
)
from gia_jax.precision import widened_tree

# Bias gradients below this fraction of the largest tell nothing of their class's features.
NEGLIGIBLE = 1e-6


def ilrg(classifier_fn: ClassifierFn) -> LabelFn:
    """Class counts from a linear system between counts and the bias gradient.

    The mean feature of class c is estimated as h_c = grad W_c / grad b_c, its prediction as p^c = softmax(h_c W + b),
    and the counts n solve B grad b = P^T n - n with sum n = B. P^T - I has rank C - 1 at most (its columns sum to
    zero), so the sum is a row of the system; counts are then rounded to integers >= 0 with that sum. Exact where the
    features of the whole batch are alike (any batch size); otherwise h_c mixes in the features of other classes, by
    the p_c of each example. Classes that do not occur have meaningless rows, and as the network grows confident
    P^T - I vanishes: `ilrg_system` returns the condition number.

    Args:
        classifier_fn: Picks the last layer; it must have a bias.

    Returns:
        The rule; it raises ValueError where there is no bias, or where its gradient is not that of a mean loss. Inside
        of a trace the gradient is known too late to raise, and the labels are -1.
    """

    def label_fn(observation: Observation) -> Int[Array, " b"]:
        counts, _ = ilrg_system(classifier_fn, observation)
        return labels_from_counts(counts, batch_size(observation))

    return label_fn


def ilrg_system(classifier_fn: ClassifierFn, observation: Observation) -> tuple[Float[Array, " c"], Float[Array, ""]]:
    """The least-squares counts, shape (c,), real numbers, and the condition number of the system."""
    gradient, layer = last_gradient(classifier_fn, observation.update), widened_tree(classifier_fn(observation.params))
    bias = bias_gradient("ilrg", classifier_fn, observation)
    size = batch_size(observation)
    usable = jnp.abs(bias) > NEGLIGIBLE * jnp.max(jnp.abs(bias))
    features = jnp.where(usable, gradient.kernel / jnp.where(usable, bias, 1), 0).T
    shift = jnp.zeros_like(bias) if layer.bias is None else layer.bias
    predictions = jax.nn.softmax(features @ layer.kernel + shift)
    system = jnp.concatenate([predictions.T - jnp.eye(bias.shape[0], dtype=bias.dtype), jnp.ones((1, bias.shape[0]))])
    wanted = jnp.append(size * bias, size)
    counts, _, _, singular = jnp.linalg.lstsq(system.astype(bias.dtype), wanted.astype(bias.dtype))
    return of_mean_loss("ilrg", classifier_fn, observation, counts), singular[0] / singular[-1]
