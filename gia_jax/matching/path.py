"""The path of an attack: what it would have returned, had it stopped after fewer steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Attack, AttackInfo, AttackState, Batch, Observation, Reconstruction
from gia_jax.matching.run import Best, Kept, planned_steps


def path_steps(num_points: int, num_steps: int) -> Int[np.ndarray, " p"]:
    """Returns the numbers of steps after which `keep_path` keeps a candidate.

    Args:
        num_points: Number p of points, from 1 to `num_steps`.
        num_steps: Number of steps of the run, at least 1.

    Returns:
        Increasing numbers of steps, spread evenly, whose last one is `num_steps`.

    Raises:
        ValueError: If a number is no integer in its range.

    Examples:
        >>> from gia_jax.matching import path_steps
        >>> path_steps(3, 10).tolist()
        [4, 7, 10]
    """
    _check.integer(1, 2**31 - 1, num_steps=num_steps)
    _check.integer(1, num_steps, num_points=num_points)
    return -(-np.arange(1, num_points + 1, dtype=np.int64) * num_steps // num_points)


def keep_path(attack: Attack, *, num_points: int, num_steps: int | None = None) -> Attack:
    """Makes an attack return, beside its reconstruction, those that it would have returned after fewer steps.

    They are kept in the state of the attack, and need nothing but what the attacker has. They show how a reconstruction
    came about: scored against the truth afterwards, the quality over steps.

    Args:
        attack: Attack to wrap. Its steps and its reconstruction stay the same.
        num_points: Number p of points, from 1 to the number of steps. The state of the attack holds as many candidates.
        num_steps: Number of steps over which the points are spread, as `path_steps` tells. It may be left out where
            `attack.num_steps` says it. The attack that is returned can be run for that number of steps alone.

    Returns:
        The attack. The `path` of its reconstruction is a batch whose leaves have a leading axis of length p, and whose
        last point is what `attack` returns after all steps. Of an attack under `keep_best` a point is the best
        candidate whose loss was measured by then; the loss of a candidate is measured by the step after it. In
        `keep_best(keep_path(attack))`, which `solve` makes, the points are the candidates that the steps led to, and
        the last one need not be the best. Wrap an attack that has parts, such as one by `continued`, as a whole.

    Raises:
        ValueError: If `num_points` is no integer from 1 to the number of steps, if the number of steps is missing or
            not the attack's own, or (from `init`) if the points do not fit into memory.

    Examples:
        The update of this client is its input, and plain gradient descent halves the distance with every step:

        >>> import jax, jax.numpy as jnp, optax
        >>> from gia_jax import gradient_matching, keep_path, observed, run
        >>> from gia_jax.matching import initializations
        >>> def client_fn(params, batch):  # gradient of the mean output of a linear model
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> params, update = {"kernel": jnp.array([1.0, 1.0])}, {"kernel": jnp.array([4.0, -8.0])}
        >>> seen = observed(params, update, inputs_like=jnp.zeros((1, 2)), labels=jnp.array([0]))
        >>> start = {"init_fn": initializations.given(jnp.zeros((1, 2))), "optimizer": optax.sgd(0.25)}
        >>> attack = keep_path(gradient_matching(client_fn, **start), num_points=2, num_steps=4)
        >>> found, _ = jax.jit(lambda key, seen: run(attack, key, seen))(jax.random.key(0), seen)
        >>> found.path.inputs.tolist()
        [[[3.0, -6.0]], [[3.75, -7.5]]]
    """
    num_steps = planned_steps(attack, num_steps)
    steps = path_steps(num_points, num_steps)

    def point_of(candidate: Any) -> Any:
        return candidate.best if isinstance(candidate, Best) else candidate

    def watched(state: AttackState) -> AttackState:
        like = point_of(state.candidate)
        _check.fits(num_points * sum(leaf.size for leaf in jax.tree.leaves(like)), num_points=num_points)
        points = jax.tree.map(lambda leaf: jnp.zeros((num_points, *leaf.shape), leaf.dtype), like)
        return AttackState(Kept(points, jnp.zeros((), jnp.int32), state.candidate), state.memory)

    def init(key: PRNGKeyArray, observation: Observation) -> AttackState:
        return watched(attack.init(key, observation))

    def step(key: PRNGKeyArray, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
        points, done, last = state.candidate
        (last, memory), info = attack.step(key, AttackState(last, state.memory), observation)
        # Every step overwrites the point that is next, the last time at the step of the point: no step needs a branch,
        # both sides of which `jax.vmap` would compute.
        place = jnp.sum(jnp.asarray(steps, jnp.int32) <= done)
        points = jax.tree.map(lambda kept, leaf: kept.at[place].set(leaf), points, point_of(last))
        return AttackState(Kept(points, done + 1, last), memory), info

    def finalize(candidate: Kept, observation: Observation) -> Reconstruction:
        def batch_of(point: Any) -> Batch:
            if isinstance(candidate.last, Best):  # of equal candidates either may be returned: no loss is computed
                point = Best(point, candidate.last.best_loss, point)
            return attack.finalize(point, observation).batch

        found = attack.finalize(candidate.last, observation)
        path = jax.lax.map(batch_of, jax.tree.map(lambda leaf: leaf[:-1], candidate.points))
        path = jax.tree.map(lambda kept, last: jnp.concatenate([kept, last[None]]), path, found.batch)
        return found._replace(path=path)

    kept, warm_up = Attack(init, step, finalize, num_steps=num_steps), attack.warm_up
    if warm_up is None:
        return kept

    def hand_over(key: PRNGKeyArray, state: AttackState, observation: Observation) -> AttackState:
        return watched(warm_up.hand_over(key, state, observation))

    return kept._replace(warm_up=warm_up._replace(hand_over=hand_over))
