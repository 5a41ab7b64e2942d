"""An analysis that tells which networks R-GAP inverts, by the rank of the constraints on the input of every layer.

Zhu and Blaschko, R-GAP: Recursive Gradient Attack on Privacy, ICLR 2021, counts constraints. Counting is not enough:
those of a convolution with f filters depend on each other, sum_u W[f', u] K[(f, u)] = sum_p k_f(p) W[(f', p)] for every
pair of filters. The rank is therefore computed.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import _check
from gia_jax.attacks.constraints import (
    Known,
    System,
    convolution_system,
    first_convolution_system,
    normal_matrix,
    pull_back,
    second_convolution_system,
    through_activation,
)
from gia_jax.base import Params
from gia_jax.models.network import (
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


class LayerRank(NamedTuple):
    """The numbers that say whether the input of a layer follows from the layer's gradient and output.

    Attributes:
        name: Name of the layer.
        unknowns: Number of values to find.
        rank: Rank of the constraints on them.

    Examples:
        >>> from gia_jax import attacks
        >>> layer = attacks.LayerRank("conv", unknowns=48, rank=40)
        >>> layer.unknowns - layer.rank  # constraints that are missing
        8
    """

    name: str
    unknowns: int
    rank: int


def rank_analysis(
    network: Network, params: Params, input_shape: Shape, *, key: PRNGKeyArray, tolerance: float = 1e-6
) -> tuple[LayerRank, ...]:
    """Computes the rank of every layer's constraints, which tells before any attack whether R-GAP is exact.

    Recovery is exact where every layer has the rank of its unknowns. The constraints depend on the example through the
    cotangents, but their rank hardly ever does. It is taken at one random example.

    Args:
        network: Network that is attacked, of the kinds that `r_gap` takes.
        params: Parameters of the network.
        input_shape: Shape of an example.
        key: Random key of the example.
        tolerance: Fraction of a layer's largest singular value below which the others are taken for zeros, at least
            1e-7 and below 1. They are roots of the eigenvalues of the normal equations, so it cannot be smaller.

    Returns:
        The layers in the order of the recursion, from the output. The first one of too small a rank is the bottleneck.
        A residual block has two entries, named after its second and its first convolution.

    Raises:
        ValueError: If `tolerance` is out of range, the network's head leaves its input open, the parameters are those
            of another network, or float64 is not enabled.

    Examples:
        The input of the head is found, but the convolution has too few filters for its 16 pixels:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import attacks, models
        >>> conv = models.Convolution("conv", 2, size=2, stride=2)
        >>> network = models.Network((conv,), models.FullyConnected("head", 3))
        >>> with jax.enable_x64(True):
        ...     params = network.init(jax.random.key(0), (4, 4, 1))
        ...     of_head, of_conv = attacks.rank_analysis(network, params, (4, 4, 1), key=jax.random.key(1))
        >>> of_head.rank == of_head.unknowns, of_conv.unknowns, of_conv.rank < of_conv.unknowns
        (True, 16, True)
    """
    if not 1e-7 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [1e-7, 1), got {tolerance}")
    check_network(network)
    check_parameters(network, params, input_shape)
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


def counted_ranks(network: Network, input_shape: Shape) -> tuple[LayerRank, ...]:
    """Computes upper bounds on the ranks from the architecture alone.

    Where they are too small, `rank_analysis` is not needed. A convolution has no more independent constraints than
    outputs and entries of its kernel, less the dependencies between its filters.

    Args:
        network: Network that is attacked.
        input_shape: Shape of an example.

    Returns:
        The layers in the order of the recursion, from the output, with the bounds as their ranks. A residual block has
        two entries, named after its second and its first convolution.

    Raises:
        ValueError: If a layer, named in the message, cannot take the shape that it gets.

    Examples:
        Two filters with kernels of 2 x 2 pixels give at most 12 constraints for 16 pixels:

        >>> from gia_jax import models
        >>> from gia_jax.attacks.rank_analysis import counted_ranks
        >>> conv = models.Convolution("conv", 2, size=2, stride=2)
        >>> network = models.Network((conv,), models.FullyConnected("head", 3))
        >>> counted_ranks(network, (4, 4, 1))[1]
        LayerRank(name='conv', unknowns=16, rank=12)
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


def check_network(network: Network) -> None:
    """Raises ValueError, naming the layer, where the head cannot make up for what the loss leaves open.

    Args:
        network: Network that is attacked.

    Raises:
        ValueError: If the head has one or two outputs and no bias, and the network has another bias, an activation that
            is not homogeneous, or no hidden layer.
    """
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


def check_parameters(network: Network, params: Params, input_shape: Shape) -> None:
    """Raises ValueError without float64, and for parameters of another network.

    Args:
        network: Network that is attacked.
        params: Parameters that should fit it.
        input_shape: Shape of an example.

    Raises:
        ValueError: If float64 is not enabled, or the parameters have not the structure and shapes of the network's.
    """
    if jnp.result_type(float) != jnp.float64:
        raise ValueError(f"r_gap needs float64: set jax_enable_x64, got {jnp.result_type(float)}")
    expected = jax.eval_shape(lambda: network.init(jax.random.key(0), input_shape))
    _check.same_structure("params", params, "the network", expected)


def _constraint_matrices(
    network: Network, input_shape: Shape, params: Params, key: PRNGKeyArray
) -> list[Float[Array, "n n"] | None]:
    """Computes the matrices of the normal equations in the order of the recursion.

    An entry is None for a dense layer, whose gradient gives away its input.
    """
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
        k = through_activation(network.activation, z, cotangent)
        known = Known(params, update, network.activation, x.shape, z, k)
        if isinstance(layer, FullyConnected):
            systems.append(None)
        elif isinstance(layer, Convolution):
            systems.append(convolution_system(layer, known))
        else:
            middle = network.activation.fn(apply_layer(layer.first, network.activation, params, x[None])[0])
            systems.append(second_convolution_system(layer, known))
            systems.append(first_convolution_system(layer, known, middle))
        cotangent = pull_back(layer, known, x)
    return [None if system is None else normal_matrix(system)[0] for system in systems]


def _rank(matrix: np.ndarray, tolerance: float) -> int:
    """Computes the rank of a positive semi-definite matrix, whose eigenvalues are squares of singular values."""
    try:  # a Cholesky factor, where there is one, proves full rank at a tenth of the eigenvalues' cost
        np.linalg.cholesky(matrix - tolerance**2 * np.linalg.norm(matrix, np.inf) * np.eye(len(matrix)))
        return len(matrix)
    except np.linalg.LinAlgError:
        values = np.linalg.eigvalsh(matrix)
        return int(np.sum(values > tolerance**2 * values[-1]))


def _bound(layer: Convolution, shape: Shape, others: int) -> LayerRank:
    """Bounds a convolution's rank by the constraints of its gradient, the same for every channel, and the `others`."""
    unknowns, rows = math.prod(shape), layer.size**2 * layer.features
    bound = shape[2] * rows + others if rows < math.prod(shape[:2]) else unknowns
    return LayerRank(layer.name, unknowns, min(unknowns, bound))


def _dependencies(layer: Convolution, shape: Shape) -> int:
    """Counts the dependencies: one for every pair of filters, and fewer where filters are many."""
    height, width, features = output_shape(layer, shape)
    return features**2 - max(features - layer.size**2 * shape[2], 0) * max(features - height * width, 0)
