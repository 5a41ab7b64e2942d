"""Widens half precision, which has too few values for sums, norms, tails and probabilities, to float32 or wider.

Modules widen what they are given before they compute with it. A result that stands for what was given, such as an
update or an image, is cast to its type last. A loss or a score stays wide.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree


def is_floating(leaf: Array | np.ndarray) -> bool:
    """Tells whether an array is of floating-point numbers, of JAX's own types too, such as bfloat16."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def widened(leaf: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the array in float32, or in its own type where that is wider."""
    return leaf.astype(wide_dtype(leaf.dtype))


def wide_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns float32, or `dtype` itself where it is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def widened_tree(tree: PyTree[Array]) -> PyTree[Array]:
    """Widens the floating-point leaves of a tree; integers, booleans and keys are left as they are."""
    return jax.tree.map(lambda leaf: widened(leaf) if is_floating(leaf) else leaf, tree)


def cast_like(tree: PyTree[Array], like: PyTree[Array]) -> PyTree[Array]:
    """Casts every leaf of a tree to the type of the leaf of `like` in its place."""
    return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), tree, like)


def widening(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of two updates, such as an objective or its residuals, see both of them widened.

    Args:
        fn: Function `(simulated, observed, **settings)` of two trees of arrays.

    Returns:
        The same function of the widened trees.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.precision import widening
        >>> half = jnp.full(4, 200, jnp.float16)
        >>> inner_product = lambda simulated, observed: simulated @ observed
        >>> print(float(inner_product(half, half)), float(widening(inner_product)(half, half)))
        inf 160000.0
    """

    @functools.wraps(fn)
    def wide_fn(simulated: PyTree[Array], observed: PyTree[Array], /, **settings: Any) -> Any:
        return fn(widened_tree(simulated), widened_tree(observed), **settings)

    return wide_fn
