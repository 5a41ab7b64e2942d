"""Linear constraints that convolutions and residual blocks put on unknown images, and their least-squares solution.

They serve `r_gap` and `rank_analysis`. The constraints are kept as convolutions: the matrix of all rows, of which a
layer of a small network has tens of thousands, is never formed. Its normal equations are formed, and the solution is
refined iteratively against the constraints themselves.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from gia_jax.base import Params, Updates
from gia_jax.models.network import Activation, Convolution, Layer, Residual, Shape, apply_layer, output_shape

# Each refinement takes off the error that the rounding of the normal equations left.
NUM_REFINEMENTS = 10
# Relative to the largest entry of the diagonal: a rank-deficient matrix keeps a Cholesky factor.
RIDGE = 1e-14


class Operator(NamedTuple):
    """A convolution that acts on one unknown image, whose pixels are in one axis.

    Attributes:
        unknown: Index of the image among the unknown ones.
        taps: Pixel that entry u of the kernel reads for output position p, shape (p, u). In the padding it is the
            number of pixels, which is no pixel.
        kernel: Kernel with its height and width in one axis, shape (u, c, f).
    """

    unknown: int
    taps: np.ndarray
    kernel: Float[Array, "u c f"]


class System(NamedTuple):
    """The linear constraints on unknown images.

    Attributes:
        sizes: Numbers of pixels and of channels of each image.
        outputs: Constraints by a known output: operators whose outputs add up to z, shape (p, f), with that z.
        gradients: Constraints by a known gradient: an operator whose kernel is the gradient of a kernel, with the
            cotangent k of its output, shape (p, f). The gradient of entry (u, c, f) is sum_p k(p, f) x(taps(p, u), c).
    """

    sizes: tuple[tuple[int, int], ...]
    outputs: Sequence[tuple[Sequence[Operator], Float[Array, "p f"]]]
    gradients: Sequence[tuple[Operator, Float[Array, "p f"]]]


class Known(NamedTuple):
    """The values that the recursion knows when it comes to a layer.

    Attributes:
        params: Parameters of the whole network.
        update: Gradient of all parameters.
        activation: Activation after the layer.
        shape: Shape of the layer's input.
        z: Output of the layer, before the activation.
        k: Gradient of the loss with respect to z.
    """

    params: Params
    update: Updates
    activation: Activation
    shape: Shape
    z: Float[Array, "*e"]
    k: Float[Array, "*e"]


def convolution_operator(layer: Convolution, tree: Params, shape: Shape, unknown: int = 0) -> Operator:
    """Builds the operator of a convolution.

    Args:
        layer: Convolution of the network.
        tree: Parameters, or their gradient: the operator has the kernel that this tree holds under the layer's name.
        shape: Shape of the layer's input, (h, w, c).
        unknown: Index of the image that the operator reads.

    Returns:
        The operator.

    Examples:
        A kernel of 2 x 2 on an image of 3 x 3 reads pixels 0, 1, 3 and 4 for its first output:

        >>> import jax.numpy as jnp
        >>> from gia_jax import models
        >>> from gia_jax.attacks.constraints import convolution_operator
        >>> layer, params = models.Convolution("conv", features=1, size=2), {"conv": {"kernel": jnp.ones((2, 2, 1, 1))}}
        >>> operator = convolution_operator(layer, params, (3, 3, 1))
        >>> operator.taps.shape, operator.taps[0].tolist()
        ((4, 4), [0, 1, 3, 4])
    """
    rows, columns = (
        np.arange(out)[:, None] * layer.stride + np.arange(layer.size) - layer.padding
        for out in output_shape(layer, shape)[:2]
    )
    row, column = rows[:, None, :, None], columns[None, :, None, :]
    inside = (row >= 0) & (row < shape[0]) & (column >= 0) & (column < shape[1])
    taps = np.where(inside, row * shape[1] + column, shape[0] * shape[1]).reshape(-1, layer.size**2)
    return Operator(unknown, taps, tree[layer.name]["kernel"].reshape(layer.size**2, shape[2], layer.features))


def identity_operator(shape: Shape, unknown: int = 0) -> Operator:
    """Builds the operator of a shortcut that passes on its image unchanged.

    Args:
        shape: Shape of the image, (h, w, c).
        unknown: Index of the image that the operator reads.

    Returns:
        The operator.
    """
    return Operator(unknown, np.arange(shape[0] * shape[1])[:, None], jnp.eye(shape[2])[None])


def solve(system: System) -> tuple[list[Float[Array, "p c"]], Float[Array, ""]]:
    """Solves a system in least squares.

    Args:
        system: Constraints to solve.

    Returns:
        The images, with pixels in the first axis and channels in the second, and the relative residual of the
        constraints.

    Examples:
        An image that is observed through the identity is found again:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax.attacks.constraints import System, identity_operator, solve
        >>> image = jnp.array([[1.0], [2.0]])  # two pixels of one channel
        >>> system = System(sizes=((2, 1),), outputs=[([identity_operator((1, 2, 1))], image)], gradients=[])
        >>> (found,), residual = jax.jit(lambda: solve(system))()
        >>> bool(jnp.allclose(found, image, atol=0.001)), bool(residual < 0.001)
        (True, True)
    """
    matrix, weights = normal_matrix(system)
    factor = jax.scipy.linalg.cho_factor(matrix + RIDGE * jnp.max(jnp.diag(matrix)) * jnp.eye(len(matrix)))
    targets = [z for _, z in system.outputs]
    targets += [weight * operator.kernel for weight, (operator, _) in zip(weights, system.gradients, strict=True)]

    def constraints(flat: Array) -> list[Array]:
        return _apply_system(system, weights, _split(flat, system.sizes))

    def misfit(flat: Array) -> list[Array]:
        return jax.tree.map(jnp.subtract, targets, constraints(flat))

    def refine(_: Any, flat: Array) -> Array:
        (right,) = jax.linear_transpose(constraints, flat)(misfit(flat))
        return flat + jax.scipy.linalg.cho_solve(factor, right)

    flat = jax.lax.fori_loop(0, NUM_REFINEMENTS, refine, jnp.zeros(len(matrix)))
    return _split(flat, system.sizes), optax.tree.norm(misfit(flat)) / optax.tree.norm(targets)


def _split(flat: Array, sizes: Sequence[tuple[int, int]]) -> list[Array]:
    """Splits a flat vector into images by pixels and channels."""
    ends = np.cumsum([pixels * channels for pixels, channels in sizes])
    return [part.reshape(size) for part, size in zip(jnp.split(flat, ends[:-1]), sizes, strict=True)]


def _apply_system(system: System, weights: Sequence[Array], images: Sequence[Array]) -> list[Array]:
    """Computes the left sides of all constraints, those of the gradients weighted."""

    def patches(operator: Operator) -> Float[Array, "p u c"]:
        return jnp.take(images[operator.unknown], operator.taps, axis=0, mode="fill", fill_value=0)

    def convolved(operator: Operator) -> Float[Array, "p f"]:
        return jnp.einsum("puc,ucf->pf", patches(operator), operator.kernel)

    outputs = [sum(map(convolved, operators[1:]), convolved(operators[0])) for operators, _ in system.outputs]
    return outputs + [
        weight * jnp.einsum("puc,pf->ucf", patches(operator), k)
        for weight, (operator, k) in zip(weights, system.gradients, strict=True)
    ]


def normal_matrix(system: System) -> tuple[Float[Array, "n n"], list[Float[Array, ""]]]:
    """Computes the normal equations' matrix A^T A of all constraints.

    The constraints of each gradient are weighted so that they have the trace of the outputs'.

    Args:
        system: Constraints, whose rows are A.

    Returns:
        The matrix, and the weight of every gradient's constraints.
    """
    count = len(system.sizes)
    blocks = [[jnp.zeros((p, q, c, d)) for q, d in system.sizes] for p, c in system.sizes]
    for operators, _ in system.outputs:
        for left in operators:
            for right in operators:
                products = jnp.einsum("ucf,vdf->uvcd", left.kernel, right.kernel)
                at = left.taps[:, :, None], right.taps[:, None, :]  # pixels of the padding are dropped
                block = blocks[left.unknown][right.unknown]
                blocks[left.unknown][right.unknown] = block.at[at].add(products, mode="drop")
    trace = sum(jnp.einsum("ppcc->", blocks[i][i]) for i in range(count))
    weights = []
    for operator, k in system.gradients:
        pixels, channels = system.sizes[operator.unknown]
        # One matrix for all channels: row (u, f) has k(p, f) at the pixel that entry u reads for position p.
        entries = np.arange(operator.taps.shape[1])
        rows = jnp.zeros((len(entries), pixels, k.shape[1])).at[entries, operator.taps].add(k[:, None], mode="drop")
        squares = jnp.einsum("upf,uqf->pq", rows, rows)
        weight = jnp.sqrt(trace / (channels * jnp.trace(squares)))
        i = operator.unknown
        blocks[i][i] += jnp.einsum("pq,cd->pqcd", weight**2 * squares, jnp.eye(channels))
        weights.append(weight)
    sizes = [pixels * channels for pixels, channels in system.sizes]
    flat = [[blocks[i][j].swapaxes(1, 2).reshape(sizes[i], sizes[j]) for j in range(count)] for i in range(count)]
    return jnp.block(flat), weights


def convolution_system(layer: Convolution, known: Known) -> System:
    """Builds the constraints on the input of a convolution.

    Args:
        layer: Convolution of the network.
        known: Values known at the layer.

    Returns:
        The system, with one unknown image.
    """
    output = ([convolution_operator(layer, known.params, known.shape)], _rows(known.z - _bias(layer, known)))
    gradient = (convolution_operator(layer, known.update, known.shape), _rows(known.k))
    return System((_size(known.shape),), [output], [gradient])


def second_convolution_system(layer: Residual, known: Known) -> System:
    """Builds the constraints on the input of a residual block's second convolution and on the block's own input.

    Args:
        layer: Residual block of the network.
        known: Values known at the block.

    Returns:
        The system. Its first image is the input of the second convolution. The second is the block's input, which need
        not be determined.
    """
    middle = output_shape(layer.first, known.shape)
    second = convolution_operator(layer.second, known.params, middle)
    short, bias, gradients = _shortcut(layer, known, unknown=1)
    gradients = [(convolution_operator(layer.second, known.update, middle), _rows(known.k)), *gradients]
    outputs = [([second, short], _rows(known.z - _bias(layer.second, known) - bias))]
    return System((_size(middle), _size(known.shape)), outputs, gradients)


def first_convolution_system(layer: Residual, known: Known, middle: Float[Array, "h w c"]) -> System:
    """Builds the constraints on a residual block's input once the input of its second convolution is known.

    Args:
        layer: Residual block of the network.
        known: Values known at the block.
        middle: Input of the second convolution, shape (h, w, c).

    Returns:
        The system, with one unknown image.
    """
    z = known.activation.inverse_fn(middle)
    k = through_activation(known.activation, z, pull_back(layer.second, known, middle))
    rest = known.z - apply_layer(layer.second, known.activation, known.params, middle[None])[0]
    first = convolution_system(layer.first, known._replace(z=z, k=k))
    short, bias, gradients = _shortcut(layer, known, unknown=0)
    return System(first.sizes, [*first.outputs, ([short], _rows(rest - bias))], [*first.gradients, *gradients])


def _shortcut(
    layer: Residual, known: Known, unknown: int
) -> tuple[Operator, Array | int, list[tuple[Operator, Array]]]:
    """Returns the operator of a block's shortcut, its bias, and the constraints by its gradient."""
    if layer.shortcut is None:
        return identity_operator(known.shape, unknown), 0, []
    gradient = convolution_operator(layer.shortcut, known.update, known.shape, unknown)
    short = convolution_operator(layer.shortcut, known.params, known.shape, unknown)
    return short, _bias(layer.shortcut, known), [(gradient, _rows(known.k))]


def through_activation(activation: Activation, z: Array, cotangent: Array) -> Array:
    """Computes the gradient with respect to an activation's input from that with respect to its output.

    Args:
        activation: Activation of the network.
        z: Input of the activation.
        cotangent: Gradient with respect to its output, of any shape with as many entries as z.

    Returns:
        The gradient with respect to z, of the shape of z.
    """
    return jax.jvp(activation.fn, (z,), (cotangent.reshape(z.shape),))[1]


def pull_back(layer: Layer, known: Known, x: Array) -> Array:
    """Computes the gradient of the loss with respect to a layer's input.

    Args:
        layer: Layer of the network.
        known: Values known at the layer.
        x: Input of the layer.

    Returns:
        The gradient, of the shape of x.
    """

    def output(x: Array) -> Array:
        return apply_layer(layer, known.activation, known.params, x[None])[0]

    return jax.vjp(output, x)[1](known.k)[0]


def _bias(layer: Convolution, known: Known) -> Array | int:
    """Returns the layer's bias, or 0 where it has none."""
    return known.params[layer.name]["bias"] if layer.bias else 0


def _rows(image: Float[Array, "h w c"]) -> Float[Array, "p c"]:
    """Puts the pixels of an image in one axis."""
    return image.reshape(-1, image.shape[-1])


def _size(shape: Shape) -> tuple[int, int]:
    """Returns the numbers of pixels and of channels."""
    return shape[0] * shape[1], shape[2]
