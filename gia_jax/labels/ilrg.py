"""The label rule of Ma et al., Instance-wise Batch Label Restoration via Gradients (iLRG), ICLR 2023."""

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
    """Builds the rule that solves a linear system between the class counts and the bias gradient.

    Here B is the size of the batch, C the number of classes, and W and b are the kernel and the bias of the last layer.
    The mean feature of class c is estimated as h_c = grad W_c / grad b_c, its prediction as p^c = softmax(h_c W + b),
    and the counts n solve B grad b = P^T n - n with sum n = B, where row c of P is p^c. P^T - I has rank C - 1 at most
    (its columns sum to zero), so that the sum is a row of the system. Counts are then rounded to integers >= 0 with
    that sum.

    The rule is exact where the features of the whole batch are alike (any batch size). Otherwise h_c mixes in the
    features of other classes, by the p_c of each example. Classes that do not occur have meaningless rows, and as the
    network grows confident P^T - I vanishes: `ilrg_system` returns the condition number.

    Args:
        classifier_fn: Function that picks the last layer, which must have a bias, such as `dense("head")`.

    Returns:
        The rule, a function `(observation) -> labels`. It raises ValueError where there is no bias, or where its
        gradient is not that of a mean loss. Inside of a trace the gradient is known too late to raise, and the labels
        are -1.

    Examples:
        The features are alike, so that the counts are exact, in a network that does not predict 1 / C:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, clients, labels, observe
        >>> apply_fn = lambda params, inputs: inputs @ params["head"]["kernel"] + params["head"]["bias"]
        >>> client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        >>> params = {"head": {"kernel": jnp.array([[0.0, 0.5, -0.5]]), "bias": jnp.zeros(3)}}
        >>> batch = Batch(jnp.ones((4, 1)), jnp.array([2, 0, 2, 2]))
        >>> observation = observe(jax.random.key(0), ThreatModel(), client_fn, params, batch)
        >>> sorted(labels.ilrg(labels.dense("head"))(observation).tolist())
        [0, 2, 2, 2]
    """

    def label_fn(observation: Observation) -> Int[Array, " b"]:
        counts, _ = ilrg_system(classifier_fn, observation)
        return labels_from_counts(counts, batch_size(observation))

    return label_fn


def ilrg_system(classifier_fn: ClassifierFn, observation: Observation) -> tuple[Float[Array, " c"], Float[Array, ""]]:
    """Solves the linear system of `ilrg` in least squares, before the counts are rounded.

    Args:
        classifier_fn: Function that picks the last layer, which must have a bias, such as `dense("head")`.
        observation: Observation of the attack. The threat model grants the size of the batch.

    Returns:
        The pair of the counts, real numbers of shape (c,), and the condition number of the system. Inside of a trace
        the counts are NaN where the bias gradient is not that of a mean loss.

    Raises:
        ValueError: If there is no bias, the size of the batch is not granted, or the gradient is not that of a mean
            loss.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, clients, labels, observe
        >>> apply_fn = lambda params, inputs: inputs @ params["head"]["kernel"] + params["head"]["bias"]
        >>> client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        >>> params = {"head": {"kernel": jnp.zeros((1, 3)), "bias": jnp.zeros(3)}}
        >>> batch = Batch(jnp.ones((4, 1)), jnp.array([2, 0, 2, 2]))
        >>> observation = observe(jax.random.key(0), ThreatModel(), client_fn, params, batch)
        >>> counts, condition = labels.ilrg_system(labels.dense("head"), observation)
        >>> jnp.round(jnp.abs(counts)).tolist(), f"{condition:.2f}"
        ([1.0, 0.0, 3.0], '1.73')
    """
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
