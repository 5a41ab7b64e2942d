"""R-GAP, an attack that finds the input of a network from its gradient, layer by layer in closed form.

Zhu and Blaschko, R-GAP: Recursive Gradient Attack on Privacy, ICLR 2021. It departs from the paper as follows:

* Twins. Without biases, x and s x have the same gradient, s = (1 + e^mu2) / (1 + e^mu1) for the two roots mu of the
  loss inversion. No residual tells them apart, only the range of pixels does. Both are returned.
* Three outputs or more have no twins, unless all wrong logits are equal: their softmax fixes the scale.
* Rank. It is computed, not counted: `rank_analysis`.
* Residual blocks take two stages: what the first convolution tells is known once the second one's input is.
* The label is not assumed: a wrong one contradicts the gradient.
* Convolutions are solved by normal equations with iterative refinement, in float64. The stacked matrix is not formed.
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
        inputs: Reconstructions for the smaller and the larger root, shape (2, *d). They are the same where there is
            only one.
        label: Class index that was found.
        margins: Log-odds of the label at each reconstruction, shape (2,). They are the roots mu of the loss inversion.
        fits: Whether each reconstruction stays in the box, shape (2,).
        chosen: Index of the larger root that fits, or of the one that leaves the box least.
        is_ambiguous: Whether there are two reconstructions and both fit.
        residual: Largest relative residual of a layer's constraints.

    Examples:
        A box of pixels from 0 to 1 allows only the first of two reconstructions:

        >>> import jax.numpy as jnp
        >>> from gia_jax import attacks
        >>> twins = attacks.Twins(
        ...     inputs=jnp.array([[0.18, 0.55], [0.5, 1.5]]),
        ...     label=jnp.array(1),
        ...     margins=jnp.array([0.73, 2.0]),
        ...     fits=jnp.array([True, False]),
        ...     chosen=jnp.array(0),
        ...     is_ambiguous=jnp.array(False),
        ...     residual=jnp.array(0.0),
        ... )
        >>> [round(value, 2) for value in twins.inputs[twins.chosen].tolist()]
        [0.18, 0.55]
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
    """Builds the R-GAP attack, which returns the one of the two twins that the box of pixel values allows.

    Threat model: an honest-but-curious server that knows the parameters, the update, the shape of an example and the
    range of pixels. The batch is one example, and the loss is `cross_entropy`, or `binary_cross_entropy` for a head of
    one output.

    Args:
        network: Network that is attacked. With a bias in its head, or with three classes or more, it may have biases
            and any activation. Otherwise it needs a homogeneous activation and a hidden layer, and must have no biases.
        bounds: Lowest and highest pixel values in the model's space, as scalars or arrays of shape (c,).
        tolerance: Distance by which a pixel may leave the box, relative to the box's width, at least 0 and finite.
        ranks: Ranks of the layers' constraints, from `rank_analysis`. By default they are counted by `counted_ranks`,
            an upper bound that takes no time.

    Returns:
        A function `(key, observation) -> reconstruction`, which does not use the key. Its loss is the largest relative
        residual of a layer's constraints. It raises ValueError for a batch of more than one example, without float64,
        for parameters of another network, and for a layer, by its name, whose rank is below the number of its unknowns.

    Raises:
        ValueError: If the network's head leaves its input open, `tolerance` is negative or not finite, or the bounds
            are not finite or in the wrong order.

    Examples:
        A softmax of three classes has no twins, so the input is found exactly:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, models, observe
        >>> head = models.FullyConnected("head", 3, bias=True)
        >>> network = models.Network((models.FullyConnected("dense", 4),), head)
        >>> client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(network.apply)))
        >>> with jax.enable_x64(True):
        ...     params = network.init(jax.random.key(0), (2,))
        ...     batch = Batch(jnp.array([[0.5, -0.25]]), jnp.array([1]))
        ...     seen = observe(jax.random.key(1), ThreatModel(), client_fn, params, batch)
        ...     found = jax.jit(attacks.r_gap(network, bounds=(-1.0, 1.0)))(jax.random.key(2), seen)
        >>> [round(value, 3) for value in found.batch.inputs[0].tolist()], found.batch.labels.tolist()
        ([0.5, -0.25], [1])
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
    """Builds the part of R-GAP that returns both candidates, also for a network that has too few constraints.

    Args:
        network: Network that is attacked. With a bias in its head, or with three classes or more, it may have biases
            and any activation. Otherwise it needs a homogeneous activation and a hidden layer, and must have no biases.
        bounds: Lowest and highest pixel values in the model's space, as scalars or arrays of shape (c,).
        tolerance: Distance by which a pixel may leave the box, relative to the box's width, at least 0 and finite.

    Returns:
        A function `(observation) -> twins`. It raises ValueError for a batch of more than one example, without float64,
        and for parameters of another network.

    Raises:
        ValueError: If the network's head leaves its input open, `tolerance` is negative or not finite, or the bounds
            are not finite or in the wrong order.

    Examples:
        A head of one output without a bias leaves two inputs. Both are in the box, so no attacker can tell them apart:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, models, observe
        >>> network = models.Network((models.FullyConnected("dense", 2),), models.FullyConnected("head", 1))
        >>> client_fn = jax.jit(clients.federated_sgd(clients.binary_cross_entropy(network.apply)))
        >>> with jax.enable_x64(True):
        ...     params = {"dense": {"kernel": jnp.eye(2)}, "head": {"kernel": jnp.array([[1.0], [1.0]])}}
        ...     batch = Batch(jnp.array([[0.5, 1.5]]), jnp.array([1]))
        ...     seen = observe(jax.random.key(0), ThreatModel(), client_fn, params, batch)
        ...     twins = jax.jit(attacks.r_gap_twins(network, bounds=(0.0, 2.0)))(seen)
        >>> [[round(value, 2) for value in twin] for twin in twins.inputs.tolist()], bool(twins.is_ambiguous)
        ([[0.18, 0.55], [0.5, 1.5]], True)
    """
    _check.not_negative(tolerance=tolerance)
    _check.finite("tolerance", tolerance)
    _check.limits("bounds", bounds)
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
    """Hypothesis about the label, and what follows from it about the last layer.

    Attributes:
        inputs: Input of the head, for the smaller root.
        cotangent: Gradient of the loss with respect to that input.
        scale: Factor from the input for the smaller root to that for the larger one.
        margins: Log-odds of the label for the two roots.
        label: Class index.
        residual: Relative misfit of the head's gradient.
    """

    inputs: Float[Array, " d"]
    cotangent: Float[Array, " d"]
    scale: Float[Array, ""]
    margins: Float[Array, "2"]
    label: Int[Array, ""]
    residual: Float[Array, ""]


def _invert_head(layer: FullyConnected, params: Params, update: Updates) -> list[_Head]:
    """Inverts the last layer, under both hypotheses about the label where only the next layer can tell them apart."""
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
    """Inverts a logistic head for one label.

    The gradient is -y x / (1 + e^mu), so the roots give x up to its sign y.
    """
    margins = loss_inversion(-jnp.vdot(gradient, weights))
    factors = 1 + jnp.exp(margins)
    sign = 2 * label - 1
    x, cotangent = -sign * factors[0] * gradient, -sign / factors[0] * weights
    return _Head(x, cotangent, factors[1] / factors[0], margins, jnp.asarray(label), jnp.zeros(()))


def loss_inversion(value: Float[Array, ""]) -> Float[Array, "2"]:
    """Computes the roots mu of mu / (1 + e^mu) = value.

    For a logistic head mu = y z, and value = -<gradient, weights>.

    Args:
        value: Right side of the equation. Up to 0 it has one root, which is returned twice, and between 0 and 0.2785
            two. No example gives a larger value. For one, the turning point is returned twice.

    Returns:
        The two roots in ascending order, exact to rounding.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from gia_jax.attacks.r_gap import loss_inversion
        >>> roots = jax.jit(loss_inversion)(jnp.array(0.2))
        >>> [round(value, 3) for value in (roots / (1 + jnp.exp(roots))).tolist()], bool(roots[0] < roots[1])
        ([0.2, 0.2], True)
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
    """Inverts a softmax head without a bias.

    The gradient is x k^T with k = softmax(W^T x) - e_label. From three classes on, one scale alone is consistent.
    """
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
    """Gathers what follows from the input x of a softmax head and from the gradient k of its logits."""
    others = jnp.where(jnp.arange(len(k)) == label, -jnp.inf, logits)
    margin = logits[label] - jax.nn.logsumexp(others) if len(k) > 1 else (2 * label - 1) * logits[0]
    residual = jnp.linalg.norm(gradient - jnp.outer(x, k)) / jnp.linalg.norm(gradient)
    return _Head(x, weights @ k, jnp.ones(()), jnp.stack([margin, margin]), label, residual)


def _invert_layer(layer: Layer, known: Known) -> tuple[Float[Array, "*d"], Float[Array, ""]]:
    """Returns the input of a hidden layer, and the relative residual of the constraints on it."""
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
