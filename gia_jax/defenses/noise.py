"""Random noise on the update.

Without a bound on what one example adds (clipping) the noise has no epsilon: see `dp_sgd`. Zhu et al., Deep Leakage
from Gradients, NeurIPS 2019, section 5.1: Gaussian and Laplacian noise, variance 1e-4 to 1e-1.
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
    """The state of a transformation that draws.

    Attributes:
        key: Key of the next update's randomness.
    """

    key: PRNGKeyArray


def stochastic(key: PRNGKeyArray, apply_fn: Callable[[PRNGKeyArray, Updates], Updates]) -> optax.GradientTransformation:
    """Builds the transformation that calls `apply_fn` with a new key for every update.

    Two of these with one key draw the same bits: each transformation of each client needs a key of its own.

    Args:
        key: Key that the keys of all updates are split off.
        apply_fn: Function `(key, update) -> update`.

    Returns:
        The transformation. Its state is the key of the next update.
    """

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        following, current = jax.random.split(state.key)
        return apply_fn(current, updates), KeyState(following)

    return optax.GradientTransformation(lambda params: KeyState(key), update_fn)


def gaussian_noise(key: PRNGKeyArray, scale: Float[ArrayLike, ""]) -> optax.GradientTransformation:
    """Adds scale * N(0, 1) to every entry of the update.

    The expectation of what is shared is the update itself, and an attacker knows nothing of the noise. It attacks the
    client without this transformation, with `matching.objectives.euclidean`, which is then the likelihood.

    Args:
        key: Key of this transformation of one client. Build the transformation inside the `vmap` over clients: `vmap`
            over `init` alone gives all of them the same noise, and so does one key in two transformations.
        scale: Standard deviation of the noise, at least 0 and finite.

    Returns:
        The transformation. Its state is the key of the next update.

    Raises:
        ValueError: If `scale` is negative or not finite.

    Examples:
        The next update gets other noise than the first:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import defenses
        >>> noise = defenses.gaussian_noise(jax.random.key(0), 0.1)
        >>> update = jnp.zeros(1000)
        >>> first, state = noise.update(update, noise.init(update))
        >>> bool(abs(first.std() - 0.1) < 0.02)
        True
        >>> second, _ = noise.update(update, state)
        >>> bool((first == second).all())
        False
    """
    return _additive(key, scale, jax.random.normal)


def laplace_noise(key: PRNGKeyArray, scale: Float[ArrayLike, ""]) -> optax.GradientTransformation:
    """Adds scale * Laplace(0, 1) to every entry of the update, with a standard deviation of sqrt(2) * scale.

    The expectation of what is shared is the update itself. An attacker attacks the client without this transformation,
    with `matching.objectives.l1`, the L1 distance, which is then the likelihood.

    Args:
        key: Key of this transformation of one client. Build the transformation inside the `vmap` over clients: `vmap`
            over `init` alone gives all of them the same noise, and so does one key in two transformations.
        scale: Diversity b of the density exp(-|x| / b) / 2b, at least 0 and finite.

    Returns:
        The transformation. Its state is the key of the next update.

    Raises:
        ValueError: If `scale` is negative or not finite.

    Examples:
        The mean magnitude of the noise is its scale:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import defenses
        >>> noise = defenses.laplace_noise(jax.random.key(0), 0.1)
        >>> update = jnp.zeros(1000)
        >>> shared, _ = noise.update(update, noise.init(update))
        >>> bool(abs(jnp.abs(shared).mean() - 0.1) < 0.02)
        True
    """
    return _additive(key, scale, jax.random.laplace)


def add_noise(key: PRNGKeyArray, updates: Updates, scale: Float[ArrayLike, ""], sampler: Callable[..., Any]) -> Updates:
    """Adds scale times random samples to an update, drawn and added in float32 or wider.

    Args:
        key: Key of this draw.
        updates: Tree of floating-point arrays.
        scale: Factor of the samples, at least 0.
        sampler: Function `(key, shape, dtype) -> samples`, such as `jax.random.normal`.

    Returns:
        The noisy update, each leaf in its own type.
    """
    wide = jax.tree.map(widened, updates)
    noise = optax.tree.random_like(key, wide, sampler)
    return jax.tree.map(lambda leaf, w, n: (w + scale * n).astype(leaf.dtype), updates, wide, noise)


def _additive(
    key: PRNGKeyArray, scale: Float[ArrayLike, ""], sampler: Callable[..., Any]
) -> optax.GradientTransformation:
    """Checks `scale`, and builds the transformation that adds scale times samples of `sampler`."""
    _check.scalar(scale=scale)
    _check.not_negative(scale=scale)
    _check.finite("scale", scale)
    return stochastic(key, lambda k, updates: add_noise(k, updates, scale, sampler))
