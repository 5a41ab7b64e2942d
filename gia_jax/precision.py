"""Half precision has too few values for norms, tails and probabilities: these are computed in more."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def widened(leaf: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """In float32, or in its own type where that is wider."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
