"""The attackers of the tables of defenses: one that starts as if it knew no defense, and one that only draws."""

from collections.abc import Callable
from typing import Any

import optax
from jaxtyping import Array

from gia_jax import Attack, Observation, keep_best
from gia_jax.base import InitFn, ObjectiveFn
from gia_jax.matching.objectives import cosine
from gia_jax.matching.run import continued


def informed(stage: Callable[[ObjectiveFn, int], Attack], objective_fn: ObjectiveFn, num_steps: int) -> Attack:
    """`stage(objective_fn, steps)`; where the objective is not the cosine, after half of the steps on the cosine.

    That half is done in the attack's start: the attack itself has `counted_steps`.
    """
    later = counted_steps(objective_fn, num_steps)
    if later == num_steps:
        return keep_best(stage(objective_fn, num_steps))
    first = keep_best(stage(cosine, num_steps - later))
    return keep_best(continued(first, stage(objective_fn, later), num_steps=num_steps - later))


def counted_steps(objective_fn: ObjectiveFn, num_steps: int) -> int:
    """Of `informed`, those that are not in its start."""
    return num_steps if objective_fn is cosine else num_steps - num_steps // 2


def redrawn(draw_fn: InitFn) -> optax.GradientTransformationExtraArgs:
    """In place of an optimizer: the next candidate is drawn like the first, which makes an attack a random search."""

    def update(updates: Any, state: Any, params: Array, *, key: Array, **_: Any) -> tuple[Any, Any]:
        del updates
        return draw_fn(key, Observation((), (), {"inputs_like": params})) - params, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
