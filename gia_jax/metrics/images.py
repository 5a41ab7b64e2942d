"""How well images were reconstructed. All images are pixels in [0, 1], and all arithmetic is in float32 or wider."""

import math
from typing import NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from gia_jax import _check
from gia_jax.precision import widened

Images = Float[Array | np.ndarray, "b h w c"]
AXES = ("n", "h", "w", "c")
ROUNDING = 1e-3  # how far true pixels may leave [0, 1]; in bfloat16 farther, by one unit of its rounding


class ImageScores(NamedTuple):
    """One number for each true image, after assignment; NaN where a traced true image is not pixels in [0, 1].

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
        truth: Pixels in [0, 1], up to rounding.

    Returns:
        The scores, in the order of `truth`.

    Raises:
        ValueError: The shapes differ or are no images, an array is of integers, or a concrete `truth` leaves [0, 1].
    """
    check_same_shape(reconstructed, truth)
    found, (expected, valid) = as_pixels(reconstructed), true_pixels("truth", truth)
    # A row of costs at a time: all differences at once would fill memory.
    cost = jax.lax.map(lambda image: jnp.mean(jnp.square(image - found), (1, 2, 3)), expected)
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    assignment = jnp.zeros(truth.shape[0], columns.dtype).at[rows].set(columns)
    matched = found[assignment]
    mse = jnp.where(valid, jnp.mean(jnp.square(expected - matched), (1, 2, 3)), jnp.nan)
    return ImageScores(mse, -10 * jnp.log10(mse), jnp.where(valid, _ssim(matched, expected), jnp.nan), assignment)


def ssim(reconstructed: Images, truth: Images) -> Float[Array, " b"]:
    """Structural similarity (Wang et al., 2004) with a Gaussian window of 11 pixels and sigma 1.5.

    For images smaller than the window, the largest odd window that fits. Images are read, and refused, as in
    `image_scores`, but compared in the order given.
    """
    check_same_shape(reconstructed, truth)
    expected, valid = true_pixels("truth", truth)
    return jnp.where(valid, _ssim(as_pixels(reconstructed), expected), jnp.nan)


def _ssim(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    side = min(a.shape[1:3])
    window = min(11, side - 1 + side % 2)
    return jax.vmap(lambda x, y: jnp.asarray(dm_pix.ssim(x, y, filter_size=window)))(a, b)


def success_share(psnr: Float[Array, " n"], *, threshold: float = 20.0) -> Float[Array, ""]:
    """The share of images reconstructed at `threshold` dB or better; NaN where a score is NaN.

    Raises:
        ValueError: There are no scores, or `threshold` is NaN or not one number.
    """
    if jnp.ndim(psnr) != 1 or psnr.shape[0] == 0:
        raise ValueError(f"psnr must have shape (n,) with n > 0, got {jnp.shape(psnr)}")
    if jnp.shape(threshold) != ():
        raise ValueError(f"threshold must be one number, got the shape {jnp.shape(threshold)}")
    if _check.is_concrete(threshold) and math.isnan(threshold):
        raise ValueError(f"threshold must be a number, got {threshold}")
    reached = jnp.where(psnr >= threshold, 1.0, jnp.where(psnr < threshold, 0.0, jnp.nan))
    return jnp.mean(reached)


def retrieval_rank(
    reconstructed: Float[Array | np.ndarray, "h w c"],
    gallery: Float[Array | np.ndarray, "n h w c"],
    index: int | Int[Array | np.ndarray, ""],
) -> Float[Array, ""]:
    """The place of the true image, gallery[index], among all images of the gallery by squared distance to the
    reconstruction: 1 means that the reconstruction identifies it, (n + 1) / 2 is chance. The reconstruction is clipped
    as in `image_scores`.

    Args:
        reconstructed: Pixels, read as in `image_scores`.
        gallery: Pixels in [0, 1], of images of the same shape.
        index: Place of the true image in the gallery, from 0 to n - 1.

    Returns:
        The rank, a whole number; NaN where a traced `index` or gallery is out of range.

    Raises:
        ValueError: The shapes do not fit, an array is of integers, or concrete pixels or a concrete `index` are out of
            range.
    """
    check_pixels("reconstructed", reconstructed, AXES[1:], in_range=False)
    check_pixels("gallery", gallery, AXES)
    _check_gallery("reconstructed", reconstructed.shape, gallery)
    place = index.item() if _check.is_concrete(index) and jnp.shape(index) == () and hasattr(index, "item") else index
    if _check.is_concrete(place):
        _check.integer(0, len(gallery) - 1, index=place)
    elif jnp.shape(index) or not jnp.issubdtype(jnp.result_type(index), jnp.integer):
        raise ValueError(f"index must be one integer, got {jnp.result_type(index)} of shape {jnp.shape(index)}")
    images, valid = true_pixels("gallery", gallery)
    distances = _squared_distances(as_pixels(reconstructed), images)
    known = jnp.all(valid) & (place >= 0) & (place < len(gallery))
    return jnp.where(known, 1 + jnp.sum(distances < distances[place]).astype(distances.dtype), jnp.nan)


def nearest(images: Images, gallery: Float[Array | np.ndarray, "n h w c"]) -> Float[Array, "b h w c"]:
    """For every image the closest of the gallery by squared distance: a lucky guess from public data.

    Args:
        images: True images, pixels in [0, 1].
        gallery: Public images of the same shape, one or more.

    Returns:
        The guesses, of the type of `gallery`. The guess for a traced image that is not pixels in [0, 1] is NaN, and a
        traced public image that is not pixels in [0, 1] is never a guess.

    Raises:
        ValueError: The shapes do not fit, an array is of integers, or concrete pixels leave [0, 1].
    """
    check_pixels("images", images, AXES)
    check_pixels("gallery", gallery, AXES)
    _check_gallery("images", images.shape[1:], gallery)
    (truth, valid), (public, usable) = true_pixels("images", images), true_pixels("gallery", gallery)
    gallery = jnp.asarray(gallery)

    def one(image: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        return gallery[jnp.argmin(jnp.where(usable, _squared_distances(image, public), jnp.inf))]

    known = valid & jnp.any(usable)
    return jnp.where(known[:, None, None, None], jax.lax.map(one, truth), jnp.nan)


def _squared_distances(image: Float[Array, "h w c"], gallery: Float[Array, "n h w c"]) -> Float[Array, " n"]:
    return jnp.sum(jnp.square(gallery - image), (1, 2, 3))


def as_pixels(images: Float[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """The images clipped to [0, 1], NaN as 0.5, in float32 or wider: how every metric reads a reconstruction."""
    return jnp.nan_to_num(jnp.clip(widened(jnp.asarray(images)), 0, 1), nan=0.5)


def true_pixels(
    name: str, images: Float[Array | np.ndarray, "n h w c"]
) -> tuple[Float[Array, "n h w c"], Bool[Array, " n"]]:
    """True images without what rounding took out of [0, 1], in float32 or wider, and which of them are pixels at all.

    Raises:
        ValueError: The images are none that `check_pixels` passes.
    """
    check_pixels(name, images, AXES)
    values, slack = widened(jnp.asarray(images)), _slack(images)
    valid = jnp.all((values >= -slack) & (values <= 1 + slack), (1, 2, 3))
    return jnp.clip(values, 0, 1), valid


def check_pixels(name: str, images: Array | np.ndarray, axes: tuple[str, ...], *, in_range: bool = True) -> None:
    """Raises ValueError for an array of integers, or one that is no images with these axes ("..." is any number).

    With `in_range` it does so for concrete values that are NaN or outside of [0, 1] as well.
    """
    shape = jnp.shape(images)
    ranked = len(shape) >= len(axes) - 1 if axes[0] == "..." else len(shape) == len(axes)
    if not ranked or 0 in shape:
        raise ValueError(f"{name} must be images of shape ({', '.join(axes)}), at least one, got {shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"{name} must be pixels in [0, 1] of a floating type, got {images.dtype}: divide by 255")
    if in_range and _check.is_concrete(images):
        values, slack = np.asarray(images), _slack(images)
        outside = ~((values >= -slack) & (values <= 1 + slack))
        if outside.any():
            raise ValueError(f"{name} must be pixels in [0, 1], got {values[outside].flat[0]}")


def check_same_shape(reconstructed: Array | np.ndarray, truth: Array | np.ndarray) -> None:
    """Raises ValueError for arrays that are not images, (b, h, w, c), or not of one shape."""
    check_pixels("truth", truth, ("b", *AXES[1:]), in_range=False)
    if jnp.shape(reconstructed) != jnp.shape(truth):
        raise ValueError(
            f"reconstructed must have the shape {jnp.shape(truth)} of truth, got {jnp.shape(reconstructed)}"
        )
    check_pixels("reconstructed", reconstructed, ("b", *AXES[1:]), in_range=False)


def _check_gallery(name: str, shape: tuple[int, ...], gallery: Array | np.ndarray) -> None:
    if gallery.shape[1:] != shape:
        raise ValueError(f"gallery must hold images of the shape {shape} of {name}, got {gallery.shape[1:]}")


def _slack(images: Array | np.ndarray) -> float:
    return max(ROUNDING, float(jnp.finfo(images.dtype).eps))
