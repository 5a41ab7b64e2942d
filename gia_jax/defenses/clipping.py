"""Clipping of the whole update. Alone it is no defense: cosine similarity does not see it.

Pascanu et al., On the Difficulty of Training Recurrent Neural Networks, ICML 2013, algorithm 1.
"""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gia_jax import _check
from gia_jax.base import Updates
from gia_jax.precision import widened


def clip(norm: Float[ArrayLike, ""]) -> optax.GradientTransformation:
    """Scales the update to an L2 norm of at most `norm`, all parameters together.

    The numbers are those of `optax.clip_by_global_norm`; its derivative is NaN where the update vanishes, this one's is
    that of no clipping. In the direction of a clipped update itself the derivative is 0: the length is lost.

    Args:
        norm: Largest L2 norm, positive and finite.

    Returns:
        The transformation, without state. An attacker that knows the defense may leave it out and compare directions
        (`objectives.cosine`).

    Raises:
        ValueError: If `norm` is not positive and finite.
    """
    _check.scalar(norm=norm)
    _check.positive(norm=norm)
    _check.finite("norm", norm)
    return optax.stateless(lambda updates, _: clipped(updates, norm))


def clipped(update: Updates, norm: Float[ArrayLike, ""]) -> Updates:
    """`update` times min(1, norm / |update|), each leaf in its own precision."""
    squared = jnp.asarray(optax.tree.norm(jax.tree.map(widened, update), squared=True))
    # A root of 0 has no derivative, and a quotient not taken must not divide by almost 0 either.
    length: Float[Array, ""] = jnp.sqrt(jnp.where(squared > 0, squared, 1))
    factor = norm / jnp.where((squared > 0) & (length > norm), length, norm)
    return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), update)
