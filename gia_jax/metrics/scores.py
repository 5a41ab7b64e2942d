"""Scores of many victims at once, and guesses that use no gradient to compare them with."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gia_jax.base import Batch
from gia_jax.data import ImageData
from gia_jax.metrics.images import as_pixels, check_pixels, image_scores, nearest
from gia_jax.metrics.labels import label_overlap
from gia_jax.precision import widened


class Scores(NamedTuple):
    """The scores of every victim (batch): PSNR in dB, SSIM and MSE of each image, shape (v, b), the share of right
    labels in [0, 1], shape (v,), and the reconstructed images in the order of the true ones, shape (v, b, h, w, c).
    """

    psnr: np.ndarray
    ssim: np.ndarray
    mse: np.ndarray
    label_correct: np.ndarray
    images: np.ndarray


def score(reconstructed: Batch, truth: Batch, data: ImageData) -> Scores:
    """Scores of reconstructions in the model's space against the truth in it, in float32 or wider.

    Args:
        reconstructed: Batches of v victims, inputs of shape (v, b, h, w, c). Pixels are clipped to [0, 1], and NaN
            counts as 0.5.
        truth: The true batches, images of `data` as `ImageData.normalize` gives them.
        data: The images' mean and deviation, one number for each channel.

    Returns:
        The scores. Labels that are neither class indices (v, b) nor probabilities (v, b, c) are not compared: the share
        of right ones is then NaN.

    Raises:
        ValueError: Inputs of another shape or of integers, true pixels outside of [0, 1], or labels of other shapes
            than the victims'.
    """
    for name, inputs in (("truth.inputs", truth.inputs), ("reconstructed.inputs", reconstructed.inputs)):
        check_pixels(name, inputs, ("v", "b", "h", "w", "c"), in_range=False)
        if inputs.shape != truth.inputs.shape:
            raise ValueError(f"{name} must have the shape {truth.inputs.shape} of truth.inputs, got {inputs.shape}")
    for name, values in (("mean", data.mean), ("std", data.std)):
        if np.shape(values) != truth.inputs.shape[-1:]:
            channels = truth.inputs.shape[-1]
            raise ValueError(f"data.{name} must have {channels} numbers, one for each channel, got {values}")
    compared = _are_classes(reconstructed.labels, truth.labels)
    if compared:
        for name, given in (("reconstructed.labels", reconstructed.labels), ("truth.labels", truth.labels)):
            if given.shape[:2] != truth.inputs.shape[:2]:
                raise ValueError(f"{name} must be {truth.inputs.shape[:2]}, victims and images, got {given.shape[:2]}")

    # Outside of `one`, for both: equal inputs must be equal pixels, however the program around them is compiled.
    def pixels(inputs: Array) -> Array:
        return widened(inputs) * jnp.asarray(data.std) + jnp.asarray(data.mean)

    def one(found: Array, images: Array, labels: tuple[Array, Array] | None) -> tuple[Any, Any, Any]:
        scores = image_scores(found, images)
        overlap = jnp.full((), jnp.nan) if labels is None else label_overlap(*labels)
        return scores, overlap, as_pixels(found)[scores.assignment]

    # Checked in the type of the inputs, because the rounding of bfloat16 takes pixels farther out of [0, 1].
    images = pixels(jnp.asarray(truth.inputs))
    check_pixels("denormalised truth.inputs", images.astype(truth.inputs.dtype), ("v", "b", "h", "w", "c"))
    labels = (reconstructed.labels, truth.labels) if compared else None
    found, overlap, matched = jax.jit(jax.vmap(one))(
        pixels(jnp.asarray(reconstructed.inputs)), jnp.clip(images, 0, 1), labels
    )
    psnr, ssim, mse = (np.asarray(field) for field in (found.psnr, found.ssim, found.mse))
    return Scores(psnr, ssim, mse, np.asarray(overlap), np.asarray(matched))


def _are_classes(*every: Any) -> bool:
    kinds = ((jnp.integer, 2), (jnp.floating, 3))
    arrays = all(isinstance(one, (jax.Array, np.ndarray)) for one in every)
    return arrays and all(any(jnp.issubdtype(one.dtype, kind) and one.ndim == n for kind, n in kinds) for one in every)


def baselines(
    truth: np.ndarray,
    gallery: np.ndarray,
    *,
    labels: np.ndarray | None = None,
    gallery_labels: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """PSNR in dB of guesses that use no gradient, each of the shape of `truth` without its image axes.

    Args:
        truth: Pixels in [0, 1], shape (..., h, w, c).
        gallery: Public images of the same kind, none of them a victim, shape (n, h, w, c); with n = 0 no guess is made
            from them.
        labels: The class of each true image, an integer, shape (...); None where it is not known.
        gallery_labels: The class of each public image, shape (n,); with `labels` only.

    Returns:
        "grey" (0.5 everywhere) and, where there are public images, "data mean" (the gallery's mean image) and "nearest
        image" (the gallery's closest to the truth: an oracle); with labels "class mean" and "nearest of the class" (an
        oracle too). Infinite for a guess that is the truth.

    Raises:
        ValueError: Images of integers, outside of [0, 1] or of shapes that differ; labels of one kind only, of another
            shape than their images, that are no integers, or of a class that no public image has.
    """
    check_pixels("truth", truth, ("...", "h", "w", "c"))
    if gallery.ndim != 4 or gallery.shape[1:] != truth.shape[-3:]:
        wanted = ", ".join(map(str, truth.shape[-3:]))
        raise ValueError(f"gallery must have the shape (n, {wanted}) of the images of truth, got {gallery.shape}")
    if len(gallery):
        check_pixels("gallery", gallery, ("n", "h", "w", "c"))
    if (labels is None) != (gallery_labels is None):
        missing = "labels" if labels is None else "gallery_labels"
        raise ValueError(f"labels and gallery_labels must be given together, got no {missing}")
    truth, gallery = (np.asarray(images, np.promote_types(images.dtype, np.float32)) for images in (truth, gallery))
    flat = np.clip(truth, 0, 1).reshape(-1, *truth.shape[-3:])
    by_class: dict[str, np.ndarray] = {}
    if labels is not None and gallery_labels is not None:
        labels, gallery_labels = np.asarray(labels), np.asarray(gallery_labels)
        for name, given, images in (("labels", labels, truth), ("gallery_labels", gallery_labels, gallery)):
            if given.shape != images.shape[:-3]:
                raise ValueError(f"{name} must have the shape {images.shape[:-3]}, got {given.shape}")
            if not np.issubdtype(given.dtype, np.integer):
                raise ValueError(f"{name} must be class indices, integers, got {given.dtype}")
        unknown = np.setdiff1d(labels, gallery_labels)
        if unknown.size:
            raise ValueError(f"gallery_labels must have every class of labels, got none of {unknown.tolist()}")
        by_class = {name: np.empty_like(flat) for name in ("class mean", "nearest of the class")}
        for one in np.unique(labels):
            members, own = gallery[gallery_labels == one], labels.ravel() == one
            by_class["class mean"][own] = members.mean(0)
            by_class["nearest of the class"][own] = nearest(jnp.asarray(flat[own]), jnp.asarray(members))
    guesses = {"grey": np.full_like(flat, 0.5)}
    if len(gallery):
        guesses["data mean"] = np.broadcast_to(gallery.mean(0, dtype=np.float64), flat.shape)
        guesses["nearest image"] = np.asarray(nearest(jnp.asarray(flat), jnp.asarray(gallery)))
    guesses |= by_class
    with np.errstate(divide="ignore"):
        return {
            name: -10 * np.log10(np.mean((guess - flat) ** 2, (1, 2, 3))).reshape(truth.shape[:-3])
            for name, guess in guesses.items()
        }
