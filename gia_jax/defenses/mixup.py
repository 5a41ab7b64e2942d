"""MixUp: the client trains on sums of its images and of their labels.

Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018, section 2; as a defense with k images Huang et al.,
Evaluating Gradient Inversion Attacks and Defenses in Federated Learning, NeurIPS 2021.
"""

from jaxtyping import PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Batch
from gia_jax.defenses.mixing import InputDefenseFn, as_probabilities, checked_bounds, draw_mixing, mix


def mixup(num_classes: int, *, k: int = 4, low: float = 0.0, high: float = 0.65) -> InputDefenseFn:
    """Encoding i is lambda_1 x_i + ... + lambda_k x_{i_k} of k distinct images of the batch, and so is its label.

    Args:
        num_classes: Number of classes of the model; labels become probabilities.
        k: Images in an encoding, 1 or more; 1 leaves the images as they are.
        low: Least coefficient.
        high: Largest coefficient.

    Returns:
        `(key, batch) -> batch`, the same size, labels of shape (b, num_classes). Every epoch draws from a key of its
        own. Encodings of one image from several epochs can be solved for it: one encoding is not what to measure.

    Raises:
        ValueError: If `num_classes` or `k` is no positive integer, almost no coefficients lie in the bounds, or (when
            called) the batch has fewer than k images.
    """
    _check.integer(num_classes=num_classes)
    bounds = checked_bounds(k, low, high)

    def encode(key: PRNGKeyArray, batch: Batch) -> Batch:
        mixing = draw_mixing(key, batch.inputs.shape[0], k=k, low=bounds[0], high=bounds[1])
        labels = as_probabilities(batch, num_classes)
        return Batch(mix(mixing, batch.inputs), mix(mixing, labels))

    return encode
