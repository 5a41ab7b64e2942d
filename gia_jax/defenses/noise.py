"""Noise on the update. Without a bound on what one example adds (clipping) it has no epsilon: see `dp_sgd`.

Zhu et al., Deep Leakage from Gradients, NeurIPS 2019, section 5.1: Gaussian and Laplacian noise, variance 1e-4 to 1e-1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.typing import ArrayLike
from jaxtyping import Float, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Updates
from gia_jax.precision import widened


class KeyState(NamedTuple):
    """The key of the next update's randomness."""

    key: PRNGKeyArray


def stochastic(key: PRNGKeyArray, apply_fn: Callable[[PRNGKeyArray, Updates], Updates]) -> optax.GradientTransformation:
    """`apply_fn(key, update)` with a new key for every update, all of them from `key`.

    Two of these with one key draw the same bits: each transformation of each client needs a key of its own.
    """

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        following, current = jax.random.split(state.key)
        return apply_fn(current, updates), KeyState(following)

    return optax.GradientTransformation(lambda params: KeyState(key), update_fn)


def gaussian_noise(key: PRNGKeyArray, scale: Float[ArrayLike, ""]) -> optax.GradientTransformation:
    """Adds scale * N(0, 1) to every entry.

    Args:
        key: Key of this transformation of one client. Build it inside the `vmap` over clients: `vmap` over `init` alone
            gives all of them the same noise, and so does one key in two transformations.
        scale: Standard deviation, >= 0 and finite.

    Returns:
        The transformation; its state is the key of the next update. Its expectation is the update itself, and of the
        noise an attacker knows nothing: it attacks the client without this transformation, with `euclidean`, which
        is then the likelihood.

    Raises:
        ValueError: If `scale` is negative or not finite.
    """
    return _additive(key, scale, jax.random.normal)


def laplace_noise(key: PRNGKeyArray, scale: Float[ArrayLike, ""]) -> optax.GradientTransformation:
    """Adds scale * Laplace(0, 1) to every entry: the standard deviation is sqrt(2) * scale.

    Args:
        key: Key of this transformation of one client, as for `gaussian_noise`.
        scale: The diversity b of the density exp(-|x| / b) / 2b, >= 0 and finite.

    Returns:
        The transformation, as for `gaussian_noise`; the likelihood is the L1 distance.

    Raises:
        ValueError: If `scale` is negative or not finite.
    """
    return _additive(key, scale, jax.random.laplace)


def add_noise(key: PRNGKeyArray, updates: Updates, scale: Float[ArrayLike, ""], sampler: Callable[..., Any]) -> Updates:
    """Adds scale times samples, drawn and added in float32 at least."""
    wide = jax.tree.map(widened, updates)
    noise = optax.tree.random_like(key, wide, sampler)
    return jax.tree.map(lambda leaf, w, n: (w + scale * n).astype(leaf.dtype), updates, wide, noise)


def _additive(
    key: PRNGKeyArray, scale: Float[ArrayLike, ""], sampler: Callable[..., Any]
) -> optax.GradientTransformation:
    _check.scalar(scale=scale)
    _check.not_negative(scale=scale)
    _check.finite("scale", scale)
    return stochastic(key, lambda k, updates: add_noise(k, updates, scale, sampler))
