"""Winograd's minimal filtering F(2x2, 3x3): a three-by-three convolution with 2.25 times fewer multiplications.

Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, equations 7-10 and section 4.1. Every 4x4
tile of the input gives 2x2 outputs, Y = A^T [ (G g G^T) * (B^T d B) ] A. The product * sums over features, and so it is
one matrix product for each of the 16 entries of a tile. The error in float32 is that of a plain product.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Dot = Callable[..., jax.Array]
Entries = list[jax.Array]


def _along(rows: Entries, matrix: Sequence[Sequence[float | int]]) -> Entries:
    """Applies a transform matrix to the entries of a tile along one axis; zeros and ones cost nothing."""

    def combine(coefficients: Sequence[float | int]) -> jax.Array:
        terms = [row if c == 1 else -row if c == -1 else c * row for c, row in zip(coefficients, rows) if c != 0]
        return functools.reduce(jnp.add, terms)

    return [combine(coefficients) for coefficients in matrix]


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
    tiles = _input_tiles(x)
    taps = _along([kernel[i] for i in range(3)], KERNEL)
    weights = [entry for row in taps for entry in _along([row[j] for j in range(3)], KERNEL)]
    products = [dot(v, u, (((1,), (contracted - 2,)), ((), ()))) for v, u in zip(tiles, weights, strict=True)]
    features = products[0].shape[1]
    rows = [_along(products[4 * i : 4 * i + 4], OUTPUT) for i in range(4)]
    columns = [_along([rows[i][j] for i in range(4)], OUTPUT) for j in range(2)]
    y = jnp.stack([jnp.stack([columns[j][i] for j in range(2)]) for i in range(2)])
    y = y.reshape(2, 2, n, down, across, features).transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(n, 2 * down, 2 * across, features)[:, :h, :w]


def kernel_gradient(x: jax.Array, cotangent: jax.Array, dot: Dot) -> jax.Array:
    """Computes the kernel's gradient, which is the transpose of `forward` in its kernel.

    Args:
        x: Inputs, padded as in `forward`, shape (n, h + 2, w + 2, c).
        cotangent: Cotangents of the outputs, shape (n, h, w, o).
        dot: Matrix product, called like `lax.dot_general`.

    Returns:
        The gradient, shape (3, 3, c, o).
    """
    h, w = cotangent.shape[1:3]
    tiles = _input_tiles(x)
    padded = lax.pad(cotangent, jnp.zeros((), x.dtype), ((0, 0, 0), (0, h % 2, 0), (0, w % 2, 0), (0, 0, 0)))
    rows = _along([padded[:, i::2] for i in range(2)], FROM_OUTPUT)
    entries = [e for row in rows for e in _along([row[:, :, j::2] for j in range(2)], FROM_OUTPUT)]
    flat = [e.reshape(-1, e.shape[-1]) for e in entries]
    products = [dot(v, d, (((0,), (0,)), ((), ()))) for v, d in zip(tiles, flat, strict=True)]
    rows = [_along(products[4 * i : 4 * i + 4], FROM_KERNEL) for i in range(4)]
    return jnp.stack([jnp.stack(_along([rows[i][j] for i in range(4)], FROM_KERNEL)) for j in range(3)], 1)


def _input_tiles(x: jax.Array) -> Entries:
    """Transforms every 4x4 tile at stride 2 to B^T d B: 16 matrices (tiles, c), row by row."""
    h, w = x.shape[1] - 2, x.shape[2] - 2
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, h % 2, 0), (0, w % 2, 0), (0, 0, 0)))
    down, across = -(-h // 2), -(-w // 2)
    rows = _along([lax.slice_in_dim(x, i, i + 2 * down - 1, 2, 1) for i in range(4)], INPUT)
    entries = []
    for row in rows:
        entries += _along([lax.slice_in_dim(row, j, j + 2 * across - 1, 2, 2) for j in range(4)], INPUT)
    return [entry.reshape(math.prod(entry.shape[:3]), entry.shape[3]) for entry in entries]
