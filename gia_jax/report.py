"""Numbers for people: scores of a study against the truth, baselines, a table, and valid JSON."""

import json
import math
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PRNGKeyArray

from gia_jax.base import Batch, Observation
from gia_jax.data import ImageData
from gia_jax.metrics import image_scores, label_overlap, nearest
from gia_jax.metrics.images import as_pixels
from gia_jax.study import Study


class Scores(NamedTuple):
    """Of every victim (batch): PSNR, SSIM and MSE of each image, shape (v, b), labels right in [0, 1], shape (v,), and
    the reconstructed images in the order of the true ones, shape (v, b, h, w, c).
    """

    psnr: np.ndarray
    ssim: np.ndarray
    mse: np.ndarray
    label_correct: np.ndarray
    images: np.ndarray


def score(reconstructed: Batch, truth: Batch, data: ImageData) -> Scores:
    """Scores of reconstructions in the model's space against the truth in it, leading axis of victims.

    Pixels are clipped to [0, 1], and NaN counts as 0.5.
    """

    def one(r: Batch, t: Batch) -> tuple[Any, Any, Any]:
        pixels, true_pixels = (x * jnp.asarray(data.std) + jnp.asarray(data.mean) for x in (r.inputs, t.inputs))
        scores = image_scores(pixels.astype(jnp.float32), jnp.clip(true_pixels, 0, 1).astype(jnp.float32))
        matched = as_pixels(pixels[scores.assignment])
        mse = jnp.mean(jnp.square(matched - true_pixels), (1, 2, 3))
        return scores._replace(mse=mse), label_overlap(r.labels, t.labels), matched

    scores, labels, images = jax.jit(jax.vmap(one))(reconstructed, truth)
    mse = np.asarray(scores.mse)
    with np.errstate(divide="ignore"):
        psnr = -10 * np.log10(mse)
    return Scores(psnr, np.asarray(scores.ssim), mse, np.asarray(labels), np.asarray(images))


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
        gallery: Public images of the same kind, none of them a victim, shape (n, h, w, c).
        labels: The class of each true image, shape (...); None where it is not known.
        gallery_labels: The class of each public image, shape (n,); with `labels` only.

    Returns:
        "grey" (0.5 everywhere), "data mean" (the gallery's mean image) and "nearest image" (the gallery's closest
        to the truth: an oracle); with labels "class mean" and "nearest of the class" (an oracle too).

    Raises:
        ValueError: Labels of one kind only, of another shape than their images, or of a class that no public image has.
    """
    if (labels is None) != (gallery_labels is None):
        missing = "labels" if labels is None else "gallery_labels"
        raise ValueError(f"labels and gallery_labels must be given together, got no {missing}")
    flat = truth.reshape(-1, *truth.shape[-3:])
    by_class: dict[str, np.ndarray] = {}
    if labels is not None and gallery_labels is not None:
        labels, gallery_labels = np.asarray(labels), np.asarray(gallery_labels)
        for name, given, images in (("labels", labels, truth), ("gallery_labels", gallery_labels, gallery)):
            if given.shape != images.shape[:-3]:
                raise ValueError(f"{name} must have the shape {images.shape[:-3]}, got {given.shape}")
        unknown = np.setdiff1d(labels, gallery_labels)
        if unknown.size:
            raise ValueError(f"gallery_labels must have every class of labels, got none of {unknown.tolist()}")
        by_class = {name: np.empty_like(flat) for name in ("class mean", "nearest of the class")}
        for one in np.unique(labels):
            members, own = gallery[gallery_labels == one], labels.ravel() == one
            by_class["class mean"][own] = members.mean(0)
            by_class["nearest of the class"][own] = nearest(jnp.asarray(flat[own]), jnp.asarray(members))
    guesses = {
        "grey": np.full_like(flat, 0.5),
        "data mean": np.broadcast_to(gallery.mean(0), flat.shape),
        "nearest image": np.asarray(nearest(jnp.asarray(flat), jnp.asarray(gallery))),
        **by_class,
    }
    with np.errstate(divide="ignore"):
        return {
            name: -10 * np.log10(np.mean((guess - flat) ** 2, (1, 2, 3))).reshape(truth.shape[:-3])
            for name, guess in guesses.items()
        }


def random_updates(key: PRNGKeyArray, observations: Observation) -> Observation:
    """Observations whose updates are noise, each leaf with the norm of the true one: what an attack makes of its prior
    alone.
    """

    def one(key: PRNGKeyArray, update: Any) -> Any:
        # One draw for all leaves: the random bits of each would be a program of their own.
        flat, unravel = ravel_pytree(update)
        noise = unravel(jax.random.normal(key, flat.shape, flat.dtype))
        return jax.tree.map(lambda n, u: n * jnp.linalg.norm(u) / jnp.linalg.norm(n), noise, update)

    victims = jax.tree.leaves(observations.update)[0].shape[0]
    return observations._replace(update=jax.vmap(one)(jax.random.split(key, victims), observations.update))


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
    """Of Python and the packages that numbers depend on."""
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
    """Valid JSON: an infinite or undefined number becomes the string "inf", "-inf" or "nan", which `float` reads."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, (float, np.floating)):
            return float(value) if math.isfinite(value) else str(float(value))
        return int(value) if isinstance(value, np.integer) else value

    return json.dumps(plain(content), indent=2, allow_nan=False) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text columns: the first flush left, the others flush right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths)))
        return "  ".join((first, *rest)).rstrip()

    return "\n".join([line(header), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, rows)])
