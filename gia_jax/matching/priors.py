"""What the attacker believes about images: `(batch, observation) -> ` scalar, lower is more plausible.

Images are (b, h, w, c) in the model's own space. All arithmetic is in float32 or wider.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gia_jax import _check
from gia_jax.base import Batch, Observation, Params, PriorFn, Statistics
from gia_jax.lowering import lowered
from gia_jax.matching.initializations import as_granted
from gia_jax.precision import wide_dtype, widened, widened_tree
from gia_jax.threat import granted


def combine(*weighted_priors: tuple[float, PriorFn]) -> PriorFn:
    """The sum of priors, each times its weight: `combine((1e-2, total_variation()), (1e-6, norm()))`."""
    for weight, _ in weighted_priors:
        _check.not_negative(weight=weight)
        _check.finite("weight", weight)

    def prior_fn(batch: Batch, observation: Observation) -> Float[Array, ""]:
        nothing = jnp.zeros((), wide_dtype(batch.inputs.dtype))
        return sum((w * prior(batch, observation) for w, prior in weighted_priors), nothing)

    return prior_fn


def total_variation(
    *, inner_exponent: float = 1.0, outer_exponent: float = 1.0, color_opponents: bool = False, eps: float = 1e-8
) -> PriorFn:
    """Mean variation between neighbouring pixels, mean of (|dx|^p)^q plus mean of (|dy|^p)^q for p = q = 1.

    With p = q = 1 it is the anisotropic total variation of Inverting Gradients, mean |dx| + mean |dy|; otherwise the
    mean over pixels of ((|dx| + eps)^p + (|dy| + eps)^p)^q over forward differences that are zero beyond the border:
    (p, q) = (2, 0.5) is isotropic, (2, 1.25) that of Wang et al., Beyond Inferring Class Representatives, INFOCOM 2019.

    Args:
        inner_exponent: Exponent p of each difference, > 0 and finite.
        outer_exponent: Exponent q of their sum, > 0 and finite.
        color_opponents: Whether to add the channels R-G, R-B and G-B; images must have three channels.
        eps: Number added to differences, so that roots have a derivative at 0, >= 0 and finite.

    Returns:
        The prior.

    Raises:
        ValueError: An exponent that is not positive and finite, or an `eps` that is negative or not finite; when
            called, inputs that are no images or, with `color_opponents`, not of three channels.
    """
    _check.positive(inner_exponent=inner_exponent, outer_exponent=outer_exponent)
    _check.finite("inner_exponent", inner_exponent)
    _check.finite("outer_exponent", outer_exponent)
    _check.not_negative(eps=eps)
    _check.finite("eps", eps)

    def prior_fn(batch: Batch, observation: Observation) -> Float[Array, ""]:
        del observation
        images = _images(batch)
        if color_opponents:
            if images.shape[-1] != 3:
                raise ValueError(f"color_opponents needs three channels, got {images.shape[-1]}")
            red, green, blue = images[..., :1], images[..., 1:2], images[..., 2:]
            images = jnp.concatenate([images, red - green, red - blue, green - blue], -1)
        down, across = jnp.diff(images, axis=1), jnp.diff(images, axis=2)
        if inner_exponent == outer_exponent == 1:
            # An image one pixel high or wide has no neighbours there: the mean over none is 0.
            return sum((jnp.sum(jnp.abs(d)) / max(d.size, 1) for d in (down, across)), jnp.zeros((), images.dtype))
        down = jnp.pad(down, ((0, 0), (0, 1), (0, 0), (0, 0)))
        across = jnp.pad(across, ((0, 0), (0, 0), (0, 1), (0, 0)))
        inner = (jnp.abs(down) + eps) ** inner_exponent + (jnp.abs(across) + eps) ** inner_exponent
        return jnp.mean(inner**outer_exponent)

    return prior_fn


def norm(*, exponent: float = 2.0) -> PriorFn:
    """Mean of |x|^p / p over all pixels."""
    _check.positive(exponent=exponent)
    _check.finite("exponent", exponent)

    def prior_fn(batch: Batch, observation: Observation) -> Float[Array, ""]:
        del observation
        return jnp.mean(jnp.abs(widened(batch.inputs)) ** exponent) / exponent

    return prior_fn


def orthogonality(batch: Batch, observation: Observation) -> Float[Array, ""]:
    """Sum over pairs i != j of the mean of (x_i * x_j)^2: keeps the images of a batch apart
    (Qian and Hansen, What can we learn from gradients?, 2020).
    """
    del observation
    squares = jnp.square(widened(batch.inputs).reshape(batch.inputs.shape[0], -1))
    pairs = squares @ squares.T / squares.shape[1]
    return jnp.sum(pairs) - jnp.trace(pairs)


def batch_norm_statistics(
    statistics_fn: Callable[[Params, Float[Array, "b *d"]], Statistics],
    target_fn: Callable[[Observation], Statistics] | None = None,
    *,
    first_layer_weight: float = 10.0,
) -> PriorFn:
    """Distance of the dummy batch's feature statistics from known ones
    (Yin et al., DeepInversion, CVPR 2020, equation 4; GradInversion, CVPR 2021, equation 9).

    Args:
        statistics_fn: `(params, inputs) -> ` mean and biased variance of every batch-normalisation layer's input.
        target_fn: Reads from the observation the statistics to match. None takes what the threat model grants,
            observation.extra["statistics"].
        first_layer_weight: Weight of the first layer, >= 0 and finite; the others count once.

    Returns:
        The prior: the sum over layers of the L2 distances (not squared) of means and of variances.
    """
    _check.not_negative(first_layer_weight=first_layer_weight)
    _check.finite("first_layer_weight", first_layer_weight)
    target_fn, fast_fn = target_fn or (lambda observation: granted(observation, "statistics")), lowered(statistics_fn)

    def prior_fn(batch: Batch, observation: Observation) -> Float[Array, ""]:
        inputs = as_granted(batch.inputs, observation)
        simulated, wanted = widened_tree(fast_fn(observation.params, inputs)), widened_tree(target_fn(observation))
        if len(simulated) != len(wanted) or not simulated:
            raise ValueError(f"statistics must have one entry a layer, got {len(wanted)} for {len(simulated)} layers")
        _check.same_structure("statistics", wanted, "the model's", simulated)
        total = jnp.zeros((), wide_dtype(batch.inputs.dtype))
        for layer, ((mean, variance), (mean_target, variance_target)) in enumerate(zip(simulated, wanted, strict=True)):
            distance = _length(mean - mean_target) + _length(variance - variance_target)
            total += distance * (first_layer_weight if layer == 0 else 1)
        return total

    return prior_fn


def _length(vector: Float[Array, " f"]) -> Float[Array, ""]:
    return optax.safe_norm(vector, 1e-12)


def _images(batch: Batch) -> Float[Array, "b h w c"]:
    if batch.inputs.ndim != 4:
        raise ValueError(f"batch.inputs must be images of shape (b, h, w, c), got {batch.inputs.shape}")
    return widened(batch.inputs)
