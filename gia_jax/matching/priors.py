"""Priors, functions `(batch, observation) -> penalty` that are lower for images which the attacker finds plausible.

Images have shape (b, h, w, c) and are in the model's own space. All arithmetic is in float32 or wider.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gia_jax import _check
from gia_jax.base import Batch, Observation, Params, PriorFn, Scalar, Statistics
from gia_jax.lowering import lowered
from gia_jax.matching.initializations import as_granted
from gia_jax.precision import wide_dtype, widened, widened_tree
from gia_jax.threat import granted


def combine(*weighted_priors: tuple[Scalar, PriorFn]) -> PriorFn:
    """Adds priors, each times its weight: `combine((1e-2, total_variation()), (1e-6, norm()))`.

    Args:
        *weighted_priors: Pairs of a weight, at least 0 and finite, and a prior. Without any, the prior is 0.

    Returns:
        The prior.

    Raises:
        ValueError: If a weight is negative or not finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, Observation
        >>> from gia_jax.matching import priors
        >>> prior_fn = priors.combine((10.0, priors.norm()), (1.0, priors.norm(exponent=1.0)))
        >>> batch = Batch(2 * jnp.ones((1, 4)), jnp.array([0]))
        >>> print(f"{prior_fn(batch, Observation({}, {})):.2f}")
        22.00
    """
    for weight, _ in weighted_priors:
        _check.not_negative(weight=weight)
        _check.finite("weight", weight)

    def prior_fn(batch: Batch, observation: Observation) -> Float[Array, ""]:
        nothing = jnp.zeros((), _wide(batch))
        return jnp.asarray(sum((w * prior(batch, observation) for w, prior in weighted_priors), nothing))

    return prior_fn


def total_variation(
    *,
    inner_exponent: float = 1.0,
    outer_exponent: float = 1.0,
    color_opponents: bool = False,
    eps: float = 1e-8,
) -> PriorFn:
    """Builds the mean variation between neighbouring pixels.

    With p = q = 1 it is the anisotropic total variation of Inverting Gradients, mean |dx| + mean |dy|, each over the
    differences that exist. Otherwise it is the mean over pixels of ((|dx| + eps)^p + (|dy| + eps)^p)^q, over forward
    differences that are zero beyond the border. (p, q) = (2, 0.5) is isotropic, and (2, 1.25) is that of Wang et al.,
    Beyond Inferring Class Representatives, INFOCOM 2019.

    The last axis is taken for the channels. So attack a model of NCHW images as one of NHWC images, for example by
    `lambda params, x: apply_fn(params, jnp.moveaxis(x, -1, 1))`.

    Args:
        inner_exponent: Exponent p of each difference, positive and finite.
        outer_exponent: Exponent q of their sum, positive and finite.
        color_opponents: Whether to add the channels R-G, R-B and G-B. Images must then have three channels.
        eps: Number added to absolute differences where p and q are not both 1, so that roots have a derivative at 0, at
            least 0 and finite.

    Returns:
        The prior. It raises ValueError for inputs that are no images or, with `color_opponents`, not of three channels.

    Raises:
        ValueError: If an exponent is not positive and finite, or `eps` is negative or not finite.

    Examples:
        The left half of the image is 0 and the right half is 3. Of the 2 x 3 differences along rows 2 are 3, and those
        along columns are 0:

        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, Observation
        >>> from gia_jax.matching import priors
        >>> image = jnp.zeros((1, 2, 4, 1)).at[:, :, 2:].set(3)
        >>> print(f"{priors.total_variation()(Batch(image, jnp.array([0])), Observation({}, {})):.2f}")
        1.00
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


def patch_borders(patch_size: int) -> PriorFn:
    """Builds the jumps at the borders between square patches (Hatamizadeh et al., GradViT, CVPR 2022, the patch prior).

    The gradient of a vision transformer tells what is in the patches better than where they are. The prior is the sum
    over the horizontal and the vertical borders of the L2 norms of the differences of the pixels on both sides, which
    is low where patches continue each other. It does not see into the patches, as `total_variation` does. Of several
    images it is the mean, so that its weight does not depend on their number.

    Args:
        patch_size: Height and width of a patch in pixels, at least 1.

    Returns:
        The prior. It raises ValueError for inputs that are no images, or whose height or width is no multiple of
        `patch_size`.

    Raises:
        ValueError: If `patch_size` is no positive integer.

    Examples:
        The right patch is darker by 3 than the left one, in 4 rows: the border has the norm 6. The pixels within the
        patches do not count.

        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, Observation
        >>> from gia_jax.matching import priors
        >>> image = jnp.zeros((1, 4, 8, 1)).at[:, :, 4:].set(-3).at[:, 1, 1].set(5)
        >>> print(f"{priors.patch_borders(4)(Batch(image, jnp.array([0])), Observation({}, {})):.2f}")
        6.00
    """
    _check.integer(patch_size=patch_size)

    def jumps(images: Float[Array, "b n m c"]) -> Float[Array, ""]:
        """Returns the mean over images of the sum over the borders across the second axis."""
        before, after = images[:, patch_size - 1 : -1 : patch_size], images[:, patch_size::patch_size]
        lengths = optax.safe_norm(after - before, 1e-12, axis=(2, 3))
        return jnp.sum(lengths) / len(images)

    def prior_fn(batch: Batch, observation: Observation) -> Float[Array, ""]:
        del observation
        images = _images(batch)
        if images.shape[1] % patch_size or images.shape[2] % patch_size:
            raise ValueError(f"patch_size must divide the height and width {images.shape[1:3]}, got {patch_size}")
        return jumps(images) + jumps(images.swapaxes(1, 2))

    return prior_fn


def norm(*, exponent: float = 2.0) -> PriorFn:
    """Builds the mean of |x|^p / p over all pixels x, those of all arrays where the inputs are a tree.

    Args:
        exponent: Exponent p, positive and finite.

    Returns:
        The prior.

    Raises:
        ValueError: If `exponent` is not positive and finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, Observation
        >>> from gia_jax.matching import priors
        >>> batch = Batch(2 * jnp.ones((1, 4)), jnp.array([0]))
        >>> print(f"{priors.norm()(batch, Observation({}, {})):.2f}")
        2.00
    """
    _check.positive(exponent=exponent)
    _check.finite("exponent", exponent)

    def prior_fn(batch: Batch, observation: Observation) -> Float[Array, ""]:
        del observation
        leaves = [widened(leaf) for leaf in jax.tree.leaves(batch.inputs)]
        if len(leaves) == 1:
            return jnp.mean(jnp.abs(leaves[0]) ** exponent) / exponent
        total = sum((jnp.sum(jnp.abs(leaf) ** exponent) for leaf in leaves), jnp.zeros((), _wide(batch)))
        return total / (exponent * sum(leaf.size for leaf in leaves))

    return prior_fn


def orthogonality(batch: Batch, observation: Observation) -> Float[Array, ""]:
    """Computes the sum over pairs i != j of the mean of (x_i * x_j)^2, which keeps the images of a batch apart
    (Qian and Hansen, What can we learn from gradients?, 2020).

    Args:
        batch: Dummy batch.
        observation: Observation of the attack, which is not used.

    Returns:
        The sum, at least 0. It is 0 where no two images are nonzero at the same place.

    Examples:
        The two inputs share one of four pixels, and each of the two ordered pairs counts 1/4:

        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, Observation
        >>> from gia_jax.matching import priors
        >>> batch = Batch(jnp.array([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]), jnp.array([0, 1]))
        >>> print(f"{priors.orthogonality(batch, Observation({}, {})):.2f}")
        0.50
    """
    del observation
    size = _check.examples(batch.inputs)
    flat = [widened(leaf).reshape(size, -1) for leaf in jax.tree.leaves(batch.inputs)]
    squares = jnp.square(jnp.concatenate(flat, 1))
    pairs = squares @ squares.T / squares.shape[1]
    return jnp.sum(pairs) - jnp.trace(pairs)


def order_invariant(
    num_epochs: int,
    *,
    aggregate_fn: Callable[[Float[Array, "n *d"]], Float[Array, "..."]] | None = None,
    exponent: float = 2.0,
) -> PriorFn:
    """Builds the distance of what the epochs of a client hold, whatever the order of the examples in each
    (Dimitrov et al., Data Leakage in Federated Averaging, TMLR 2022, the epoch order-invariant prior).

    The batch has the examples of one epoch after the other, X_1, ..., X_E, and the prior is

        1 / E^2 * sum over e, f of  mean |g(X_e) - g(X_f)|^p

    for an aggregate g that does not depend on the order of the examples. The mean is over the entries of g.

    Args:
        num_epochs: Number E of epochs, at least 1, a divisor of the batch's size.
        aggregate_fn: Aggregate g, a function `examples -> features` of the examples of one epoch, shape (n, *d), or of
            one array of a tree of inputs. By default it is the mean over the examples. `lambda x: jnp.max(x, 0)` is
            another one of the paper.
        exponent: Exponent p, at least 1 and finite. The paper has 2 and 1.

    Returns:
        The prior. It raises ValueError if the batch's size is not a multiple of `num_epochs`.

    Raises:
        ValueError: If `num_epochs` is no positive integer, `aggregate_fn` no function, or `exponent` below 1 or not
            finite.

    Examples:
        The second epoch has the examples of the first in another order, and the third has others:

        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, Observation
        >>> from gia_jax.matching import priors
        >>> examples = jnp.array([[1.0], [3.0], [3.0], [1.0]])
        >>> print(f"{priors.order_invariant(2)(Batch(examples, jnp.zeros(4)), Observation({}, {})):.2f}")
        0.00
        >>> examples = jnp.concatenate([examples, jnp.array([[5.0], [5.0]])])
        >>> print(f"{priors.order_invariant(3)(Batch(examples, jnp.zeros(6)), Observation({}, {})):.2f}")
        4.00
    """
    _check.integer(num_epochs=num_epochs)
    _check.functions(aggregate_fn=aggregate_fn)
    _check.finite("exponent", exponent)
    if exponent < 1:
        raise ValueError(f"exponent must be at least 1, got {exponent}")
    of_epoch_fn = (lambda examples: jnp.mean(examples, 0)) if aggregate_fn is None else aggregate_fn

    def of_one(leaf: Float[Array, "b *d"]) -> Float[Array, ""]:
        epochs = widened(leaf).reshape(num_epochs, -1, *leaf.shape[1:])
        features = jax.vmap(of_epoch_fn)(epochs)
        apart = jnp.abs(features[:, None] - features)
        return jnp.mean(jnp.square(apart) if exponent == 2 else apart**exponent)

    def prior_fn(batch: Batch, observation: Observation) -> Float[Array, ""]:
        del observation
        size = _check.examples(batch.inputs)
        if size % num_epochs:
            raise ValueError(f"num_epochs must divide the batch's size {size}, got {num_epochs}")
        return sum(map(of_one, jax.tree.leaves(batch.inputs)), jnp.zeros((), _wide(batch)))

    return prior_fn


def denoised(denoise_fn: Callable[[Float[Array, "b h w c"]], Float[Array, "b h w c"]]) -> PriorFn:
    """Builds the distance of images from what a denoiser makes of them, (mean over pixels of (x - D(x))^2) / 2
    (Romano, Elad and Milanfar, The Little Engine that Could: Regularization by Denoising (RED), SIAM J. Imaging
    Sciences 2017).

    D(x) counts as a constant, so the derivative is that of RED, (x - D(x)) / pixels: an attack moves towards the
    denoised images, and never differentiates the denoiser. A denoiser that was trained on images like the victim's
    knows them better than a total variation does. Departure: the penalty of RED is x (x - D(x)) / 2, which is no
    distance and can be negative.

    Args:
        denoise_fn: Function `images -> images` D in the model's own space, which keeps the shape. For `models.FFDNet`
            on pixels it is `lambda x: normalize(denoiser(denormalize(x), noise))`. The level of the noise that it
            removes is a setting of the attack, like the weight of the prior.

    Returns:
        The prior. It raises ValueError for inputs that are no images, and where D changes their shape.

    Raises:
        ValueError: If `denoise_fn` is no function.

    Examples:
        A denoiser that halves the contrast moves a pixel of 3 by 3 / 2, and the mean is over four pixels:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, Observation
        >>> from gia_jax.matching import priors
        >>> prior_fn, images = priors.denoised(lambda x: x / 2), jnp.full((1, 2, 2, 1), 3.0)
        >>> slope = jax.grad(lambda x: prior_fn(Batch(x, jnp.array([0])), Observation({}, {})))(images)
        >>> print(f"{slope[0, 0, 0, 0]:.3f}")
        0.375
    """
    _check.functions(denoise_fn=denoise_fn)
    fast_fn = lowered(denoise_fn)

    def prior_fn(batch: Batch, observation: Observation) -> Float[Array, ""]:
        del observation
        images = _images(batch)
        target = jax.lax.stop_gradient(fast_fn(jax.lax.stop_gradient(images)))
        if target.shape != images.shape:
            raise ValueError(f"denoise_fn must keep the shape of images, {images.shape}, got {target.shape}")
        return jnp.mean(jnp.square(images - widened(target))) / 2

    return prior_fn


def batch_norm_statistics(
    statistics_fn: Callable[[Params, Any], Statistics],
    target_fn: Callable[[Observation], Statistics] | None = None,
    *,
    first_layer_weight: Scalar = 10.0,
) -> PriorFn:
    """Builds the distance of the dummy batch's feature statistics from known ones
    (Yin et al., DeepInversion, CVPR 2020, equation 4; GradInversion, CVPR 2021, equation 9).

    Args:
        statistics_fn: Function `(params, inputs) -> statistics` to the mean and the biased variance of the input of
            every batch-normalisation layer.
        target_fn: Function `(observation) -> statistics` to those to match. By default the threat model grants them,
            observation.extra["statistics"].
        first_layer_weight: Weight of the first layer, at least 0 and finite. Every other layer has weight 1.

    Returns:
        The prior: the weighted sum over layers of the L2 distances (not squared) of the means and of the variances. It
        raises ValueError where the statistics are not granted or are not those of the model's layers.

    Raises:
        ValueError: If `first_layer_weight` is negative or not finite.

    Examples:
        The mean is at distance 5 from the known one, the variance agrees, and the first layer counts ten times:

        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, Observation
        >>> from gia_jax.matching import priors
        >>> def statistics_fn(params, inputs):
        ...     return [(inputs.mean(0), inputs.var(0))]
        >>> observation = Observation({}, {}, {"statistics": [(jnp.zeros(2), jnp.ones(2))]})
        >>> batch = Batch(jnp.array([[2.0, 3.0], [4.0, 5.0]]), jnp.array([0, 1]))
        >>> print(f"{priors.batch_norm_statistics(statistics_fn)(batch, observation):.2f}")
        50.00
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
        total = jnp.zeros((), _wide(batch))
        for layer, ((mean, variance), (mean_target, variance_target)) in enumerate(zip(simulated, wanted, strict=True)):
            distance = _length(mean - mean_target) + _length(variance - variance_target)
            total += distance * (first_layer_weight if layer == 0 else 1)
        return total

    return prior_fn


def _length(vector: Float[Array, " f"]) -> Float[Array, ""]:
    """Returns the L2 norm of a vector, with a derivative of 0 where the vector is 0."""
    return optax.safe_norm(vector, 1e-12)


def _wide(batch: Batch) -> jnp.dtype:
    """Returns the type that the inputs are computed with, float32 or wider."""
    return wide_dtype(jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(batch.inputs))))


def _images(batch: Batch) -> Float[Array, "b h w c"]:
    """Returns the inputs in float32 or wider; raises ValueError if they are not images."""
    _check.one_array("batch.inputs", batch.inputs)
    if batch.inputs.ndim != 4:
        raise ValueError(f"batch.inputs must be images of shape (b, h, w, c), got {batch.inputs.shape}")
    return widened(batch.inputs)
