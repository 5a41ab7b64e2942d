"""Images: the unknowns are pixels in the model's own space, inside of the box of possible ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gia_jax import _check
from gia_jax.base import Batch, InitFn, Scalar
from gia_jax.data import ImageData
from gia_jax.matching import priors
from gia_jax.matching.initializations import normal
from gia_jax.matching.solver import box
from gia_jax.metrics.scores import baselines, score
from gia_jax.modalities.base import Modality, Scored, Shown, class_labels, reordered


def image(
    shape: Sequence[int],
    *,
    mean: Sequence[float] | np.ndarray | None = None,
    std: Sequence[float] | np.ndarray | None = None,
    in_range: bool = True,
    total_variation_weight: Scalar = 1e-4,
    init_fn: InitFn | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Modality:
    """Builds the modality of images that the model sees normalised: (pixels - mean) / std in each channel.

    Args:
        shape: Height, width and number of channels (h, w, c), each at least 1.
        mean: Mean of each channel that is subtracted from pixels in [0, 1], finite. None subtracts 0.
        std: Number that each channel is divided by, positive and finite. None divides by 1.
        in_range: Whether `mean` and `std` lead to pixels in [0, 1]. If they are not known to, unknowns have no bounds,
            and a picture shows every image that leaves [0, 1] rescaled by its own darkest and brightest entry.
        total_variation_weight: Weight of the total variation that is added to the objective, at least 0 and finite. It
            counts beside the objective in use: the default is one for squared distances of gradients. With 0 there is
            no prior.
        init_fn: Function `(key, observation) -> inputs` of the first pixels. None draws normal ones.
        dtype: Floating-point type of the model's inputs.

    Returns:
        The modality. Its scores are "psnr" in dB, "ssim", and "mse" of pixels in [0, 1], as `metrics.score` gives them.
        Its guesses are those of `metrics.baselines`, with those by class where all labels are class indices. `draw_fn`
        writes a PNG and needs matplotlib (the extra `demo`); there is none for images of other than 1 or 3 channels.

    Raises:
        ValueError: If `shape` is not of three positive integers, a mean is not finite, a deviation is not positive and
            finite, there is not one of them for each channel, the weight is negative or not finite, or `dtype` is no
            floating-point type.

    Examples:
        An attack on an image:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, clients, gradient_matching, modalities, observe, run
        >>> modality = modalities.image((2, 2, 1), mean=[0.5], std=[0.25], total_variation_weight=0.0)
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (4, 3))}
        >>> loss_fn = clients.cross_entropy(lambda params, x: x.reshape(len(x), -1) @ params["kernel"])
        >>> truth = Batch(jnp.array([2.0, -1.0, 0.0, 1.0]).reshape(1, 2, 2, 1), jnp.array([2]))
        >>> client_fn = clients.federated_sgd(loss_fn)
        >>> seen = observe(jax.random.key(1), ThreatModel(labels=True), client_fn, params, truth)
        >>> attack = gradient_matching(client_fn, **modality.matching())
        >>> found, _ = jax.jit(lambda key: run(attack, key, seen, num_steps=300))(jax.random.key(2))
        >>> bool(modality.score_fn(found.batch, truth).scores["psnr"][0] > 30)
        True
    """
    shape = _check.sizes("shape", shape)
    if len(shape) != 3:
        raise ValueError(f"shape must be (h, w, c), got {shape}")
    _check.floating(dtype)
    _check.functions(init_fn=init_fn)
    mean = np.zeros(shape[-1], np.float32) if mean is None else np.asarray(mean)
    std = np.ones(shape[-1], np.float32) if std is None else np.asarray(std)
    for name, values in (("mean", mean), ("std", std)):
        if values.shape != shape[-1:]:
            raise ValueError(f"{name} must be {shape[-1]} numbers, one for each channel, got {values.tolist()}")
        _check.finite(name, values)
    _check.positive(std=std)
    _check.weight(total_variation_weight=total_variation_weight)
    nothing = np.zeros((0, *shape), np.float32)
    data = ImageData("images", nothing, np.zeros(0, np.int32), (), (), mean.tolist(), std.tolist())
    has_prior = not _check.is_zero(total_variation_weight)
    prior_fn = priors.combine((total_variation_weight, priors.total_variation())) if has_prior else None

    def score_fn(found: Batch, truth: Batch) -> Scored:
        images, true = jnp.asarray(found.inputs), jnp.asarray(truth.inputs)
        is_one = true.ndim == 4
        if is_one:
            images, true = images[None], true[None]
        scores = score(Batch(images, ()), Batch(true, ()), data)
        named = {"psnr": scores.psnr, "ssim": scores.ssim, "mse": scores.mse}
        scored = Scored(named, reordered(Batch(images, ()), scores.assignment))
        return scored.of(0) if is_one else scored

    def guess_fn(truth: Batch, public: Batch) -> dict[str, np.ndarray]:
        pixels, gallery = (data.denormalize(np.asarray(batch.inputs)) for batch in (truth, public))
        labels, gallery_labels = class_labels(truth, pixels.shape[:-3]), class_labels(public, gallery.shape[:-3])
        if labels is None or gallery_labels is None:
            return baselines(pixels, gallery)
        return baselines(pixels, gallery, labels=labels, gallery_labels=gallery_labels)

    def pixels_fn(batch: Batch) -> tuple[np.ndarray, str]:
        inputs = np.asarray(batch.inputs).reshape(-1, *shape)
        return (np.nan_to_num(data.denormalize(inputs), nan=0.5), "") if in_range else _rescaled(inputs * std + mean)

    def draw_fn(
        columns: Mapping[str, Batch],
        path: Path,
        *,
        captions: Mapping[str, Sequence[str]] | None = None,
        title: str = "",
    ) -> None:
        from gia_jax.report.plots import picture_grid  # needs matplotlib

        seen = {name: pixels_fn(batch) for name, batch in columns.items()}
        title += max((note for _, note in seen.values()), default="")
        picture_grid({name: pixels for name, (pixels, _) in seen.items()}, path, captions=captions, title=title)

    has_colors = shape[-1] in (1, 3)
    return Modality(
        init_fn=normal() if init_fn is None else init_fn,
        decode_fn=Batch,
        project_fn=box(*data.bounds()) if in_range else None,
        prior_fn=prior_fn,
        like=jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
        score_fn=score_fn,
        shown={"psnr": Shown("PSNR", ".1f", " dB"), "ssim": Shown("SSIM", ".2f")},
        guess_fn=guess_fn,
        draw_fn=draw_fn if has_colors else None,
        pixels_fn=pixels_fn if has_colors else None,
    )


def _rescaled(images: np.ndarray) -> tuple[np.ndarray, str]:
    """Returns images in [0, 1], and a note if they were rescaled to that range."""
    images = np.nan_to_num(images, nan=0.5)
    if images.min() >= 0 and images.max() <= 1:
        return images, ""
    low, high = images.min((1, 2, 3), keepdims=True), images.max((1, 2, 3), keepdims=True)
    return np.clip((images - low) / np.where(high > low, high - low, 1), 0, 1), ", each rescaled to [0, 1]"
