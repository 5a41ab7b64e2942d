"""Drivers of attacks: they scan, map and choose, and know nothing of what is attacked."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import Attack, AttackInfo, AttackState, Observation, ReconstructFn, Reconstruction, WarmUp
from gia_jax.precision import wide_dtype


def advance(
    attack: Attack, key: PRNGKeyArray, state: Any, observation: Observation, *, start: Any, num_steps: int
) -> tuple[Any, AttackInfo]:
    """`num_steps` steps from step number `start`: step t draws from `fold_in(key, t)`, so a run may be cut anywhere.

    Args:
        attack: The attack.
        key: The key that the whole run passes to every call.
        state: State from `attack.init` or the last call.
        observation: The observation.
        start: Number of steps done so far; it may be traced.
        num_steps: Number of steps to do, static.

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
        ValueError: A `num_steps` that is no positive integer, or an observation with non-finite values (outside of a
            trace).
    """
    _check.integer(1, 2**31 - 1, num_steps=num_steps)
    _check.fits(len(AttackInfo._fields) * num_steps, num_steps=num_steps)
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

    def watched(state: AttackState, observation: Observation) -> AttackState:
        dtype = wide_dtype(jnp.result_type(*jax.tree.leaves(observation.update)))
        return AttackState(Best(state.candidate, jnp.asarray(jnp.inf, dtype), state.candidate), state.memory)

    def init(key: PRNGKeyArray, observation: Observation) -> AttackState:
        return watched(attack.init(key, observation), observation)

    def step(key: PRNGKeyArray, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
        best, best_loss, last = state.candidate
        (new, memory), info = attack.step(key, AttackState(last, state.memory), observation)
        loss = info.loss.astype(best_loss.dtype)
        better = loss < best_loss  # never true for NaN
        best = optax.tree.where(better, last, best)
        return AttackState(Best(best, jnp.where(better, loss, best_loss), new), memory), info

    def finalize(candidate: Best, observation: Observation) -> Reconstruction:
        last, best = attack.finalize(candidate.last, observation), attack.finalize(candidate.best, observation)
        use_last = last.is_finite & (last.loss <= candidate.best_loss)
        best_loss = candidate.best_loss.astype(best.loss.dtype)
        best = best._replace(loss=best_loss, is_finite=best.is_finite & jnp.isfinite(best_loss))
        return optax.tree.where(use_last, last, best)

    kept, warm_up = Attack(init, step, finalize), attack.warm_up
    if warm_up is None:
        return kept

    def hand_over(key: PRNGKeyArray, state: AttackState, observation: Observation) -> AttackState:
        return watched(warm_up.hand_over(key, state, observation), observation)

    return kept._replace(warm_up=warm_up._replace(hand_over=hand_over))


def warmed_up(attack: Attack, warm_up: WarmUp) -> Attack:
    """The attack started from where another one ends.

    Args:
        attack: The attack; its own `init` is not used.
        warm_up: What runs first, inside of the new `init`.

    Returns:
        The attack; only its own steps are counted and reported.
    """

    def init(key: PRNGKeyArray, observation: Observation) -> AttackState:
        key_init, key_steps, key_hand_over = jax.random.split(key, 3)
        state = warm_up.attack.init(key_init, observation)
        state, _ = advance(warm_up.attack, key_steps, state, observation, start=0, num_steps=warm_up.num_steps)
        return warm_up.hand_over(key_hand_over, state, observation)

    return attack._replace(init=init, warm_up=warm_up)


def continued(first: Attack, second: Attack, *, num_steps: int, num_starts: int = 1) -> Attack:
    """`second`, started from where `num_steps` of `first` end: a cheap solver for the way, an exact one for the end.

    Args:
        first: A gradient-matching attack, plain or under `keep_best`.
        second: A gradient-matching attack with the same unknowns; its labels and optimizer start as it says.
        num_steps: Number of steps of `first`, done in `init`, at least 1.
        num_starts: Number of independent starts of `first`, at least 1; `second` goes on from the one of the lowest
            finite loss.

    Returns:
        The attack; only the steps of `second` are counted and reported.

    Raises:
        ValueError: A count that is no positive integer.
    """
    _check.integer(num_steps=num_steps, num_starts=num_starts)

    def hand_over(key: PRNGKeyArray, state: AttackState, observation: Observation) -> AttackState:
        candidate, memory = second.init(key, observation)
        if num_starts > 1:
            reached = best_start(first, state, observation)
        else:
            reached = state.candidate.best if isinstance(state.candidate, Best) else state.candidate
        return AttackState(candidate._replace(variables=reached.variables), memory)

    starts = from_starts(first, num_starts) if num_starts > 1 else first
    return warmed_up(second, WarmUp(starts, num_steps, hand_over))


def from_starts(attack: Attack, num_starts: int) -> Attack:
    """Independent starts of an attack side by side, every leaf of the state with a leading axis of starts.

    Args:
        attack: The attack.
        num_starts: Number of starts, at least 1; `best_start` picks one.

    Returns:
        The attack; its info is that of the start of the lowest finite loss, and so is its reconstruction.
    """
    keys_of = functools.partial(jax.random.split, num=num_starts)

    def init(key: PRNGKeyArray, observation: Observation) -> AttackState:
        _check.fits(num_starts * sum(leaf.size for leaf in jax.tree.leaves(observation.update)), num_starts=num_starts)
        return jax.vmap(attack.init, (0, None))(keys_of(key), observation)

    def step(key: PRNGKeyArray, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
        state, info = jax.vmap(attack.step, (0, 0, None))(keys_of(key), state, observation)
        return state, _lowest(info, info.loss)

    def finalize(candidate: Any, observation: Observation) -> Reconstruction:
        return choose(jax.vmap(attack.finalize, (0, None))(candidate, observation))

    starts, warm_up = Attack(init, step, finalize), attack.warm_up
    if warm_up is None:
        return starts

    def hand_over(key: PRNGKeyArray, state: AttackState, observation: Observation) -> AttackState:
        return jax.vmap(warm_up.hand_over, (0, 0, None))(keys_of(key), state, observation)

    return warmed_up(starts, WarmUp(from_starts(warm_up.attack, num_starts), warm_up.num_steps, hand_over))


def best_start(attack: Attack, state: AttackState, observation: Observation) -> Any:
    """The candidate of the lowest finite loss of all starts of `from_starts`, or the best one that `keep_best` kept."""
    candidate = state.candidate
    if isinstance(candidate, Best):
        return _lowest(candidate.best, candidate.best_loss)
    return _lowest(candidate, jax.vmap(attack.finalize, (0, None))(candidate, observation).loss)


def _lowest(stacked: PyTree[Array], losses: Float[Array, " n"]) -> PyTree[Array]:
    """The member of a stack that has the lowest finite loss."""
    index = jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))
    return jax.tree.map(lambda leaf: leaf[index], stacked)


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
    _check.integer(1, 2**31 - 1, num_restarts=num_restarts)
    if batch_size is not None:
        _check.integer(batch_size=batch_size)

    def best_fn(key: PRNGKeyArray, observation: Observation) -> Reconstruction:
        keys = jax.random.split(key, num_restarts)
        lanes = num_restarts if batch_size is None else min(batch_size, num_restarts)
        found = jax.lax.map(lambda k: reconstruct_fn(k, observation), keys, batch_size=lanes)
        return choose(found)

    return best_fn


def choose(found: Reconstruction) -> Reconstruction:
    """The stacked reconstruction (leading axis r) of the lowest finite loss, with the losses of all."""
    chosen = _lowest(found, jnp.where(found.is_finite, found.loss, jnp.inf))
    return chosen._replace(restart_losses=found.loss)
