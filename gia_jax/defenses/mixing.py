"""Which images are mixed with which, and how much: what MixUp and InstaHide have in common.

Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018, section 2, and Huang et al., InstaHide:
Instance-Hiding Schemes for Private Distributed Learning, ICML 2020, algorithm 2; the law of the coefficients is that of
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
    """Encoding i is the sum over j of coefficients[i, j] times image sources[i, j].

    Attributes:
        sources: Indices, shape (n, k), distinct in each row; the first is i itself.
        coefficients: Shape (n, k), not negative, each row adds up to 1.
    """

    sources: Int[Array, "n k"]
    coefficients: Float[Array, "n k"]


def check_mixing(k: int, low: float, high: float) -> None:
    """Raises ValueError for a `k` or bounds that make no sense, or that (almost) no draw of coefficients satisfies."""
    _check_settings(k, low, high)
    if _share_within(k, low, high) < 1e-3:
        raise ValueError(f"low={low} and high={high} admit fewer than one in 1,000 draws of k={k} coefficients")


def checked_bounds(k: int, low: float, high: float) -> tuple[float, float]:
    """The bounds of `k` coefficients; of a single one, which is 1, they say nothing."""
    _check_settings(k, low, high)
    if k == 1:
        return 0.0, 1.0
    check_mixing(k, low, high)
    return low, high


def _check_settings(k: int, low: float, high: float) -> None:
    _check.integer(1, MOST_IMAGES, k=k)
    if not 0 <= low <= 1:
        raise ValueError(f"low must be in [0, 1], got {low}")
    if not low <= high <= 1:
        raise ValueError(f"high must be in [low, 1] = [{low}, 1], got {high}")


@functools.lru_cache
def _share_within(k: int, low: float, high: float) -> float:
    # The more coefficients, the fewer draws, to bound memory; 1,000 are left at least, enough to see one in 1,000.
    drawn = np.random.default_rng(0).dirichlet(_concentration(k), min(100_000, NUMBERS_DRAWN // k))
    return float(np.mean((drawn.min(1) >= low) & (drawn.max(1) <= high)))


def _concentration(k: int) -> np.ndarray:
    return np.asarray([3.0] + [1.0] * (k - 1))


def draw_mixing(key: PRNGKeyArray, size: int, *, k: int, low: float = 0.0, high: float = 1.0) -> Mixing:
    """Each image with k - 1 distinct others, coefficients from Dirichlet(3, 1, ..., 1) given that all are in bounds.

    Args:
        key: Key of this draw.
        size: Images that mix with each other, n >= k.
        k: Images in an encoding.
        low: Least coefficient, >= 0.
        high: Largest coefficient, <= 1.

    Returns:
        The mixing.

    Raises:
        ValueError: If `k` is no integer from 1 to 10,000 or above `size`, `size` too large for memory, not
            0 <= low <= high <= 1, or fewer than one in 1,000 draws lies in the bounds: draws are repeated until all do.
    """
    _check_settings(k, low, high)
    key_sources, key_coefficients = jax.random.split(key)
    sources = draw_sources(key_sources, size, k=k)  # comes first, because it compares k with the number of images
    return Mixing(sources, draw_coefficients(key_coefficients, size, k=k, low=low, high=high))


def draw_sources(key: PRNGKeyArray, size: int, *, k: int) -> Int[Array, "n k"]:
    """Each image itself, then k - 1 distinct others; ValueError where there are fewer than k."""
    if size < k:
        raise ValueError(f"k={k} needs as many images, got {size}")
    _check.fits(size**2, size=size)
    order = jax.random.uniform(key, (size, size))
    # Each row's own image comes first, the others in random order.
    return jnp.argsort(jnp.where(jnp.eye(size, dtype=bool), -1, order), axis=1)[:, :k]


def draw_coefficients(key: PRNGKeyArray, size: int, *, k: int, low: float, high: float) -> Float[Array, "n k"]:
    """Rows from the Dirichlet law, each drawn again until it is in bounds; ValueError where that (almost) never is."""
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
    """The encodings, summed in float32 or wider and of the images' own type; linear in `images`.

    Raises:
        ValueError: For images that are integers.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be of a floating type to be mixed, got {images.dtype}")
    exact = widened(images)
    coefficients = mixing.coefficients.astype(exact.dtype)
    mixed = jnp.einsum("nk,nk...->n...", coefficients, exact[mixing.sources], precision="highest")
    return mixed.astype(images.dtype)


def as_probabilities(batch: Batch, num_classes: int) -> Float[Array, "b c"]:
    """Class indices as rows of zeros and a one; probabilities as they are.

    Raises:
        ValueError: If `num_classes` is no positive integer, or the labels are neither indices below it nor rows of as
            many probabilities. Traced labels that are no class give a row of NaN. Or the inputs, whose type the
            probabilities get, are integers.
    """
    _check.integer(num_classes=num_classes)
    if not jnp.issubdtype(batch.inputs.dtype, jnp.floating):
        raise ValueError(f"batch.inputs must be of a floating type, got {batch.inputs.dtype}")
    if not hasattr(batch.labels, "ndim"):
        got = f"a {type(batch.labels).__name__}"
        raise ValueError(f"batch.labels must be class indices (b,) or probabilities (b, c) to be mixed, got {got}")
    _check.classes(batch.labels, batch.inputs.shape[:1], num_classes)
    _check.fits(batch.inputs.shape[0] * num_classes, num_classes=num_classes)
    if batch.labels.ndim == 2:
        return batch.labels.astype(batch.inputs.dtype)
    rows = jax.nn.one_hot(batch.labels, num_classes, dtype=batch.inputs.dtype)
    return jnp.where((jnp.sum(rows, 1) > 0)[:, None], rows, jnp.nan)
