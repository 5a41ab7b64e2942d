"""Lanes: the restarts of all victims under all settings that run side by side, their random keys and observations.

A lane is one restart on one victim under one setting. Of s settings, v victims and r restarts, lane number i is restart
i % r of victim i // r % v under setting i // (v r).
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Key, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import Observation
from gia_jax.sweep.devices import AXIS, spread

SHARED_PARAMS = Observation(params=None, update=0, extra=0)  # vmap axes: one set of parameters, many victims
OF_LANE = (0, SHARED_PARAMS)  # vmap axes of a setting with an observation


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
        observations: Observations of v victims, stacked by `gia_jax.stack`.

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
        warnings.warn(f"the observations of victims {names} are not finite: their is_finite is False", stacklevel=3)
    return victims, finite


def over_lanes(
    fn: Callable[..., Any], in_axes: tuple[Any, ...], lanes: int, mesh: Mesh | None = None
) -> Callable[..., Any]:
    """Maps a function over lanes by `jax.vmap`, but calls it as it is for a single lane.

    Under `jax.vmap` both branches of a `jax.lax.cond` are computed, and for a single lane only the one that is needed.

    Args:
        fn: Function of one lane.
        in_axes: Axes of the arguments as for `jax.vmap`, each 0 or None or a tree of them.
        lanes: Number of lanes.
        mesh: Mesh with the axis "lanes", over whose devices the lanes are spread in equal numbers. None takes the
            default device.

    Returns:
        The function of all lanes, whose results have a leading axis of lanes.
    """
    if mesh is not None:
        return spread(over_lanes(fn, in_axes, lanes // mesh.shape[AXIS]), mesh, AXIS, in_axes)
    if lanes > 1:
        return jax.vmap(fn, in_axes)

    def first(axis: Any, part: Any) -> Any:
        return part if axis is None else jax.tree.map(lambda leaf: leaf[0], part)

    def one_lane(*args: Any) -> Any:
        lane = jax.tree.map(first, in_axes, args, is_leaf=lambda axis: axis is None)
        return jax.tree.map(lambda leaf: leaf[None], fn(*lane))

    return one_lane


class Lanes(NamedTuple):
    """All lanes of a run, and how many of them run side by side.

    Attributes:
        keys: Random key of every restart of every victim, shape (v, r). The keys are the same under every setting, so
            that settings are compared on equal starts.
        num_settings: Number s of settings.
        settings: Settings of the attack, a tree of arrays with a leading axis of length s, or without leaves.
        observations: Observations of v victims, stacked by `gia_jax.stack`.
        size: Number of lanes that run side by side.
        first: Index of the first lane that this process runs.
        last: Index of the lane after the last one that this process runs.
    """

    keys: Key[Array, "v r"]
    num_settings: int
    settings: PyTree[Any]
    observations: Observation
    size: int
    first: int
    last: int

    @property
    def num_lanes(self) -> int:
        """Number of lanes that this process runs."""
        return self.last - self.first

    def batch(self, place: int) -> tuple[Key[Array, " lanes"], tuple[PyTree[Any], Observation]]:
        """Returns the random keys, and the settings with the observations, of lanes that run side by side.

        The last batch of the process is padded with copies of its last lane, whose results are dropped.

        Args:
            place: Index of the first of these lanes among the lanes of this process.
        """
        numbers = self.first + np.minimum(np.arange(place, place + self.size), self.num_lanes - 1)
        victims, restarts = self.keys.shape
        setting, victim = numbers // (victims * restarts), numbers // restarts % victims
        params, update, extra = self.observations
        settings = jax.tree.map(lambda leaf: leaf[setting], self.settings)
        update, extra = jax.tree.map(lambda leaf: leaf[victim], (update, extra))
        return self.keys[victim, numbers % restarts], (settings, Observation(params, update, extra))
