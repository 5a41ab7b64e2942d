"""R-GAP: the input of a network from its gradient, layer by layer in closed form.

Zhu and Blaschko, R-GAP: Recursive Gradient Attack on Privacy, ICLR 2021. Where this departs from the paper:

* Twins. Without biases, x and s x have the same gradient, s = (1 + e^mu2) / (1 + e^mu1) for the two roots mu of the
  loss inversion. No residual tells them apart, only the range of pixels does. Both are returned.
* Three outputs or more have no twins, unless all wrong logits are equal: their softmax fixes the scale.
* Rank. It is computed, not counted: `rank_analysis`.
* Residual blocks take two stages: what the first convolution tells is known once the second one's input is.
* The label is not assumed: a wrong one contradicts the gradient.
* Convolutions are solved by normal equations with iterative refinement, in float64; the stacked matrix is not formed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gia_jax import _check
from gia_jax.attacks.constraints import (
    Known,
    convolution_system,
    first_convolution_system,
    pull_back,
    second_convolution_system,
    solve,
    through_activation,
)
from gia_jax.attacks.rank_analysis import LayerRank, check_network, check_parameters, counted_ranks
from gia_jax.base import Batch, Observation, Params, ReconstructFn, Reconstruction, Updates
from gia_jax.matching.initializations import as_granted, granted_like
from gia_jax.matching.solver import box
from gia_jax.models.network import (
    Convolution,
    FullyConnected,
    Layer,
    Network,
    Shape,
    apply_layer,
    output_shape,
    shapes,
)
from gia_jax.precision import wide_dtype

# The maximum of mu / (1 + e^mu) is at 1 + W(1 / e); its two roots lie on the two sides.
TURNING_POINT = 1.2784645427610738


class Twins(NamedTuple):
    """The inputs that explain one update, and which of them an attacker believes.

    Attributes:
        inputs: Reconstructions for the smaller and the larger root, shape (2, *d); the same twice where there is one.
        label: Class index.
        margins: Log-odds of the label at each, shape (2,): the roots mu of the loss inversion.
        fits: Whether each stays in the box, shape (2,).
        chosen: Index of the larger root that fits, or of the one that leaves the box least.
        is_ambiguous: Whether there are two and both fit.
        residual: The largest relative residual of a layer's constraints.
    """

    inputs: Float[Array, "2 *d"]
    label: Int[Array, ""]
    margins: Float[Array, "2"]
    fits: Bool[Array, "2"]
    chosen: Int[Array, ""]
    is_ambiguous: Bool[Array, ""]
    residual: Float[Array, ""]


TwinsFn = Callable[[Observation], Twins]


def r_gap(
    network: Network,
    *,
    bounds: tuple[ArrayLike, ArrayLike],
    tolerance: float = 1e-3,
    ranks: Sequence[LayerRank] | None = None,
) -> ReconstructFn:
    """The attack: of the two twins, the one that the box of pixel values allows.

    Threat model: an honest-but-curious server that knows the parameters, the update, the shape of an example and the
    range of pixels. One example; the loss is `cross_entropy`, or `binary_cross_entropy` for a head of one output.

    Args:
        network: With a bias in its head, or with three classes or more, it may have biases and any activation;
            otherwise no biases, a homogeneous activation, and a hidden layer.
        bounds: Lowest and highest pixel values in the model's space, scalars or of shape (c,).
        tolerance: How far a pixel may leave the box, relative to its width, >= 0 and finite.
        ranks: Ranks of the layers' constraints, from `rank_analysis`. Default: their number, `counted_ranks`, an
            upper bound that takes no time.

    Returns:
        `(key, observation) -> reconstruction`; the key is not used. Its loss is the largest relative residual of a
        layer's constraints. It raises ValueError for a batch of more than one example, without float64, for parameters
        of another network, and for a layer, by its name, whose rank is below the number of its unknowns.

    Raises:
        ValueError: A network whose head leaves its input open, a tolerance that is negative or not finite, or bounds
            that are not finite or in the wrong order.
    """
    twins_fn = r_gap_twins(network, bounds=bounds, tolerance=tolerance)

    def reconstruct_fn(key: PRNGKeyArray, observation: Observation) -> Reconstruction:
        del key
        like = granted_like(observation)
        for name, unknowns, rank in counted_ranks(network, like.shape[1:]) if ranks is None else ranks:
            if rank < unknowns:
                most, least = ("at most ", "at least ") if ranks is None else ("", "")
                raise ValueError(
                    f"layer {name!r} cannot be inverted: {unknowns} unknowns, {most}{rank} independent constraints, "
                    f"{least}{unknowns - rank} are missing"
                )
        twins = twins_fn(observation)
        inputs = as_granted(twins.inputs[twins.chosen][None], observation)
        finite = jnp.all(jnp.isfinite(inputs)) & jnp.isfinite(twins.residual)
        return Reconstruction(Batch(inputs, twins.label[None]), twins.residual.astype(wide_dtype(like.dtype)), finite)

    return reconstruct_fn


def r_gap_twins(network: Network, *, bounds: tuple[ArrayLike, ArrayLike], tolerance: float = 1e-3) -> TwinsFn:
    """Both candidates, also for a network that has too few constraints.

    Args:
        network: The network, as for `r_gap`.
        bounds: Lowest and highest pixel values, as for `r_gap`.
        tolerance: How far a pixel may leave the box, as for `r_gap`.

    Returns:
        `observation -> twins`. It raises ValueError as `r_gap` does, but for ranks.

    Raises:
        ValueError: The same arguments as those that `r_gap` refuses.
    """
    _check.not_negative(tolerance=tolerance)
    _check.finite("tolerance", tolerance)
    project_fn = box(*bounds)
    _check.finite("bounds", bounds)
    check_network(network)

    def twins_fn(observation: Observation) -> Twins:
        like = granted_like(observation)
        if like.shape[0] != 1:
            raise ValueError(f"r_gap needs a batch of one example, got {like.shape[0]}")
        check_parameters(network, observation.params, like.shape[1:])
        params, update = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (observation.params, observation.update))
        backwards = list(zip(network.hidden, shapes(network, like.shape[1:])[:-1], strict=True))[::-1]

        def walk(head: _Head, layers: list[tuple[Layer, Shape]]) -> tuple[Array, Array]:
            x, cotangent, residual = head.inputs, head.cotangent, head.residual
            for layer, shape in layers:
                z = network.activation.inverse_fn(x.reshape(output_shape(layer, shape)))
                k = through_activation(network.activation, z, cotangent)
                known = Known(params, update, network.activation, shape, z, k)
                x, misfit = _invert_layer(layer, known)
                cotangent, residual = pull_back(layer, known, x), jnp.maximum(residual, misfit)
            return x, residual

        heads = _invert_head(network.head, params, update)
        # The inverse activation is not odd: where the head's input has the wrong sign, the layer before contradicts it.
        misfits = jnp.stack([walk(head, backwards[:1])[1] for head in heads])
        head = jax.tree.map(lambda *leaves: jnp.stack(leaves)[jnp.argmin(misfits)], *heads)
        x, residual = walk(head, backwards)
        inputs = jnp.stack([x, head.scale * x]).reshape(2, *like.shape[1:])
        width = jnp.asarray(bounds[1], x.dtype) - jnp.asarray(bounds[0], x.dtype)
        excess = jnp.max((jnp.abs(inputs - project_fn(inputs)) / width).reshape(2, -1), 1)
        fits = excess <= tolerance
        chosen = jnp.where(fits[1], 1, jnp.where(fits[0], 0, jnp.argmin(excess)))
        return Twins(inputs, head.label, head.margins, fits, chosen, jnp.all(fits) & (head.scale > 1), residual)

    return twins_fn


class _Head(NamedTuple):
    """What the last layer tells, for one hypothesis about the label.

    Attributes:
        inputs: Inputs of the layer, for the smaller root.
        cotangent: Gradient of the loss with respect to them.
        scale: Factor by which the larger root multiplies them, >= 1.
        margins: Both roots.
        label: The class.
        residual: Relative residual of the head's gradient.
    """

    inputs: Float[Array, " d"]
    cotangent: Float[Array, " d"]
    scale: Float[Array, ""]
    margins: Float[Array, "2"]
    label: Int[Array, ""]
    residual: Float[Array, ""]


def _invert_head(layer: FullyConnected, params: Params, update: Updates) -> list[_Head]:
    """All hypotheses: two where only the next layer can tell the label."""
    weights, gradient = params[layer.name]["kernel"], update[layer.name]["kernel"]
    if layer.bias:
        k = update[layer.name]["bias"]  # the cotangent of the output itself
        x = gradient @ k / jnp.vdot(k, k)
        label = jnp.argmin(k) if len(k) > 1 else (k[0] < 0).astype(jnp.argmin(k).dtype)
        return [_softmax_hypothesis(x, k, weights, x @ weights + params[layer.name]["bias"], label, gradient)]
    if layer.features > 2:
        return [_softmax_head(weights, gradient)]
    if layer.features == 2:  # the logistic loss of the difference of the two outputs
        weights, gradient = weights[:, 1] - weights[:, 0], (gradient[:, 1] - gradient[:, 0]) / 2
    return [_logistic_hypothesis(weights.reshape(-1), gradient.reshape(-1), label) for label in (0, 1)]


def _logistic_hypothesis(weights: Float[Array, " d"], gradient: Float[Array, " d"], label: int) -> _Head:
    """The gradient is -y x / (1 + e^mu): the roots give x up to its sign y."""
    margins = loss_inversion(-jnp.vdot(gradient, weights))
    factors = 1 + jnp.exp(margins)
    sign = 2 * label - 1
    x, cotangent = -sign * factors[0] * gradient, -sign / factors[0] * weights
    return _Head(x, cotangent, factors[1] / factors[0], margins, jnp.asarray(label), jnp.zeros(()))


def loss_inversion(value: Float[Array, ""]) -> Float[Array, "2"]:
    """The roots mu of mu / (1 + e^mu) = value, where mu = y z and value = -<gradient, weights> of a logistic head.

    Args:
        value: One root, returned twice, where it is not positive; two below 0.2785. No example has a larger value: it
            gives the turning point twice.

    Returns:
        Both roots in ascending order, exact to rounding.
    """

    def bisect(low: Array, high: Array, slope: int) -> Array:
        def halve(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
            middle = (bracket[0] + bracket[1]) / 2
            above = slope * (middle / (1 + jnp.exp(middle)) - value) > 0
            return jnp.where(above, bracket[0], middle), jnp.where(above, middle, bracket[1])

        return jax.lax.fori_loop(0, 100, halve, (low, high))[0]

    turning = jnp.full_like(value, TURNING_POINT)
    # |mu| = |value| (1 + e^mu) bounds the first two; the last grows as log(1 / value).
    negative = bisect(2 * value, value, 1)
    small = bisect(jnp.zeros_like(value), turning, 1)
    large = bisect(turning, 4 - 2 * jnp.log(jnp.where(value > 0, jnp.minimum(value, 1), 1)), -1)
    return jnp.where(value > 0, jnp.stack([small, large]), negative)


def _softmax_head(weights: Float[Array, "d c"], gradient: Float[Array, "d c"]) -> _Head:
    """The gradient is x k^T with k = softmax(W^T x) - e_label; from three classes on, one scale alone is consistent."""
    left, values, right = jnp.linalg.svd(gradient, full_matrices=False)
    label = jnp.argmax(jnp.abs(right[0]))  # |k_label| is the sum of all others
    sign = -jnp.sign(right[0, label])
    direction, ray = sign * right[0], sign * values[0] * left[:, 0]
    logits, is_label = ray @ weights, jnp.arange(len(direction)) == label

    def misfit(log_scale: Array) -> Array:
        scale = jnp.exp(log_scale)
        return scale * (jax.nn.softmax(scale * logits) - is_label) - direction

    def newton(_: Any, log_scale: Array) -> Array:
        value, slope = jax.jvp(misfit, (log_scale,), (jnp.ones_like(log_scale),))
        return log_scale - jnp.vdot(slope, value) / jnp.vdot(slope, slope)

    # Of all wrong classes j, log k_j = scale * logits_j + constant: a line, fitted with the weights k_j.
    tiny = jnp.finfo(ray.dtype).tiny
    shares = jnp.where(is_label, 0, jnp.maximum(direction, tiny)) / -direction[label]
    centred = logits - jnp.vdot(shares, logits)
    slope = jnp.vdot(shares * centred, jnp.log(jnp.maximum(shares, tiny))) / jnp.vdot(shares, jnp.square(centred))
    scale = jnp.exp(jax.lax.fori_loop(0, 20, newton, jnp.log(jnp.maximum(slope, tiny))))
    return _softmax_hypothesis(scale * ray, direction / scale, weights, scale * logits, label, gradient)


def _softmax_hypothesis(
    x: Float[Array, " d"],
    k: Float[Array, " c"],
    weights: Float[Array, "d c"],
    logits: Float[Array, " c"],
    label: Int[Array, ""],
    gradient: Float[Array, "d c"],
) -> _Head:
    others = jnp.where(jnp.arange(len(k)) == label, -jnp.inf, logits)
    margin = logits[label] - jax.nn.logsumexp(others) if len(k) > 1 else (2 * label - 1) * logits[0]
    residual = jnp.linalg.norm(gradient - jnp.outer(x, k)) / jnp.linalg.norm(gradient)
    return _Head(x, weights @ k, jnp.ones(()), jnp.stack([margin, margin]), label, residual)


def _invert_layer(layer: Layer, known: Known) -> tuple[Float[Array, "*d"], Float[Array, ""]]:
    """The layer's input and the relative residual of the constraints on it."""
    if isinstance(layer, FullyConnected):
        gradient = known.update[layer.name]["kernel"]
        x = (gradient @ known.k / jnp.vdot(known.k, known.k)).reshape(known.shape)
        misfit = apply_layer(layer, known.activation, known.params, x[None])[0] - known.z
        return x, jnp.linalg.norm(misfit) / jnp.linalg.norm(known.z)
    if isinstance(layer, Convolution):
        (x,), residual = solve(convolution_system(layer, known))
        return x.reshape(known.shape), residual
    (middle, _), first_residual = solve(second_convolution_system(layer, known))
    middle = middle.reshape(output_shape(layer.first, known.shape))
    (x,), residual = solve(first_convolution_system(layer, known, middle))
    return x.reshape(known.shape), jnp.maximum(first_residual, residual)
