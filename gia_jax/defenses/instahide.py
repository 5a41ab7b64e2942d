"""InstaHide: MixUp, then a random sign for every pixel of every encoding.

Huang et al., InstaHide: Instance-Hiding Schemes for Private Distributed Learning, ICML 2020, algorithms 1 and 2. It is
broken: Carlini et al., Is Private Learning Possible with Instance Encoding?, IEEE S&P 2021.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Batch
from gia_jax.defenses.mixing import (
    InputDefenseFn,
    Mixing,
    as_probabilities,
    checked_bounds,
    draw_coefficients,
    draw_mixing,
    draw_sources,
    mix,
)


def instahide(
    num_classes: int,
    *,
    k: int = 4,
    low: float = 0.0,
    high: float = 0.65,
    public: Float[Array, "m *d"] | None = None,
) -> InputDefenseFn:
    """Builds the encoding of InstaHide, which mixes images and then flips the sign of random pixels.

    Encoding i is sigma * (lambda_1 x_i + ... + lambda_k x_{i_k}), where sigma is a fresh sign for every pixel and
    channel.

    Args:
        num_classes: Number of classes of the model. Labels become probabilities, mixed as in `mixup`.
        k: Number of images in an encoding, from 1 to 10,000.
        low: Least coefficient lambda, in [0, 1].
        high: Largest coefficient lambda, in [low, 1].
        public: Public images in the model's space, shape (m, *d), for the cross-dataset variant: ceil(k / 2) private
            images are mixed with k - ceil(k / 2) of these. They carry no label, so that a row of labels adds up to the
            private coefficients. None mixes only images of the batch itself (the intra-dataset variant).

    Returns:
        The encoding, a function `(key, batch) -> batch` that keeps the batch's size and returns labels of shape
        (b, num_classes). The signs are those of the model's (normalised) space, where 0 is the mean pixel.

    Raises:
        ValueError: If `num_classes` or `k` is out of range, not 0 <= low <= high <= 1, almost no coefficients lie in
            the bounds, or `public` holds too few images or a number that is not finite. The encoding raises it if there
            are too few private images, public ones have another shape, the labels are no classes, or the inputs are a
            tree of arrays, such as graphs.

    Examples:
        A mixture of images of ones is all ones, so that only the random signs are left:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, defenses
        >>> encode = defenses.instahide(3, k=2)
        >>> batch = Batch(jnp.ones((4, 2, 2, 1)), jnp.array([0, 1, 2, 0]))
        >>> encoded = encode(jax.random.key(0), batch)
        >>> bool(jnp.allclose(jnp.abs(encoded.inputs), 1))
        True
        >>> encoded.labels.shape
        (4, 3)
    """
    _check.integer(num_classes=num_classes)
    bounds = checked_bounds(k, low, high)
    private = k if public is None else -(-k // 2)
    if public is not None:
        _check.finite("public", public)
        if len(public) < k - private:
            raise ValueError(f"public must have at least {k - private} images, got {len(public)}")

    def encode(key: PRNGKeyArray, batch: Batch) -> Batch:
        _check.one_array("batch.inputs", batch.inputs, "for instahide")
        key_mixing, key_signs = jax.random.split(key)
        images, labels = batch.inputs, as_probabilities(batch, num_classes)
        size = images.shape[0]
        if size < private:
            raise ValueError(f"k={k} needs {private} private images, got {size}")
        if public is not None and public.shape[1:] != images.shape[1:]:
            raise ValueError(f"public must have images of shape {images.shape[1:]}, got {public.shape[1:]}")
        if public is None:
            mixing = draw_mixing(key_mixing, size, k=k, low=bounds[0], high=bounds[1])
        else:
            mixing = _with_public(key_mixing, size, len(public), private, k, bounds)
            images = jnp.concatenate([images, public.astype(images.dtype)])
            labels = jnp.concatenate([labels, jnp.zeros((len(public), num_classes), labels.dtype)])
        signs = jax.random.rademacher(key_signs, batch.inputs.shape, batch.inputs.dtype)
        return Batch(signs * mix(mixing, images), mix(mixing, labels))

    return encode


def _with_public(
    key: PRNGKeyArray, size: int, num_public: int, private: int, k: int, bounds: tuple[float, float]
) -> Mixing:
    """Draws a mixing of `private` own images and k - private public ones, whose indices follow the client's."""
    key_coefficients, key_private, key_public = jax.random.split(key, 3)
    coefficients = draw_coefficients(key_coefficients, size, k=k, low=bounds[0], high=bounds[1])
    own = draw_sources(key_private, size, k=private)
    keys = jax.random.split(key_public, size)
    others = jax.vmap(lambda one: jax.random.choice(one, num_public, (k - private,), replace=False))(keys)
    return Mixing(jnp.concatenate([own, size + others], 1), coefficients)
