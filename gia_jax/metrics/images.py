"""How well images were reconstructed. All images are pixels in [0, 1]."""

from typing import NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

Images = Float[Array | np.ndarray, "b h w c"]


class ImageScores(NamedTuple):
    """One number for each true image, after assignment.

    Attributes:
        mse: Mean squared error of the pixels.
        psnr: Peak signal-to-noise ratio, -10 log10(mse) in dB; infinite for equal images.
        ssim: Structural similarity, at most 1, averaged over channels.
        assignment: Which reconstruction was compared with each true image.
    """

    mse: Float[Array, " b"]
    psnr: Float[Array, " b"]
    ssim: Float[Array, " b"]
    assignment: Int[Array, " b"]


def image_scores(reconstructed: Images, truth: Images) -> ImageScores:
    """Scores of a batch, whose order an attacker cannot know: reconstructions are assigned to true images such that the
    sum of squared errors is least (Hungarian algorithm), once, and all metrics use that assignment.

    Args:
        reconstructed: Pixels; values outside [0, 1] are clipped, NaN counts as 0.5.
        truth: Pixels in [0, 1].

    Returns:
        The scores, in the order of `truth`.

    Raises:
        ValueError: The shapes differ or are no images.
    """
    if reconstructed.shape != truth.shape or truth.ndim != 4:
        raise ValueError(f"reconstructed must have the shape {truth.shape} of truth, got {reconstructed.shape}")
    clipped = as_pixels(reconstructed)
    cost = jnp.mean(jnp.square(truth[:, None] - clipped[None]), (2, 3, 4))
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    assignment = jnp.zeros(truth.shape[0], columns.dtype).at[rows].set(columns)
    matched = clipped[assignment]
    mse = jnp.mean(jnp.square(truth - matched), (1, 2, 3))
    return ImageScores(mse, -10 * jnp.log10(mse), ssim(matched, truth), assignment)


def ssim(a: Images, b: Images) -> Float[Array, " b"]:
    """Structural similarity (Wang et al., 2004) with a Gaussian window of 11 pixels and sigma 1.5.

    For images smaller than the window, the largest odd window that fits.
    """
    side = min(a.shape[1:3])
    window = min(11, side - 1 + side % 2)
    return jax.vmap(lambda x, y: jnp.asarray(dm_pix.ssim(x, y, filter_size=window)))(a, b)


def success_share(psnr: Float[Array, " n"], *, threshold: float = 20.0) -> Float[Array, ""]:
    """The share of images reconstructed at `threshold` dB or better."""
    return jnp.mean((psnr >= threshold).astype(jnp.float32))


def retrieval_rank(
    reconstructed: Float[Array | np.ndarray, "h w c"], gallery: Float[Array | np.ndarray, "n h w c"], index: int
) -> Int[Array, ""]:
    """The place of the true image, gallery[index], among all images of the gallery by squared distance to the
    reconstruction: 1 means that the reconstruction identifies it, (n + 1) / 2 is chance. The reconstruction is clipped
    as in `image_scores`.
    """
    distances = jnp.sum(jnp.square(gallery - as_pixels(reconstructed)[None]), (1, 2, 3))
    return 1 + jnp.sum(distances < distances[index])


def nearest(images: Images, gallery: Float[Array | np.ndarray, "n h w c"]) -> Float[Array, "b h w c"]:
    """For every image the closest of the gallery by squared distance: a lucky guess from public data."""

    gallery = jnp.asarray(gallery)

    def one(image: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        return gallery[jnp.argmin(jnp.sum(jnp.square(gallery - image[None]), (1, 2, 3)))]

    return jax.lax.map(one, images)


def as_pixels(images: Float[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """Clipped to [0, 1], NaN as 0.5: how every metric reads a reconstruction."""
    return jnp.nan_to_num(jnp.clip(images, 0, 1), nan=0.5)
