"""Noise on the update. Without a bound on what one example adds (clipping) it has no epsilon: see `dp_sgd`.

Zhu et al., Deep Leakage from Gradients, NeurIPS 2019, section 5.1: Gaussian and Laplacian noise, variance 1e-4 to 1e-1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Updates


class KeyState(NamedTuple):
    """The key of the next update's randomness."""

    key: PRNGKeyArray


def stochastic(key: PRNGKeyArray, apply_fn: Callable[[PRNGKeyArray, Updates], Updates]) -> optax.GradientTransformation:
    """`apply_fn(key, update)` with a new key for every update, all of them from `key`."""

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        following, current = jax.random.split(state.key)
        return apply_fn(current, updates), KeyState(following)

    return optax.GradientTransformation(lambda params: KeyState(key), update_fn)


def gaussian_noise(key: PRNGKeyArray, scale: float) -> optax.GradientTransformation:
    """Adds scale * N(0, 1) to every entry.

    Args:
        key: Of one client. Build the transformation inside the `vmap` over clients, from a key of each: `vmap` over
            `init` alone gives all of them the same noise.
        scale: Standard deviation >= 0.

    Returns:
        The transformation; its state is the key of the next update.

    Raises:
        ValueError: If `scale` is negative.
    """
    return _additive(key, scale, jax.random.normal)


def laplace_noise(key: PRNGKeyArray, scale: float) -> optax.GradientTransformation:
    """Adds scale * Laplace(0, 1) to every entry: the standard deviation is sqrt(2) * scale.

    Args:
        key: As for `gaussian_noise`.
        scale: The diversity b >= 0 of the density exp(-|x| / b) / 2b.

    Returns:
        The transformation; its state is the key of the next update.

    Raises:
        ValueError: If `scale` is negative.
    """
    return _additive(key, scale, jax.random.laplace)


def _additive(key: PRNGKeyArray, scale: float, sampler: Callable[..., Any]) -> optax.GradientTransformation:
    _check.not_negative(scale=scale)
    return stochastic(
        key, lambda k, updates: optax.tree.add_scale(updates, scale, optax.tree.random_like(k, updates, sampler))
    )
