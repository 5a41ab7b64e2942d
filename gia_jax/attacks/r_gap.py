"""R-GAP: the input of a network from its gradient, layer by layer in closed form.

Zhu and Blaschko, R-GAP: Recursive Gradient Attack on Privacy, ICLR 2021. Where this departs from the paper:

* Twins. Without biases, x and s x have the same gradient, s = (1 + e^mu2) / (1 + e^mu1) for the two roots mu of the
  loss inversion. No residual tells them apart, only the range of pixels does. Both are returned.
* Rank. The constraints of a convolution with f filters depend on each other: sum_u W[f', u] K[(f, u)] =
  sum_p k_f(p) W[(f', p)] for every pair of filters. The rank is therefore computed, not counted.
* Residual blocks take two stages: what the first convolution tells is known once the second one's input is.
* The label is not assumed: a wrong one contradicts the gradient.
* Convolutions are solved by normal equations with iterative refinement, in float64; the stacked matrix is not formed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gia_jax import _check
from gia_jax.attacks.constraints import Operator, System, convolution_operator, identity_operator, normal_matrix, solve
from gia_jax.base import Batch, Observation, Params, ReconstructFn, Reconstruction, Updates
from gia_jax.models.network import (
    Activation,
    Convolution,
    FullyConnected,
    Layer,
    Network,
    Residual,
    Shape,
    apply_layer,
    output_shape,
    shapes,
)
from gia_jax.threat import granted

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


class LayerRank(NamedTuple):
    """Whether the input of a layer follows from the layer's gradient and output.

    Attributes:
        name: Of the layer.
        unknowns: Values to find.
        rank: Of the constraints on them.
    """

    name: str
    unknowns: int
    rank: int


def r_gap(network: Network, *, bounds: tuple[ArrayLike, ArrayLike], tolerance: float = 1e-3) -> ReconstructFn:
    """The attack: of the two twins, the one that the box of pixel values allows.

    Threat model: an honest-but-curious server that knows the parameters, the update, the shape of an example and the
    range of pixels. One example; the loss is `cross_entropy`, or `binary_cross_entropy` for a head of one output.

    Args:
        network: With a bias in its head, or with three classes or more, it may have biases and any activation;
            otherwise no biases, a homogeneous activation, and a hidden layer.
        bounds: Lowest and highest pixel values in the model's space, scalars or of shape (c,).
        tolerance: By how much a pixel may leave the box, relative to its width, >= 0.

    Returns:
        `(key, observation) -> reconstruction`; the key is not used. Its loss is the largest relative residual of a
        layer's constraints. It raises ValueError for a batch of more than one example, without float64, for a network
        of another kind, and for a layer, by its name, whose constraints are fewer than its unknowns. Constraints enough
        in number may still depend on each other: ask `rank_analysis`.
    """
    twins_fn = r_gap_twins(network, bounds=bounds, tolerance=tolerance)

    def reconstruct_fn(key: PRNGKeyArray, observation: Observation) -> Reconstruction:
        del key
        like = granted(observation, "inputs_like")
        for name, unknowns, rank in counted_ranks(network, like.shape[1:]):
            if rank < unknowns:
                raise ValueError(
                    f"layer {name!r} cannot be inverted: {unknowns} unknowns, at most {rank} independent constraints, "
                    f"{unknowns - rank} are missing"
                )
        twins = twins_fn(observation)
        inputs = twins.inputs[twins.chosen][None].astype(like.dtype)
        finite = jnp.all(jnp.isfinite(inputs)) & jnp.isfinite(twins.residual)
        return Reconstruction(Batch(inputs, twins.label[None]), twins.residual.astype(like.dtype), finite)

    return reconstruct_fn


def r_gap_twins(network: Network, *, bounds: tuple[ArrayLike, ArrayLike], tolerance: float = 1e-3) -> TwinsFn:
    """Both candidates, also for a network that has too few constraints.

    Args:
        network: As for `r_gap`.
        bounds: As for `r_gap`.
        tolerance: As for `r_gap`.

    Returns:
        `observation -> twins`. It raises ValueError as `r_gap` does, but for the number of constraints.
    """
    _check.not_negative(tolerance=tolerance)
    _check_network(network)

    def twins_fn(observation: Observation) -> Twins:
        like = granted(observation, "inputs_like")
        if like.shape[0] != 1:
            raise ValueError(f"r_gap needs a batch of one example, got {like.shape[0]}")
        _check_parameters(network, observation.params, like.shape[1:])
        params, update = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (observation.params, observation.update))
        backwards = list(zip(network.hidden, shapes(network, like.shape[1:])[:-1], strict=True))[::-1]

        def walk(head: _Head, layers: list[tuple[Layer, Shape]]) -> tuple[Array, Array]:
            x, cotangent, residual = head.inputs, head.cotangent, head.residual
            for layer, shape in layers:
                z = network.activation.inverse_fn(x.reshape(output_shape(layer, shape)))
                k = _through_activation(network.activation, z, cotangent)
                known = _Known(params, update, network.activation, shape, z, k)
                x, misfit = _invert_layer(layer, known)
                cotangent, residual = _pull_back(layer, known, x), jnp.maximum(residual, misfit)
            return x, residual

        heads = _invert_head(network.head, params, update)
        # The inverse activation is not odd: where the head's input has the wrong sign, the layer before contradicts it.
        misfits = jnp.stack([walk(head, backwards[:1])[1] for head in heads])
        head = jax.tree.map(lambda *leaves: jnp.stack(leaves)[jnp.argmin(misfits)], *heads)
        x, residual = walk(head, backwards)
        inputs = jnp.stack([x, head.scale * x]).reshape(2, *like.shape[1:])
        low, high = (jnp.asarray(bound, x.dtype) for bound in bounds)
        excess = jnp.max((jnp.maximum(low - inputs, inputs - high) / (high - low)).reshape(2, -1), 1)
        fits = excess <= tolerance
        chosen = jnp.where(fits[1], 1, jnp.where(fits[0], 0, jnp.argmin(excess)))
        return Twins(inputs, head.label, head.margins, fits, chosen, jnp.all(fits) & (head.scale > 1), residual)

    return twins_fn


def _check_network(network: Network) -> None:
    head = network.head
    if head.bias or head.features > 2:
        return
    # Such a head leaves the scale and the sign of its input open.
    parts = [part for layer in network.hidden for part in (layer if isinstance(layer, Residual) else [layer])]
    biased = [part.name for part in parts if part is not None and part.bias]
    if biased:
        raise ValueError(f"layer {biased[0]!r} has a bias: the head {head.name!r} needs one too")
    if not network.activation.is_homogeneous:
        raise ValueError(f"the activation is not homogeneous: the head {head.name!r} needs a bias")
    if not network.hidden:
        raise ValueError(f"there is no hidden layer: the head {head.name!r} needs a bias")


def _check_parameters(network: Network, params: Params, input_shape: Shape) -> None:
    if jnp.result_type(float) != jnp.float64:
        raise ValueError(f"r_gap needs float64: set jax_enable_x64, got {jnp.result_type(float)}")
    expected = jax.eval_shape(lambda: network.init(jax.random.key(0), input_shape))
    _check.same_structure("params", params, "the network", expected)


class _Head(NamedTuple):
    """What the last layer tells, for one hypothesis about the label.

    Attributes:
        inputs: Of the layer, for the smaller root.
        cotangent: Gradient of the loss with respect to them.
        scale: By which the larger root multiplies them, >= 1.
        margins: Both roots.
        label: The class.
        residual: Relative, of the head's gradient.
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


class _Known(NamedTuple):
    """What the recursion knows when it comes to a layer.

    Attributes:
        params: All parameters.
        update: Their gradient.
        activation: After the layer.
        shape: Of the layer's input.
        z: The layer's output, before the activation.
        k: Gradient of the loss with respect to z.
    """

    params: Params
    update: Updates
    activation: Activation
    shape: Shape
    z: Float[Array, "*e"]
    k: Float[Array, "*e"]


def _invert_layer(layer: Layer, known: _Known) -> tuple[Float[Array, "*d"], Float[Array, ""]]:
    """The layer's input and the relative residual of the constraints on it."""
    if isinstance(layer, FullyConnected):
        gradient = known.update[layer.name]["kernel"]
        x = (gradient @ known.k / jnp.vdot(known.k, known.k)).reshape(known.shape)
        misfit = apply_layer(layer, known.activation, known.params, x[None])[0] - known.z
        return x, jnp.linalg.norm(misfit) / jnp.linalg.norm(known.z)
    if isinstance(layer, Convolution):
        (x,), residual = solve(_convolution_system(layer, known))
        return x.reshape(known.shape), residual
    (middle, _), first_residual = solve(_second_convolution_system(layer, known))
    middle = middle.reshape(output_shape(layer.first, known.shape))
    (x,), residual = solve(_first_convolution_system(layer, known, middle))
    return x.reshape(known.shape), jnp.maximum(first_residual, residual)


def _through_activation(activation: Activation, z: Array, cotangent: Array) -> Array:
    return jax.jvp(activation.fn, (z,), (cotangent.reshape(z.shape),))[1]


def _pull_back(layer: Layer, known: _Known, x: Array) -> Array:
    """Gradient of the loss with respect to the layer's input x."""

    def output(x: Array) -> Array:
        return apply_layer(layer, known.activation, known.params, x[None])[0]

    return jax.vjp(output, x)[1](known.k)[0]


def _convolution_system(layer: Convolution, known: _Known) -> System:
    output = ([convolution_operator(layer, known.params, known.shape)], _rows(known.z - _bias(layer, known)))
    gradient = (convolution_operator(layer, known.update, known.shape), _rows(known.k))
    return System((_size(known.shape),), [output], [gradient])


def _second_convolution_system(layer: Residual, known: _Known) -> System:
    """Constraints on the input of the second convolution, and on the block's input, which need not be determined."""
    middle = output_shape(layer.first, known.shape)
    second = convolution_operator(layer.second, known.params, middle)
    short, bias, gradients = _shortcut(layer, known, unknown=1)
    gradients = [(convolution_operator(layer.second, known.update, middle), _rows(known.k)), *gradients]
    outputs = [([second, short], _rows(known.z - _bias(layer.second, known) - bias))]
    return System((_size(middle), _size(known.shape)), outputs, gradients)


def _first_convolution_system(layer: Residual, known: _Known, middle: Float[Array, "h w c"]) -> System:
    """Constraints on the block's input once the input of the second convolution is known."""
    z = known.activation.inverse_fn(middle)
    k = _through_activation(known.activation, z, _pull_back(layer.second, known, middle))
    rest = known.z - apply_layer(layer.second, known.activation, known.params, middle[None])[0]
    first = _convolution_system(layer.first, known._replace(z=z, k=k))
    short, bias, gradients = _shortcut(layer, known, unknown=0)
    return System(first.sizes, [*first.outputs, ([short], _rows(rest - bias))], [*first.gradients, *gradients])


def _shortcut(
    layer: Residual, known: _Known, unknown: int
) -> tuple[Operator, Array | int, list[tuple[Operator, Array]]]:
    """Its operator, its bias, and its gradient constraints."""
    if layer.shortcut is None:
        return identity_operator(known.shape, unknown), 0, []
    gradient = convolution_operator(layer.shortcut, known.update, known.shape, unknown)
    short = convolution_operator(layer.shortcut, known.params, known.shape, unknown)
    return short, _bias(layer.shortcut, known), [(gradient, _rows(known.k))]


def _bias(layer: Convolution, known: _Known) -> Array | int:
    return known.params[layer.name]["bias"] if layer.bias else 0


def _rows(image: Float[Array, "h w c"]) -> Float[Array, "p c"]:
    return image.reshape(-1, image.shape[-1])


def _size(shape: Shape) -> tuple[int, int]:
    return shape[0] * shape[1], shape[2]


def rank_analysis(
    network: Network, params: Params, input_shape: Shape, *, key: PRNGKeyArray, tolerance: float = 1e-6
) -> tuple[LayerRank, ...]:
    """Whether R-GAP recovers an input exactly, told before any attack: the rank of every layer's constraints.

    Recovery is exact where every layer has the rank of its unknowns. The constraints depend on the example through the
    cotangents, their rank hardly ever does: it is taken at one random example.

    Args:
        network: As for `r_gap`.
        params: Its parameters.
        input_shape: Of an example.
        key: Draws the example.
        tolerance: Singular values below this fraction of a layer's largest are taken for zeros. At least 1e-7: they are
            roots of the eigenvalues of the normal equations.

    Returns:
        The layers in the order of the recursion, from the output: the first one of too small a rank is the bottleneck.
        A residual block has two entries, named after its second and its first convolution.

    Raises:
        ValueError: As for `r_gap`, but for the number of constraints.
    """
    if not 1e-7 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [1e-7, 1), got {tolerance}")
    _check_network(network)
    _check_parameters(network, params, input_shape)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    # Compiled as one: the matrices take hundreds of small operations, each for its own shapes.
    matrices = jax.jit(functools.partial(_constraint_matrices, network, input_shape))(params, key)
    bounds = counted_ranks(network, input_shape)
    ranks = []
    for bound, matrix in zip(bounds, matrices, strict=True):
        rank = bound.unknowns
        if matrix is not None:
            values = np.asarray(matrix)
            rank = _rank(values, tolerance)
            if len(values) > bound.unknowns:  # there are others, which need not be determined
                rank -= _rank(values[bound.unknowns :, bound.unknowns :], tolerance)
        ranks.append(bound._replace(rank=rank))
    return tuple(ranks)


def _constraint_matrices(
    network: Network, input_shape: Shape, params: Params, key: PRNGKeyArray
) -> list[Float[Array, "n n"] | None]:
    """Normal equations in the order of the recursion; None for dense layers, whose gradient gives away their input."""
    key_inputs, key_outputs = jax.random.split(key)
    inputs = jax.random.normal(key_inputs, (1, *input_shape))
    cotangent = jax.random.normal(key_outputs, (network.head.features,))
    update = jax.grad(lambda p: jnp.vdot(network.apply(p, inputs)[0], cotangent))(params)
    passed: list[tuple[Layer, Array, Array]] = []
    for layer in network.hidden:
        z = apply_layer(layer, network.activation, params, inputs)
        passed.append((layer, inputs[0], z[0]))
        inputs = network.activation.fn(z)
    cotangent = params[network.head.name]["kernel"] @ cotangent
    systems: list[System | None] = [None]
    for layer, x, z in reversed(passed):
        k = _through_activation(network.activation, z, cotangent)
        known = _Known(params, update, network.activation, x.shape, z, k)
        if isinstance(layer, FullyConnected):
            systems.append(None)
        elif isinstance(layer, Convolution):
            systems.append(_convolution_system(layer, known))
        else:
            middle = network.activation.fn(apply_layer(layer.first, network.activation, params, x[None])[0])
            systems.append(_second_convolution_system(layer, known))
            systems.append(_first_convolution_system(layer, known, middle))
        cotangent = _pull_back(layer, known, x)
    return [None if system is None else normal_matrix(system)[0] for system in systems]


def _rank(matrix: np.ndarray, tolerance: float) -> int:
    try:  # a Cholesky factor, where there is one, proves full rank at a tenth of the eigenvalues' cost
        np.linalg.cholesky(matrix - tolerance**2 * np.linalg.norm(matrix, np.inf) * np.eye(len(matrix)))
        return len(matrix)
    except np.linalg.LinAlgError:
        values = np.linalg.eigvalsh(matrix)
        return int(np.sum(values > tolerance**2 * values[-1]))


def counted_ranks(network: Network, input_shape: Shape) -> tuple[LayerRank, ...]:
    """Upper bounds on the ranks from the architecture alone; where they are too small, `rank_analysis` is not needed.

    A convolution has no more independent constraints than outputs and entries of its kernel, less the dependencies
    between its filters.

    Args:
        network: The network.
        input_shape: Of an example.

    Returns:
        As `rank_analysis`.

    Raises:
        ValueError: A layer, by its name, that cannot take what it gets.
    """
    ranks = []
    for layer, shape in reversed(list(zip((*network.hidden, network.head), shapes(network, input_shape), strict=True))):
        if isinstance(layer, FullyConnected):
            ranks.append(LayerRank(layer.name, math.prod(shape), math.prod(shape)))
        elif isinstance(layer, Convolution):
            outputs = math.prod(output_shape(layer, shape)) - _dependencies(layer, shape)
            ranks.append(_bound(layer, shape, outputs))
        else:
            middle, outputs = output_shape(layer.first, shape), math.prod(output_shape(layer, shape))
            # An identity brings as many unknowns as outputs; afterwards it gives the block's input away.
            ranks.append(_bound(layer.second, middle, outputs if layer.shortcut else 0))
            short = _bound(layer.shortcut, shape, outputs).rank if layer.shortcut else math.prod(shape)
            ranks.append(_bound(layer.first, shape, math.prod(middle) + short))
    return tuple(ranks)


def _bound(layer: Convolution, shape: Shape, others: int) -> LayerRank:
    """Of the gradient's constraints, the same for every channel, and others."""
    unknowns, rows = math.prod(shape), layer.size**2 * layer.features
    bound = shape[2] * rows + others if rows < math.prod(shape[:2]) else unknowns
    return LayerRank(layer.name, unknowns, min(unknowns, bound))


def _dependencies(layer: Convolution, shape: Shape) -> int:
    """One for every pair of filters, fewer where filters are many."""
    height, width, features = output_shape(layer, shape)
    return features**2 - max(features - layer.size**2 * shape[2], 0) * max(features - height * width, 0)
