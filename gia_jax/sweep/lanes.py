"""Lanes: the restarts of all victims that run side by side, their random keys and their observations.

A lane is one restart on one victim. Lane number i is restart i % r of victim i // r.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Observation

SHARED_PARAMS = Observation(params=None, update=0, extra=0)  # vmap axes: one set of parameters, many victims


def victim_keys(key: PRNGKeyArray, num_victims: int, num_restarts: int) -> Key[Array, "v r"]:
    """Makes a random key for every restart of every victim, which does not depend on how many of them there are.

    Args:
        key: Random key of the attacker.
        num_victims: Number v of victims.
        num_restarts: Number r of restarts of each victim.

    Returns:
        The keys, shape (v, r).
    """
    per_victim = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_victims))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(per_victim, jnp.arange(num_restarts))


def finite_victims(observations: Observation) -> tuple[int, Bool[np.ndarray, " v"]]:
    """Counts the victims, and finds those with a finite observation. A warning names the others.

    Args:
        observations: Observations of v victims in one, as `gia_jax.stack` makes it.

    Returns:
        The number v, and for every victim whether its observation is finite, shape (v,).

    Raises:
        ValueError: If the parameters are not finite, no victim has a finite observation, or a leaf of the updates or of
            what is granted has no leading axis of victims.
    """
    _check.finite("observations.params", observations.params)
    both = {"update": observations.update, "extra": observations.extra}
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(observations.update)]
    if not shapes or not shapes[0] or not shapes[0][0]:
        raise ValueError(
            f"observations.update must have a first axis of victims, at least 1, got {shapes[:1] or 'none'}"
        )
    victims = shapes[0][0]
    finite = np.ones(victims, bool)
    for path, leaf in jax.tree.leaves_with_path(both):
        if jnp.shape(leaf)[:1] != (victims,):
            name = "observations" + jax.tree_util.keystr(path)
            raise ValueError(f"{name} must have a first axis of {victims} victims, got shape {jnp.shape(leaf)}")
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            finite &= np.isfinite(np.asarray(leaf)).reshape(victims, -1).all(1)
    if not finite.any():
        _check.finite("observations", (observations.update, observations.extra))
    if not finite.all():
        names = ", ".join(map(str, np.flatnonzero(~finite)))
        warnings.warn(f"the observations of victims {names} are not finite: they are marked so", stacklevel=3)
    return victims, finite


def over_lanes(fn: Callable[..., Any], in_axes: tuple[Any, ...], lanes: int) -> Callable[..., Any]:
    """Maps a function over lanes by `jax.vmap`, but calls it as it is for a single lane.

    Under `jax.vmap` both branches of a `jax.lax.cond` are computed, and for a single lane only the one that is needed.

    Args:
        fn: Function of one lane.
        in_axes: Axes of the arguments as for `jax.vmap`, each 0 or None or a tree of them.
        lanes: Number of lanes.

    Returns:
        The function of all lanes, whose results have a leading axis of lanes.
    """
    if lanes > 1:
        return jax.vmap(fn, in_axes)

    def first(axis: Any, part: Any) -> Any:
        return part if axis is None else jax.tree.map(lambda leaf: leaf[0], part)

    def one_lane(*args: Any) -> Any:
        lane = jax.tree.map(first, in_axes, args, is_leaf=lambda axis: axis is None)
        return jax.tree.map(lambda leaf: leaf[None], fn(*lane))

    return one_lane


def lane_indices(first: int, lanes: int, total: int) -> np.ndarray:
    """Returns the numbers of a batch of lanes. The last number fills up the last batch, and its results are dropped.

    Args:
        first: Number of the first lane of the batch.
        lanes: Number of lanes of every batch.
        total: Number of lanes in all.

    Returns:
        The numbers, shape (lanes,).
    """
    return np.minimum(np.arange(first, first + lanes), total - 1)


def selected(observations: Observation, victims: np.ndarray) -> Observation:
    """Returns the observations of some victims.

    Args:
        observations: Observations of v victims in one, as `gia_jax.stack` makes it.
        victims: Indices of the victims, in which one may occur several times.

    Returns:
        The observations, with a leading axis of as many victims as there are indices.
    """
    params, update, extra = observations
    update, extra = jax.tree.map(lambda leaf: leaf[victims], (update, extra))
    return Observation(params, update, extra)
