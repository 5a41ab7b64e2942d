"""Clipping of the whole update. Alone it is no defense: cosine similarity does not see it."""

import optax

from gia_jax import _check


def clip(norm: float) -> optax.GradientTransformation:
    """Scales the update to an L2 norm of at most `norm`, all parameters together: `optax.clip_by_global_norm`, checked.

    Pascanu et al., On the Difficulty of Training Recurrent Neural Networks, ICML 2013, algorithm 1.

    Args:
        norm: Largest L2 norm > 0.

    Returns:
        The transformation, without state.

    Raises:
        ValueError: If `norm` is not positive.
    """
    _check.positive(norm=norm)
    return optax.clip_by_global_norm(norm)
