"""MixUp: the client trains on weighted sums of its images and of their labels.

Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018, section 2. As a defense with k images: Huang et al.,
Evaluating Gradient Inversion Attacks and Defenses in Federated Learning, NeurIPS 2021.
"""

from jaxtyping import PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Batch
from gia_jax.defenses.mixing import InputDefenseFn, as_probabilities, checked_bounds, draw_mixing, mix


def mixup(num_classes: int, *, k: int = 4, low: float = 0.0, high: float = 0.65) -> InputDefenseFn:
    """Builds the encoding of MixUp, which replaces each image by a mixture of k images of the batch.

    Encoding i is lambda_1 x_i + ... + lambda_k x_{i_k} of k distinct images, and its label is mixed in the same way.

    Args:
        num_classes: Number of classes of the model. Labels become probabilities.
        k: Number of images in an encoding, from 1 to 10,000. 1 leaves the images as they are.
        low: Least coefficient lambda, in [0, 1].
        high: Largest coefficient lambda, in [low, 1].

    Returns:
        The encoding, a function `(key, batch) -> batch` that keeps the batch's size and returns labels of shape
        (b, num_classes). Every epoch draws from a key of its own. Encodings of one image from several epochs can be
        solved for the image, so measure the defense with all of them and not with one.

    Raises:
        ValueError: If `num_classes` or `k` is out of range, not 0 <= low <= high <= 1, or almost no coefficients lie in
            the bounds. The encoding raises it if the batch has fewer than k images, its labels are no classes, or its
            inputs are a tree of arrays, such as graphs.

    Examples:
        Each label is shared between two classes, and none has more than 0.65 of it:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, defenses
        >>> encode = defenses.mixup(3, k=2)
        >>> encoded = encode(jax.random.key(0), Batch(jnp.ones((3, 4)), jnp.array([0, 1, 2])))
        >>> (encoded.labels > 0).sum(axis=1).tolist(), bool(encoded.labels.max() <= 0.65)
        ([2, 2, 2], True)
    """
    _check.integer(num_classes=num_classes)
    bounds = checked_bounds(k, low, high)

    def encode(key: PRNGKeyArray, batch: Batch) -> Batch:
        _check.one_array("batch.inputs", batch.inputs, "for mixup")
        labels = as_probabilities(batch, num_classes)
        mixing = draw_mixing(key, batch.inputs.shape[0], k=k, low=bounds[0], high=bounds[1])
        return Batch(mix(mixing, batch.inputs), mix(mixing, labels))

    return encode
