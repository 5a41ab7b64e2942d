"""Scores of many victims at once, and guesses that use no gradient to compare them with."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gia_jax.base import Batch
from gia_jax.data import ImageData
from gia_jax.metrics.images import as_pixels, check_pixels, image_scores, nearest
from gia_jax.metrics.labels import are_classes, label_overlap
from gia_jax.precision import widened


class Scores(NamedTuple):
    """Scores of the reconstructed images of v victims with b images each.

    Attributes:
        psnr: Peak signal-to-noise ratio of each image in dB, shape (v, b). It is infinite for an exact reconstruction.
        ssim: Structural similarity of each image, at most 1, shape (v, b).
        mse: Mean squared error of the pixels of each image, in [0, 1], shape (v, b).
        label_correct: Share of the labels of each victim that were recovered, in [0, 1], shape (v,). It is NaN where
            labels are not compared.
        images: Reconstructed images in the order of the true ones, pixels in [0, 1], shape (v, b, h, w, c).
        assignment: Index of the reconstructed image that is assigned to each true one, shape (v, b).
    """

    psnr: np.ndarray
    ssim: np.ndarray
    mse: np.ndarray
    label_correct: np.ndarray
    images: np.ndarray
    assignment: np.ndarray


def score(reconstructed: Batch, truth: Batch, data: ImageData) -> Scores:
    """Scores the reconstructed images of several victims against the true ones, in float32 or wider.

    Each reconstructed image is compared with the true image that it is assigned to, for an attack does not know the
    order of a batch.

    Args:
        reconstructed: Reconstructed batches of v victims, with normalised inputs of shape (v, b, h, w, c). Their pixels
            are clipped to [0, 1], and a pixel that is NaN counts as 0.5.
        truth: True batches of the same shape, as `ImageData.normalize` returns them.
        data: Set of images whose mean and standard deviation, one number for each channel, undo the normalisation.

    Returns:
        The scores, in pixels of [0, 1]. Labels are compared if they are class indices (v, b) or probabilities
        (v, b, c), and the share of right labels is NaN otherwise.

    Raises:
        ValueError: If the inputs have different shapes or are integers, true pixels are outside of [0, 1], the mean or
            the standard deviation is not one number for each channel, or labels are not one for each image.

    Examples:
        Images are the same whatever their order, and one of the two labels is right:

        >>> import numpy as np
        >>> from gia_jax import Batch, data
        >>> from gia_jax.metrics.scores import score
        >>> pixels = np.stack([np.zeros((11, 11, 1), np.float32), np.ones((11, 11, 1), np.float32)])
        >>> images = data.ImageData("two", pixels, np.array([0, 1]), ["a", "b"], ["a", "b"], mean=[0.5], std=[0.5])
        >>> inputs = images.normalize(pixels)[None]
        >>> scores = score(Batch(inputs[:, ::-1], np.array([[0, 0]])), Batch(inputs, np.array([[0, 1]])), images)
        >>> scores.mse.tolist(), scores.label_correct.tolist()
        ([[0.0, 0.0]], [0.5])
    """
    for name, inputs in (("truth.inputs", truth.inputs), ("reconstructed.inputs", reconstructed.inputs)):
        check_pixels(name, inputs, ("v", "b", "h", "w", "c"), in_range=False)
        if inputs.shape != truth.inputs.shape:
            raise ValueError(f"{name} must have the shape {truth.inputs.shape} of truth.inputs, got {inputs.shape}")
    for name, values in (("mean", data.mean), ("std", data.std)):
        if np.shape(values) != truth.inputs.shape[-1:]:
            channels = truth.inputs.shape[-1]
            raise ValueError(f"data.{name} must have {channels} numbers, one for each channel, got {values}")
    compared = are_classes(reconstructed.labels, truth.labels)
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
    return Scores(psnr, ssim, mse, np.asarray(overlap), np.asarray(matched), np.asarray(found.assignment))


def baselines(
    truth: np.ndarray,
    gallery: np.ndarray,
    *,
    labels: np.ndarray | None = None,
    gallery_labels: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Computes the PSNR of guesses that use no gradient, with which an attack's PSNR is to be compared.

    The guesses are, by their names in the result:

    * "grey": pixels of 0.5 everywhere;
    * "data mean": the mean of the public images;
    * "nearest image": the public image closest to the true one. Nobody can make this guess without the true image;
    * "class mean": the mean of the public images of the same class, where labels are given;
    * "nearest of the class": the closest public image of the same class, where labels are given. Nobody can make this
      guess without the true image either.

    Args:
        truth: True images, pixels in [0, 1], shape (..., h, w, c).
        gallery: Public images of the same kind, none of them a victim's, pixels in [0, 1], shape (n, h, w, c). With
            n = 0 the only guess is "grey".
        labels: Class index of each true image, shape (...). None is for classes that are not known.
        gallery_labels: Class index of each public image, shape (n,). It is given if `labels` are.

    Returns:
        The PSNR in dB of every guess by its name, of the shape (...) of `truth` without the axes of an image. It is
        infinite for a guess that equals the truth.

    Raises:
        ValueError: If images are integers, are outside of [0, 1] or differ in shape, if only one of `labels` and
            `gallery_labels` is given, or if labels are no integers, are not one for each image, or are of a class that
            no public image has.

    Examples:
        A white image is guessed from a grey and a lighter one:

        >>> import numpy as np
        >>> from gia_jax.metrics.scores import baselines
        >>> gallery = np.stack([np.full((2, 2, 1), 0.5), np.full((2, 2, 1), 0.9)])
        >>> for name, psnr in baselines(np.ones((1, 2, 2, 1)), gallery).items():
        ...     print(f"{name}: {psnr[0]:.1f} dB")
        grey: 6.0 dB
        data mean: 10.5 dB
        nearest image: 20.0 dB
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
