"""Fake gradients, the defense that Jin et al. propose against their own attack: CAFE, NeurIPS 2021."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Updates
from gia_jax.defenses.noise import stochastic
from gia_jax.precision import widened


def fake_gradients(key: PRNGKeyArray, scale: Float[ArrayLike, ""], *, count: int = 10) -> optax.GradientTransformation:
    """Shares random numbers in the order of the true entries: the largest number in the place of the largest entry.

    Of `count` updates drawn from scale * N(0, 1), each tensor sorted and put in the order of the true one, the nearest
    to the true update in L2 norm is shared. What is shared holds the ranks of the entries within each tensor and no
    magnitude; the sorted numbers of a large tensor hardly vary, so that there `count` changes little.

    Departures: the paper's worker draws its fake updates once, for all rounds, and again where none is nearer than a
    threshold; here every round draws anew, and there is no threshold.

    Args:
        key: Key of this transformation of one client, as for `gaussian_noise`.
        scale: Standard deviation, > 0 and finite. It is the scale of what is shared, whatever the gradient's: choose
            the learning rate for it.
        count: Updates drawn each round, >= 1.

    Returns:
        The transformation; its state is the key of the next update. Its derivative is that of the identity, a
        straight-through estimate: the true one is 0.

    Raises:
        ValueError: If `scale` is not positive and finite, or `count` no positive integer.
    """
    _check.scalar(scale=scale)
    _check.positive(scale=scale)
    _check.integer(count=count)
    _check.fits(2 * int(count), count=count)
    _check.finite("scale", scale)

    def apply_fn(key: PRNGKeyArray, updates: Updates) -> Updates:
        true = jax.tree.map(lambda leaf: jax.lax.stop_gradient(widened(leaf)), updates)

        def fake(key: PRNGKeyArray) -> Updates:
            drawn = optax.tree.random_like(key, true, jax.random.normal)
            return jax.tree.map(lambda numbers, leaf: in_order_of(leaf, scale * numbers), drawn, true)

        def distance(key: PRNGKeyArray) -> Float[Array, ""]:
            return jnp.asarray(optax.tree.norm(optax.tree.sub(fake(key), true), squared=True))

        keys = jax.random.split(key, count)
        nearest = fake(keys[jnp.argmin(jax.lax.map(distance, keys))])
        # What is shared is the fake number itself: the difference added is 0, with the derivative of the identity.
        return jax.tree.map(
            lambda leaf, f: f.astype(leaf.dtype) + (leaf - jax.lax.stop_gradient(leaf)), updates, nearest
        )

    return stochastic(key, apply_fn)


def in_order_of(leaf: Float[Array, "*shape"], numbers: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The numbers rearranged so that they have the ranks of the entries of `leaf`; the first of equal ones is less."""
    ranks = jnp.argsort(jnp.argsort(leaf.reshape(-1)))
    return jnp.sort(numbers.reshape(-1))[ranks].reshape(leaf.shape)
