"""Mixing of images, which MixUp and InstaHide have in common: which images are mixed, and with what coefficients.

Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018, section 2, and Huang et al., InstaHide:
Instance-Hiding Schemes for Private Distributed Learning, ICML 2020, algorithm 2. The law of the coefficients is that of
Huang et al., Evaluating Gradient Inversion Attacks and Defenses in Federated Learning, NeurIPS 2021, in its code.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Batch
from gia_jax.precision import widened

InputDefenseFn = Callable[[PRNGKeyArray, Batch], Batch]
MOST_IMAGES = 10_000  # mixed in one encoding
NUMBERS_DRAWN = 10_000_000  # at most, to estimate how often coefficients are in bounds


class Mixing(NamedTuple):
    """The recipe of n encodings: encoding i is the sum over j of coefficients[i, j] times image sources[i, j].

    Attributes:
        sources: Indices of the mixed images, shape (n, k), distinct in each row. The first in row i is i itself.
        coefficients: Coefficients of these images, shape (n, k), at least 0. Each row adds up to 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import defenses
        >>> mixing = defenses.Mixing(jnp.array([[0, 1], [1, 0]]), jnp.array([[0.75, 0.25], [0.5, 0.5]]))
        >>> defenses.mix(mixing, jnp.array([[0.0], [4.0]])).tolist()
        [[1.0], [2.0]]
    """

    sources: Int[Array, "n k"]
    coefficients: Float[Array, "n k"]


def check_mixing(k: int, low: float, high: float) -> None:
    """Checks that `k` and the bounds make sense and that enough draws of coefficients satisfy the bounds.

    Args:
        k: Number of images in an encoding.
        low: Least coefficient.
        high: Largest coefficient.

    Raises:
        ValueError: If `k` is no integer from 1 to 10,000, not 0 <= low <= high <= 1, or fewer than one in 1,000 draws
            of coefficients lies in the bounds.
    """
    _check_settings(k, low, high)
    if _share_within(k, low, high) < 1e-3:
        raise ValueError(f"low={low} and high={high} admit fewer than one in 1,000 draws of k={k} coefficients")


def checked_bounds(k: int, low: float, high: float) -> tuple[float, float]:
    """Checks the bounds of the coefficients, and drops them for a single image, whose coefficient is 1.

    Args:
        k: Number of images in an encoding.
        low: Least coefficient.
        high: Largest coefficient.

    Returns:
        The pair (low, high), or (0.0, 1.0) where `k` is 1.

    Raises:
        ValueError: If `k` or a bound is out of range, or almost no draw of coefficients lies in the bounds.
    """
    _check_settings(k, low, high)
    if k == 1:
        return 0.0, 1.0
    check_mixing(k, low, high)
    return low, high


def _check_settings(k: int, low: float, high: float) -> None:
    """Raises ValueError if `k` or a bound is out of range."""
    _check.integer(1, MOST_IMAGES, k=k)
    if not 0 <= low <= 1:
        raise ValueError(f"low must be in [0, 1], got {low}")
    if not low <= high <= 1:
        raise ValueError(f"high must be in [low, 1] = [{low}, 1], got {high}")


@functools.lru_cache
def _share_within(k: int, low: float, high: float) -> float:
    """Estimates the share of draws of coefficients that lie in the bounds, in [0, 1]."""
    # The more coefficients, the fewer draws, to bound memory; 1,000 are left at least, enough to see one in 1,000.
    drawn = np.random.default_rng(0).dirichlet(_concentration(k), min(100_000, NUMBERS_DRAWN // k))
    return float(np.mean((drawn.min(1) >= low) & (drawn.max(1) <= high)))


def _concentration(k: int) -> np.ndarray:
    """Returns the concentration parameters (3, 1, ..., 1) of the Dirichlet law of k coefficients."""
    return np.asarray([3.0] + [1.0] * (k - 1))


def draw_mixing(key: PRNGKeyArray, size: int, *, k: int, low: float = 0.0, high: float = 1.0) -> Mixing:
    """Draws a mixing of each image with k - 1 distinct others.

    The coefficients come from Dirichlet(3, 1, ..., 1), given that all of them are in the bounds.

    Args:
        key: Key of this draw.
        size: Number n of images that are mixed with each other, at least k.
        k: Number of images in an encoding, from 1 to 10,000.
        low: Least coefficient, at least 0.
        high: Largest coefficient, in [low, 1].

    Returns:
        The mixing, of n encodings.

    Raises:
        ValueError: If `k` is no integer from 1 to 10,000 or above `size`, `size` is too large for memory, not
            0 <= low <= high <= 1, or fewer than one in 1,000 draws lies in the bounds. Draws are repeated until all do.

    Examples:
        >>> import jax
        >>> from gia_jax import defenses
        >>> mixing = defenses.draw_mixing(jax.random.key(0), 4, k=2, high=0.65)
        >>> mixing.sources[:, 0].tolist()
        [0, 1, 2, 3]
        >>> mixing.coefficients.shape, bool(mixing.coefficients.max() <= 0.65)
        ((4, 2), True)
    """
    _check_settings(k, low, high)
    key_sources, key_coefficients = jax.random.split(key)
    sources = draw_sources(key_sources, size, k=k)  # comes first, because it compares k with the number of images
    return Mixing(sources, draw_coefficients(key_coefficients, size, k=k, low=low, high=high))


def draw_sources(key: PRNGKeyArray, size: int, *, k: int) -> Int[Array, "n k"]:
    """Draws which images are mixed: each image itself, then k - 1 distinct others.

    Args:
        key: Key of this draw.
        size: Number n of images.
        k: Number of images in an encoding, at most n.

    Returns:
        Indices of shape (n, k).

    Raises:
        ValueError: If there are fewer than k images, or too many for memory.
    """
    if size < k:
        raise ValueError(f"k={k} needs as many images, got {size}")
    _check.fits(size**2, size=size)
    order = jax.random.uniform(key, (size, size))
    # Each row's own image comes first, the others in random order.
    return jnp.argsort(jnp.where(jnp.eye(size, dtype=bool), -1, order), axis=1)[:, :k]


def draw_coefficients(key: PRNGKeyArray, size: int, *, k: int, low: float, high: float) -> Float[Array, "n k"]:
    """Draws rows of coefficients from Dirichlet(3, 1, ..., 1), each of them again until it is in the bounds.

    Args:
        key: Key of this draw.
        size: Number n of rows.
        k: Number of coefficients in a row.
        low: Least coefficient.
        high: Largest coefficient.

    Returns:
        Coefficients of shape (n, k). Each row adds up to 1.

    Raises:
        ValueError: If `k` or a bound is out of range, or fewer than one in 1,000 draws lies in the bounds.
    """
    check_mixing(k, low, high)
    concentration = jnp.asarray(_concentration(k))

    def outside(coefficients: Array) -> Array:
        return (coefficients.min(1) < low) | (coefficients.max(1) > high)

    def redraw(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        key, coefficients = carry
        key, current = jax.random.split(key)
        fresh = jax.random.dirichlet(current, concentration, (size,))
        return key, jnp.where(outside(coefficients)[:, None], fresh, coefficients)

    key, first = jax.random.split(key)
    start = jax.random.dirichlet(first, concentration, (size,))
    _, coefficients = jax.lax.while_loop(lambda carry: outside(carry[1]).any(), redraw, (key, start))
    return coefficients


def mix(mixing: Mixing, images: Float[Array, "n *d"]) -> Float[Array, "m *d"]:
    """Computes the encodings of a mixing, which are linear in `images`.

    The sums are in float32 or wider, and the result has the images' own type.

    Args:
        mixing: Indices and coefficients of the images in each of m encodings.
        images: Images of a floating-point type, shape (n, *d). Rows of label probabilities are mixed in the same way.

    Returns:
        The encodings, shape (m, *d).

    Raises:
        ValueError: If the images are not of a floating-point type.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import defenses
        >>> mixing = defenses.Mixing(jnp.array([[0, 1], [1, 0]]), jnp.array([[0.5, 0.5], [1.0, 0.0]]))
        >>> defenses.mix(mixing, jnp.array([[0.0, 2.0], [4.0, 6.0]])).tolist()
        [[2.0, 4.0], [4.0, 6.0]]
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be of a floating type to be mixed, got {images.dtype}")
    exact = widened(images)
    coefficients = mixing.coefficients.astype(exact.dtype)
    mixed = jnp.einsum("nk,nk...->n...", coefficients, exact[mixing.sources], precision="highest")
    return mixed.astype(images.dtype)


def as_probabilities(batch: Batch, num_classes: int) -> Float[Array, "b c"]:
    """Returns the labels of a batch as rows of probabilities, in the type of the inputs.

    Args:
        batch: Batch with inputs of a floating-point type, an array or a tree of arrays, and class indices (b,) or
            probabilities (b, num_classes).
        num_classes: Number of classes of the model, at least 1.

    Returns:
        Class indices as rows of zeros and a one, and probabilities as they are, shape (b, num_classes). A traced label
        that is no class gives a row of NaN.

    Raises:
        ValueError: If `num_classes` is no positive integer, the labels are neither indices below it nor rows of as many
            probabilities, or no input is of a floating-point type.
    """
    _check.integer(num_classes=num_classes)
    size = _check.examples(batch.inputs)
    types = [leaf.dtype for leaf in jax.tree.leaves(batch.inputs)]
    floating = [dtype for dtype in types if jnp.issubdtype(dtype, jnp.floating)]
    if not floating:
        raise ValueError(f"batch.inputs must be of a floating type, got {', '.join(map(str, types))}")
    dtype = jnp.result_type(*floating)
    if not hasattr(batch.labels, "ndim"):
        got = f"a {type(batch.labels).__name__}"
        raise ValueError(f"batch.labels must be class indices (b,) or probabilities (b, c) to be mixed, got {got}")
    _check.classes(batch.labels, (size,), num_classes)
    _check.fits(size * num_classes, num_classes=num_classes)
    if batch.labels.ndim == 2:
        return batch.labels.astype(dtype)
    rows = jax.nn.one_hot(batch.labels, num_classes, dtype=dtype)
    return jnp.where((jnp.sum(rows, 1) > 0)[:, None], rows, jnp.nan)
