"""Clipping of the whole update to a largest L2 norm.

Alone it is no defense, because cosine similarity does not depend on the norm. Pascanu et al., On the Difficulty of
Training Recurrent Neural Networks, ICML 2013, algorithm 1.
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

    The numbers are those of `optax.clip_by_global_norm`. The derivative of optax's is NaN where the update vanishes,
    and the derivative of this one is there that of no clipping. In the direction of a clipped update itself the
    derivative is 0, because its length is lost.

    Args:
        norm: Largest L2 norm of the update, positive and finite.

    Returns:
        The transformation, which has no state. An attacker that knows the defense may leave it out and compare
        directions (`matching.objectives.cosine`).

    Raises:
        ValueError: If `norm` is not positive and finite.

    Examples:
        An update of norm 5 is scaled to norm 1:

        >>> import jax.numpy as jnp
        >>> from gia_jax import defenses
        >>> clip = defenses.clip(1.0)
        >>> update = jnp.array([3.0, 4.0])
        >>> shared, _ = clip.update(update, clip.init(update))
        >>> [f"{entry:.1f}" for entry in shared.tolist()]
        ['0.6', '0.8']
    """
    _check.scalar(norm=norm)
    _check.positive(norm=norm)
    _check.finite("norm", norm)
    return optax.stateless(lambda updates, _: clipped(updates, norm))


def clipped(update: Updates, norm: Float[ArrayLike, ""]) -> Updates:
    """Returns `update` times min(1, norm / |update|), each leaf in its own precision.

    Args:
        update: Tree of floating-point arrays. |update| is the L2 norm of all of them together.
        norm: Largest L2 norm, positive.

    Returns:
        The clipped update, a tree like `update`.
    """
    squared = jnp.asarray(optax.tree.norm(jax.tree.map(widened, update), squared=True))
    # A root of 0 has no derivative, and a quotient not taken must not divide by almost 0 either.
    length: Float[Array, ""] = jnp.sqrt(jnp.where(squared > 0, squared, 1))
    factor = norm / jnp.where((squared > 0) & (length > norm), length, norm)
    return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), update)
