"""Drivers of attacks: they scan, map and choose, and know nothing of what is attacked."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Attack, AttackInfo, AttackState, Observation, ReconstructFn, Reconstruction


def advance(
    attack: Attack, key: PRNGKeyArray, state: Any, observation: Observation, *, start: Any, num_steps: int
) -> tuple[Any, AttackInfo]:
    """`num_steps` steps from step number `start`: step t draws from `fold_in(key, t)`, so a run may be cut anywhere.

    Args:
        attack: The attack.
        key: The key that the whole run passes to every call.
        state: From `attack.init` or the last call.
        observation: The observation.
        start: Steps done so far; may be traced.
        num_steps: Steps to do, static.

    Returns:
        The state and the stacked info, leaves (num_steps,).
    """

    def body(carry: Any, t: Array) -> tuple[Any, AttackInfo]:
        return attack.step(jax.random.fold_in(key, t), carry, observation)

    return jax.lax.scan(body, state, start + jnp.arange(num_steps))


def run(
    attack: Attack, key: PRNGKeyArray, observation: Observation, *, num_steps: int
) -> tuple[Reconstruction, AttackInfo]:
    """An attack from start to end.

    Args:
        attack: The attack.
        key: The attacker's own randomness, never the client's.
        observation: What the threat model grants.
        num_steps: Steps, >= 1, static.

    Returns:
        The reconstruction and the stacked info of every step.

    Raises:
        ValueError: A `num_steps` below one, or an observation with non-finite values (outside of a trace).
    """
    _check.positive(num_steps=num_steps)
    _check.finite("observation", observation)
    key_init, key_steps = jax.random.split(key)
    state = attack.init(key_init, observation)
    state, info = advance(attack, key_steps, state, observation, start=0, num_steps=num_steps)
    return attack.finalize(state.candidate, observation), info


class Best(NamedTuple):
    """The best candidate so far and its loss, infinite until a step has measured one, beside the latest candidate."""

    best: Any
    best_loss: Float[Array, ""]
    last: Any


def keep_best(attack: Attack) -> Attack:
    """The attack with the reconstruction of its lowest loss so far, the last one included, instead of its last.

    The loss is the attacker's own; a candidate is stored with the loss measured at that very candidate.
    """

    def init(key: PRNGKeyArray, observation: Observation) -> AttackState:
        candidate, memory = attack.init(key, observation)
        dtype = jnp.result_type(*jax.tree.leaves(observation.update))
        return AttackState(Best(candidate, jnp.asarray(jnp.inf, dtype), candidate), memory)

    def step(key: PRNGKeyArray, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
        best, best_loss, last = state.candidate
        (new, memory), info = attack.step(key, AttackState(last, state.memory), observation)
        better = info.loss < best_loss  # never true for NaN
        best = optax.tree.where(better, last, best)
        return AttackState(Best(best, jnp.where(better, info.loss, best_loss), new), memory), info

    def finalize(candidate: Best, observation: Observation) -> Reconstruction:
        last, best = attack.finalize(candidate.last, observation), attack.finalize(candidate.best, observation)
        use_last = last.is_finite & (last.loss <= candidate.best_loss)
        best = best._replace(loss=candidate.best_loss, is_finite=best.is_finite & jnp.isfinite(candidate.best_loss))
        return optax.tree.where(use_last, last, best)

    return Attack(init, step, finalize)


def continued(first: Attack, second: Attack, *, num_steps: int) -> Attack:
    """`second`, started from where `num_steps` of `first` end: a cheap solver for the way, an exact one for the end.

    Args:
        first: A gradient-matching attack, plain or under `keep_best`.
        second: A gradient-matching attack with the same unknowns; its labels and optimizer start as it says.
        num_steps: Steps of `first`, done in `init`, >= 1.

    Returns:
        The attack; only the steps of `second` are counted and reported.
    """
    _check.positive(num_steps=num_steps)

    def init(key: PRNGKeyArray, observation: Observation) -> AttackState:
        key_init, key_steps, key_second = jax.random.split(key, 3)
        state = first.init(key_init, observation)
        state, _ = advance(first, key_steps, state, observation, start=0, num_steps=num_steps)
        reached = state.candidate.best if isinstance(state.candidate, Best) else state.candidate
        candidate, memory = second.init(key_second, observation)
        return AttackState(candidate._replace(variables=reached.variables), memory)

    return second._replace(init=init)


def restarts(reconstruct_fn: ReconstructFn, num_restarts: int, *, batch_size: int | None = 16) -> ReconstructFn:
    """Repeats an attack from independent keys and keeps the reconstruction of the lowest finite loss.

    Args:
        reconstruct_fn: `(key, observation) -> reconstruction`.
        num_restarts: >= 1.
        batch_size: Restarts under one `vmap`, one batch after the other; None for all at once. More lanes than a
            processor can feed are slower each: 8 to 16 is best on a CPU.

    Returns:
        `(key, observation) -> ` the chosen reconstruction with the `restart_losses` of all. A restart that is not
        finite is never chosen unless all are, and then `is_finite` is False.
    """
    _check.positive(num_restarts=num_restarts, batch_size=batch_size)

    def best_fn(key: PRNGKeyArray, observation: Observation) -> Reconstruction:
        keys = jax.random.split(key, num_restarts)
        lanes = num_restarts if batch_size is None else min(batch_size, num_restarts)
        found = jax.lax.map(lambda k: reconstruct_fn(k, observation), keys, batch_size=lanes)
        return choose(found)

    return best_fn


def choose(found: Reconstruction) -> Reconstruction:
    """Of stacked reconstructions (leading axis r), the one of the lowest finite loss, with the losses of all."""
    usable = found.is_finite & jnp.isfinite(found.loss)
    index = jnp.argmin(jnp.where(usable, found.loss, jnp.inf))
    chosen = jax.tree.map(lambda leaf: leaf[index], found)
    return chosen._replace(restart_losses=found.loss)
