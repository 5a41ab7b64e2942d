"""Numbers for people: scores of a study against the truth, baselines, a table, and valid JSON."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray

from gia_jax.base import Batch, Observation
from gia_jax.data import ImageData
from gia_jax.metrics import image_scores, label_overlap, nearest
from gia_jax.metrics.images import as_pixels, check_pixels
from gia_jax.precision import widened, widened_tree
from gia_jax.study import Study


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

    def pixels(inputs: Array) -> Array:
        return widened(inputs) * jnp.asarray(data.std) + jnp.asarray(data.mean)

    def one(inputs: Array, images: Array, labels: tuple[Array, Array] | None) -> tuple[Any, Any, Any]:
        scores = image_scores(pixels(inputs), images)
        overlap = jnp.full((), jnp.nan) if labels is None else label_overlap(*labels)
        return scores, overlap, as_pixels(pixels(inputs))[scores.assignment]

    # Checked in the type of the inputs, because the rounding of bfloat16 takes pixels farther out of [0, 1].
    images = pixels(jnp.asarray(truth.inputs))
    check_pixels("denormalised truth.inputs", images.astype(truth.inputs.dtype), ("v", "b", "h", "w", "c"))
    labels = (reconstructed.labels, truth.labels) if compared else None
    found, overlap, matched = jax.jit(jax.vmap(one))(reconstructed.inputs, jnp.clip(images, 0, 1), labels)
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


def random_updates(key: PRNGKeyArray, observations: Observation) -> Observation:
    """Observations whose updates are noise, each leaf with the norm of the true one: what an attack makes of its prior
    alone.

    Args:
        key: Key of the noise, of which every victim gets its own.
        observations: Observations with a leading axis of victims, of floating-point updates.

    Returns:
        The observations, each leaf of their updates in its own type; a leaf of zeros is zeros, and one with a NaN or an
        infinity is NaN.

    Raises:
        ValueError: There are no updates, or one is of integers or has not the axis of the same victims.
    """
    leaves = jax.tree.leaves_with_path(observations.update)
    if not leaves:
        raise ValueError("observations.update must have leaves, got none")
    victims = jnp.shape(leaves[0][1])[:1]
    for path, leaf in leaves:
        name = f"observations.update{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{name} must be of a floating type, got {leaf.dtype}")
        if not leaf.shape or leaf.shape[:1] != victims:
            raise ValueError(f"{name} must have a leading axis of the {victims} victims, got the shape {leaf.shape}")

    def one(key: PRNGKeyArray, update: Any) -> Any:
        # One draw for all leaves: the random bits of each would be a program of their own.
        flat, unravel = ravel_pytree(widened_tree(update))
        return jax.tree.map(_of_norm, unravel(jax.random.normal(key, flat.shape, flat.dtype)), update)

    return observations._replace(update=jax.vmap(one)(jax.random.split(key, victims[0]), observations.update))


def _of_norm(noise: Array, leaf: Array) -> Array:
    """The noise with the norm of a leaf, in the leaf's type; entries are scaled before they are squared."""
    wide = widened(leaf)
    largest = jnp.max(jnp.abs(wide), initial=0)
    norm = jnp.linalg.norm(wide / jnp.where(largest > 0, largest, 1))
    scaled = noise * (norm / jnp.maximum(jnp.linalg.norm(noise), jnp.finfo(noise.dtype).tiny)) * largest
    return scaled.astype(leaf.dtype)


def results(
    study: Study, scores: Scores, *, settings: dict[str, Any], threat_model: str, extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of results.json: settings, threat model, versions, hardware, cost, and a record for every victim."""
    r = study.reconstruction
    victims = [
        {
            "psnr": float(np.mean(scores.psnr[v])),
            "ssim": float(np.mean(scores.ssim[v])),
            "mse": float(np.mean(scores.mse[v])),
            "psnr_per_image": scores.psnr[v].tolist(),
            "label_correct": float(scores.label_correct[v]),
            "loss": float(r.loss[v]),
            "is_finite": bool(r.is_finite[v]),
            "restart_losses": np.asarray(r.restart_losses[v]).tolist(),
        }
        for v in range(len(scores.psnr))
    ]
    return {
        "settings": settings,
        "threat_model": threat_model,
        "versions": versions(),
        "hardware": hardware(),
        **study.timing._asdict(),
        **(extra or {}),
        "victims": victims,
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that numbers depend on."""
    names = ("gia-jax", "jax", "jaxlib", "flax", "optax", "numpy", "dm-pix")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def hardware() -> str:
    """The devices, and on a CPU its model and cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = models[0] if models else model
        return f"{len(models)} cores of {model}"
    return model


def to_json(content: Any) -> str:
    """Valid JSON: an infinite or undefined number becomes the string "inf", "-inf" or "nan", which `float` reads.

    Arrays of NumPy and JAX become lists, sets become lists in the order of their text, paths become text, and so do the
    keys of mappings.

    Raises:
        ValueError: A value has no counterpart in JSON, or two keys have the same text.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            found = {key if isinstance(key, str) else str(plain(key)): plain(item) for key, item in value.items()}
            if len(found) < len(value):
                raise ValueError(f"content must have keys of different text, got {list(value)}")
            return found
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, (set, frozenset)):
            return [plain(item) for item in sorted(value, key=str)]
        is_array = isinstance(value, (np.ndarray, np.generic, jax.Array)) and not isinstance(value, (float, str))
        if is_array and not jnp.issubdtype(value.dtype, jax.dtypes.extended):
            return plain(np.asarray(value).tolist())
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else str(float(value))
        if isinstance(value, Path):
            return str(value)
        if value is None or isinstance(value, (bool, int, str)):
            return value
        raise ValueError(f"content must be of numbers, text, lists and mappings, got {type(value).__name__}")

    return json.dumps(plain(content), indent=2, allow_nan=False) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text columns: the first flush left, the others flush right.

    Raises:
        ValueError: A row has another number of cells than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"rows must have {len(header)} cells like the header, got {len(row)} in {list(row)}")
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths)))
        return "  ".join((first, *rest)).rstrip()

    return "\n".join([line(header), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, rows)])
