"""Observations of several victims: joined to one, and replaced by noise as a negative control."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray

from gia_jax.base import Observation
from gia_jax.precision import widened, widened_tree


def stack(observations: Sequence[Observation]) -> Observation:
    """Joins the observations of several victims that hold the same parameters, for `jax.vmap` or `sweep.study`.

    Args:
        observations: Observations of the same parameters, one of each victim, at least 1. Their updates and what is
            granted must have equal structures, shapes and types.

    Returns:
        One observation, in which every leaf of `update` and `extra` has a leading axis of victims. The parameters are
        those of the first observation.

    Raises:
        ValueError: If there are no observations, or if the structure, a shape or a type of one differs from the first.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import Observation, stack
        >>> params, first, second = ({"w": jnp.array(values)} for values in ([1.0, 1.0], [2.0, 3.0], [4.0, 5.0]))
        >>> stack([Observation(params, first), Observation(params, second)]).update["w"].tolist()
        [[2.0, 3.0], [4.0, 5.0]]
    """
    if not observations:
        raise ValueError("observations must hold at least 1 observation, got none")
    parts = [(one.update, one.extra) for one in observations]
    wanted = jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), parts[0])
    for i, part in enumerate(parts):
        found = jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), part)
        if found != wanted:
            raise ValueError(f"observations[{i}] must be like observations[0], {wanted}, got {found}")
    return Observation(observations[0].params, *jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))


def control(key: PRNGKeyArray, observations: Observation) -> Observation:
    """Replaces the updates by Gaussian noise of the same norms: the negative control of an attack.

    What an attack makes of noise comes from its prior and its starting point. So the score of an attack says something
    about the gradient only as far as it is better than the score of the same attack on the control.

    Args:
        key: Random key of the noise. Every victim gets noise of its own.
        observations: Observations with a leading axis of victims, such as those of `stack`. The updates must be of a
            floating-point type.

    Returns:
        The observations with noise for updates, and all else as it was. Each leaf of an update keeps its L2 norm and
        its type. A leaf of zeros stays zeros, and one that holds a NaN or an infinity becomes NaN.

    Raises:
        ValueError: If there are no updates, or if a leaf is of integers or lacks the axis of victims.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Observation, control
        >>> seen = Observation({"w": jnp.array([1.0, 1.0, 1.0])}, {"w": jnp.array([[3.0, 0.0, 4.0]])})
        >>> noise = jax.jit(control)(jax.random.key(0), seen).update["w"]
        >>> round(float(jnp.linalg.norm(noise)), 4)
        5.0
    """
    leaves = jax.tree.leaves_with_path(observations.update)
    if not leaves:
        raise ValueError("observations.update must have leaves, got none")
    victims = jnp.shape(leaves[0][1])[:1]
    for path, leaf in leaves:
        name = f"observations.update{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{name} must be of a floating type, got {leaf.dtype}")
        if not leaf.shape or leaf.shape[:1] != victims:
            raise ValueError(f"{name} must have a leading axis of the {victims} victims, got the shape {leaf.shape}")

    def one(key: PRNGKeyArray, update: Any) -> Any:
        # One draw for all leaves: the random bits of each would be a program of their own.
        flat, unravel = ravel_pytree(widened_tree(update))
        return jax.tree.map(_of_norm, unravel(jax.random.normal(key, flat.shape, flat.dtype)), update)

    return observations._replace(update=jax.vmap(one)(jax.random.split(key, victims[0]), observations.update))


def _of_norm(noise: Array, leaf: Array) -> Array:
    """The noise with the norm of a leaf, in the leaf's type; entries are scaled before they are squared."""
    wide = widened(leaf)
    largest = jnp.max(jnp.abs(wide), initial=0)
    norm = jnp.linalg.norm(wide / jnp.where(largest > 0, largest, 1))
    scaled = noise * (norm / jnp.maximum(jnp.linalg.norm(noise), jnp.finfo(noise.dtype).tiny)) * largest
    return scaled.astype(leaf.dtype)
