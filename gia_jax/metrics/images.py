"""Measures how well images were reconstructed.

All images are pixels in [0, 1], and all arithmetic is in float32 or wider.
"""

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
PSNR_IN_WORDS = "PSNR in dB after clipping to [0, 1]: above 20 a photograph is recognisable, above 40 it is a copy."


class ImageScores(NamedTuple):
    """The scores of a batch: one number for each true image, after reconstructions were assigned to them.

    A number is NaN where a traced true image is not pixels in [0, 1].

    Attributes:
        mse: Mean squared error of the pixels, shape (b,).
        psnr: Peak signal-to-noise ratio, -10 log10(mse) in dB, infinite for equal images, shape (b,).
        ssim: Structural similarity, at most 1, averaged over channels, shape (b,).
        assignment: Index of the reconstruction that was compared with each true image, shape (b,).

    Examples:
        One of two images is reconstructed at 20 dB or better:

        >>> import jax.numpy as jnp
        >>> from gia_jax import metrics
        >>> mse, psnr = jnp.array([0.001, 0.1]), jnp.array([30.0, 10.0])
        >>> scores = metrics.ImageScores(mse, psnr, ssim=jnp.array([0.9, 0.2]), assignment=jnp.array([1, 0]))
        >>> float(metrics.success_share(scores.psnr))
        0.5
    """

    mse: Float[Array, " b"]
    psnr: Float[Array, " b"]
    ssim: Float[Array, " b"]
    assignment: Int[Array, " b"]


def image_scores(reconstructed: Images, truth: Images) -> ImageScores:
    """Scores the reconstructions of a batch, whose order an attacker cannot know.

    Reconstructions are assigned to true images such that the sum of squared errors is least (Hungarian algorithm). This
    is done once, and all metrics use that assignment.

    Args:
        reconstructed: Reconstructed pixels, shape (b, h, w, c). Values outside [0, 1] are clipped, and NaN counts as
            0.5.
        truth: True pixels in [0, 1], up to rounding, of the same shape.

    Returns:
        The scores, in the order of `truth`.

    Raises:
        ValueError: If the shapes differ or are not those of images, an array is of integers, or a concrete `truth`
            leaves [0, 1].

    Examples:
        The order of the reconstructions plays no part:

        >>> import jax.numpy as jnp
        >>> from gia_jax import metrics
        >>> truth = jnp.stack([jnp.zeros((4, 4, 1)), jnp.ones((4, 4, 1))])
        >>> scores = metrics.image_scores(truth[::-1], truth)
        >>> scores.assignment.tolist(), scores.mse.tolist()
        ([1, 0], [0.0, 0.0])
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
    """Computes the structural similarity (Wang et al., 2004) with a Gaussian window of 11 pixels and sigma 1.5.

    For images smaller than the window, the largest odd window that fits is taken. Images are compared in the order
    given.

    Args:
        reconstructed: Reconstructed pixels, shape (b, h, w, c). Values outside [0, 1] are clipped, and NaN counts as
            0.5.
        truth: True pixels in [0, 1], up to rounding, of the same shape.

    Returns:
        The similarity of each pair of images, at most 1 and averaged over channels, shape (b,). It is NaN where a
        traced true image is not pixels in [0, 1].

    Raises:
        ValueError: If the shapes differ or are not those of images, an array is of integers, or a concrete `truth`
            leaves [0, 1].

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import metrics
        >>> truth = jnp.linspace(0, 1, 16).reshape(1, 4, 4, 1)
        >>> similarity, flipped = metrics.ssim(truth, truth)[0], metrics.ssim(truth[:, ::-1], truth)[0]
        >>> print(f"{similarity:.2f}", bool(flipped < similarity))
        1.00 True
    """
    check_same_shape(reconstructed, truth)
    expected, valid = true_pixels("truth", truth)
    return jnp.where(valid, _ssim(as_pixels(reconstructed), expected), jnp.nan)


def _ssim(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """Computes the similarity of images that were checked, in the order given."""
    side = min(a.shape[1:3])
    window = min(11, side - 1 + side % 2)
    return jax.vmap(lambda x, y: jnp.asarray(dm_pix.ssim(x, y, filter_size=window)))(a, b)


def success_share(psnr: Float[Array, " n"], *, threshold: float = 20.0) -> Float[Array, ""]:
    """Computes the share of images that are reconstructed at `threshold` dB or better.

    Args:
        psnr: Peak signal-to-noise ratio of each image in dB, shape (n,) with n > 0.
        threshold: Least PSNR of a success, in dB.

    Returns:
        The share, in [0, 1]. It is NaN where a score is NaN.

    Raises:
        ValueError: If there are no scores, or `threshold` is NaN or not one number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import metrics
        >>> float(metrics.success_share(jnp.array([25.0, 20.0, 12.0, 9.0])))
        0.5
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
    """Ranks the true image among all images of a gallery by squared distance to the reconstruction.

    Rank 1 means that the reconstruction identifies the true image, gallery[index]. Chance is (n + 1) / 2.

    Args:
        reconstructed: Reconstructed pixels, shape (h, w, c). Values outside [0, 1] are clipped, and NaN counts as 0.5.
        gallery: Pixels in [0, 1], up to rounding, of n images of the same shape.
        index: Place of the true image in the gallery, from 0 to n - 1.

    Returns:
        The rank, a whole number from 1 to n. It is NaN where a traced `index` or gallery is out of range.

    Raises:
        ValueError: If the shapes do not fit, an array is of integers, or concrete pixels or a concrete `index` are out
            of range.

    Examples:
        The reconstruction is nearest to the brightest image, at place 2, and next to the one at place 1:

        >>> import jax.numpy as jnp
        >>> from gia_jax import metrics
        >>> gallery = jnp.stack([jnp.full((2, 2, 1), value) for value in (0.0, 0.5, 1.0)])
        >>> reconstructed = jnp.full((2, 2, 1), 0.8)
        >>> [float(metrics.retrieval_rank(reconstructed, gallery, index)) for index in range(3)]
        [3.0, 2.0, 1.0]
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
    """Finds, for every image, the closest one of a gallery by squared distance: a lucky guess from public data.

    Args:
        images: True images, pixels in [0, 1], shape (b, h, w, c).
        gallery: Public images of the same shape, one or more, pixels in [0, 1].

    Returns:
        The guesses, of the type of `gallery`. The guess for a traced image that is not pixels in [0, 1] is NaN, and a
        traced public image that is not pixels in [0, 1] is never a guess.

    Raises:
        ValueError: If the shapes do not fit, an array is of integers, or concrete pixels leave [0, 1].

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import metrics
        >>> gallery = jnp.stack([jnp.full((2, 2, 1), value) for value in (0.0, 0.5, 1.0)])
        >>> guesses = metrics.nearest(jnp.full((1, 2, 2, 1), 0.6), gallery)
        >>> float(guesses.mean())
        0.5
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
    """Computes the squared distance of an image to every image of a gallery."""
    return jnp.sum(jnp.square(gallery - image), (1, 2, 3))


def as_pixels(images: Float[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """Reads a reconstruction as every metric does: clipped to [0, 1], with NaN as 0.5.

    Args:
        images: Reconstructed images, of any shape and floating type.

    Returns:
        The pixels, in float32 or wider.
    """
    return jnp.nan_to_num(jnp.clip(widened(jnp.asarray(images)), 0, 1), nan=0.5)


def true_pixels(
    name: str, images: Float[Array | np.ndarray, "n h w c"]
) -> tuple[Float[Array, "n h w c"], Bool[Array, " n"]]:
    """Reads true images: what rounding took out of [0, 1] is clipped.

    Args:
        name: Name of the images in error messages.
        images: True images, shape (n, h, w, c).

    Returns:
        The pixels in float32 or wider, and a boolean for each image that says whether it is pixels in [0, 1] at all.

    Raises:
        ValueError: If the images are none that `check_pixels` passes.
    """
    check_pixels(name, images, AXES)
    values, slack = widened(jnp.asarray(images)), _slack(images)
    valid = jnp.all((values >= -slack) & (values <= 1 + slack), (1, 2, 3))
    return jnp.clip(values, 0, 1), valid


def check_pixels(name: str, images: Array | np.ndarray, axes: tuple[str, ...], *, in_range: bool = True) -> None:
    """Checks that an array holds images.

    Args:
        name: Name of the array in error messages.
        images: Array to check.
        axes: Names of its axes. A first name "..." stands for any number of axes.
        in_range: Whether to check the values as well.

    Raises:
        ValueError: If the array is of integers, is empty or has other axes. With `in_range`, also if a concrete value
            is NaN or leaves [0, 1] by more than rounding.
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
    """Checks that two arrays hold images of one shape. Their values are not looked at.

    Args:
        reconstructed: Reconstructed images.
        truth: True images, shape (b, h, w, c).

    Raises:
        ValueError: If an array does not hold images, or their shapes differ.
    """
    check_pixels("truth", truth, ("b", *AXES[1:]), in_range=False)
    if jnp.shape(reconstructed) != jnp.shape(truth):
        raise ValueError(
            f"reconstructed must have the shape {jnp.shape(truth)} of truth, got {jnp.shape(reconstructed)}"
        )
    check_pixels("reconstructed", reconstructed, ("b", *AXES[1:]), in_range=False)


def _check_gallery(name: str, shape: tuple[int, ...], gallery: Array | np.ndarray) -> None:
    """Raises ValueError for a gallery whose images have another shape."""
    if gallery.shape[1:] != shape:
        raise ValueError(f"gallery must hold images of the shape {shape} of {name}, got {gallery.shape[1:]}")


def _slack(images: Array | np.ndarray) -> float:
    """Returns how far true pixels of this type may leave [0, 1]."""
    return max(ROUNDING, float(jnp.finfo(images.dtype).eps))
