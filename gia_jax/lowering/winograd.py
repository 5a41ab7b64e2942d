"""Winograd's minimal filtering F(2x2, 3x3): a three-by-three convolution with 2.25 times fewer multiplications.

Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, equations 7-10 and section 4.1. Every 4x4
tile of the input gives 2x2 outputs, Y = A^T [ (G g G^T) * (B^T d B) ] A. The product * sums over features, and so it is
one matrix product for each of the 16 entries of a tile. The error in float32 is that of a plain product.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from gia_jax.lowering.geometry import Dot

INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))  # B^T
KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))  # G
OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))  # A^T
FROM_OUTPUT = ((1, 0), (1, 1), (1, -1), (0, -1))  # A
FROM_KERNEL = ((1, 0.5, 0.5, 0), (0, 0.5, -0.5, 0), (0, 0.5, 0.5, 1))  # G^T


def forward(x: jax.Array, kernel: jax.Array, contracted: int, dot: Dot) -> jax.Array:
    """Computes a three-by-three convolution of stride one.

    Args:
        x: Padded inputs, shape (n, h + 2, w + 2, c).
        kernel: Kernel, shape (3, 3, ., .), with the c input features at axis `contracted`.
        contracted: Axis of the kernel over which features are summed, 2 or 3.
        dot: Matrix product, called like `lax.dot_general`.

    Returns:
        The outputs, shape (n, h, w, o).
    """
    n, h, w = x.shape[0], x.shape[1] - 2, x.shape[2] - 2
    down, across = -(-h // 2), -(-w // 2)
    taps = _transform([kernel[i] for i in range(3)], KERNEL)
    taps = _transform([taps[:, j] for j in range(3)], KERNEL)
    weights = taps.reshape(16, *taps.shape[2:])
    products = dot(_input_tiles(x), weights, (((2,), (contracted - 1,)), ((0,), (0,))))
    products = products.reshape(4, 4, n, down, across, -1)  # column and row of an entry, tile, feature
    y = _transform([products[:, i] for i in range(4)], OUTPUT)
    y = _transform([y[:, j] for j in range(4)], OUTPUT)
    y = y.transpose(2, 3, 1, 4, 0, 5)
    return y.reshape(n, 2 * down, 2 * across, -1)[:, :h, :w]


def kernel_gradient(x: jax.Array, cotangent: jax.Array, dot: Dot) -> jax.Array:
    """Computes the kernel's gradient, which is the transpose of `forward` in its kernel.

    Args:
        x: Inputs, padded as in `forward`, shape (n, h + 2, w + 2, c).
        cotangent: Cotangents of the outputs, shape (n, h, w, o).
        dot: Matrix product, called like `lax.dot_general`.

    Returns:
        The gradient, shape (3, 3, c, o).
    """
    padded = _even(cotangent)
    entries = _transform([padded[:, i::2] for i in range(2)], FROM_OUTPUT)
    entries = _transform([entries[:, :, :, j::2] for j in range(2)], FROM_OUTPUT)
    flat = entries.reshape(16, -1, cotangent.shape[3])
    products = dot(_input_tiles(x), flat, (((1,), (1,)), ((0,), (0,))))
    products = products.reshape(4, 4, *products.shape[1:])  # column and row of an entry, features
    y = _transform([products[:, i] for i in range(4)], FROM_KERNEL)
    return _transform([y[:, j] for j in range(4)], FROM_KERNEL).swapaxes(0, 1)


def _input_tiles(x: jax.Array) -> jax.Array:
    """Transforms every 4x4 tile at stride 2 to B^T d B, shape (16, tiles, c): entries column by column."""
    x = _even(x)
    down, across = x.shape[1] // 2 - 1, x.shape[2] // 2 - 1
    rows = _transform([lax.slice_in_dim(x, i, i + 2 * down - 1, 2, 1) for i in range(4)], INPUT)
    entries = _transform([lax.slice_in_dim(rows, j, j + 2 * across - 1, 2, 3) for j in range(4)], INPUT)
    return entries.reshape(16, -1, x.shape[3])


def _even(x: jax.Array) -> jax.Array:
    """Pads height and width with zeros to even numbers."""
    return lax.pad(
        x, jnp.zeros((), x.dtype), [(0, size % 2 if axis in (1, 2) else 0, 0) for axis, size in enumerate(x.shape)]
    )


def _transform(parts: Sequence[jax.Array], matrix: Sequence[Sequence[float | int]]) -> jax.Array:
    """Stacks the sums of the parts by every row of a matrix, whose zeros and ones cost nothing."""

    def combined(coefficients: Sequence[float | int]) -> jax.Array:
        terms = [part if c == 1 else -part if c == -1 else c * part for c, part in zip(coefficients, parts) if c != 0]
        return functools.reduce(jnp.add, terms)

    return jnp.stack([combined(coefficients) for coefficients in matrix])
