"""Functions that run attacks: many steps, several restarts, and the choice among what was found, for any attack."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import Attack, AttackInfo, AttackState, Observation, ReconstructFn, Reconstruction, WarmUp
from gia_jax.precision import wide_dtype


def advance(
    attack: Attack, key: PRNGKeyArray, state: Any, observation: Observation, *, start: Any, num_steps: int
) -> tuple[Any, AttackInfo]:
    """Does some steps of an attack, from the state that earlier steps left.

    Step t draws from `jax.random.fold_in(key, t)`. So a run that is cut into several calls computes what one call does.

    Args:
        attack: Attack whose steps are done.
        key: Random key of the steps, the same one in every call of a run.
        state: State that `attack.init` or the last call returned.
        observation: What the attack receives.
        start: Number of steps that are done already, at least 0. It may be traced.
        num_steps: Number of steps to do, a Python integer of at least 0.

    Returns:
        The new state, and the `AttackInfo` of these steps, with fields of shape (num_steps,).

    Examples:
        Two steps are followed by three more:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import advance, gradient_matching, observed
        >>> def client_fn(params, batch):  # gradient of the mean output of a linear model
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> params, update = {"kernel": jnp.array([1.0, 1.0])}, {"kernel": jnp.array([0.5, -1.0])}
        >>> seen = observed(params, update, inputs_like=jnp.array([[0.0, 0.0]]), labels=jnp.array([0]))
        >>> attack, key = gradient_matching(client_fn), jax.random.key(0)
        >>> def two_and_three(key, seen):
        ...     state, first = advance(attack, key, attack.init(key, seen), seen, start=0, num_steps=2)
        ...     state, second = advance(attack, key, state, seen, start=2, num_steps=3)
        ...     return first.loss, second.loss
        >>> [losses.shape for losses in jax.eval_shape(two_and_three, key, seen)]
        [(2,), (3,)]
    """

    def body(carry: Any, t: Array) -> tuple[Any, AttackInfo]:
        return attack.step(jax.random.fold_in(key, t), carry, observation)

    return jax.lax.scan(body, state, start + jnp.arange(num_steps))


def run(
    attack: Attack, key: PRNGKeyArray, observation: Observation, *, num_steps: int | None = None
) -> tuple[Reconstruction, AttackInfo]:
    """Runs an attack from start to end.

    Nothing is compiled here: call it inside `jax.jit`, with the observation as an argument, so that the program serves
    every victim.

    Args:
        attack: Attack to run.
        key: Random key of the attacker, never one that the client used.
        observation: What the attack receives.
        num_steps: Number of steps, a Python integer of at least 1. It may be left out where `attack.num_steps` says it,
            and must then be no other number.

    Returns:
        The reconstruction, and the `AttackInfo` of all steps, with fields of shape (num_steps,).

    Raises:
        ValueError: If `num_steps` is no positive integer, is missing, is another number than the attack's schedule is
            made for, or its losses do not fit into memory, or if the observation holds values that are not finite,
            which is not checked inside of a trace.

    Examples:
        The update of this client is its input, and the attack finds it:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import gradient_matching, observed, run
        >>> def client_fn(params, batch):  # gradient of the mean output of a linear model
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> params, update = {"kernel": jnp.array([1.0, 1.0])}, {"kernel": jnp.array([0.5, -1.0])}
        >>> seen = observed(params, update, inputs_like=jnp.array([[0.0, 0.0]]), labels=jnp.array([0]))
        >>> attack = gradient_matching(client_fn)
        >>> attack_fn = jax.jit(lambda key, seen: run(attack, key, seen, num_steps=200))
        >>> reconstruction, info = attack_fn(jax.random.key(0), seen)
        >>> [round(pixel, 2) for pixel in reconstruction.batch.inputs[0].tolist()], info.loss.shape
        ([0.5, -1.0], (200,))
    """
    num_steps = planned_steps(attack, num_steps)
    _check.fits(len(AttackInfo._fields) * num_steps, num_steps=num_steps)
    _check.finite("observation", observation)
    key_init, key_steps = jax.random.split(key)
    state = attack.init(key_init, observation)
    state, info = advance(attack, key_steps, state, observation, start=0, num_steps=num_steps)
    return attack.finalize(state.candidate, observation), info


def planned_steps(attack: Attack, num_steps: int | None) -> int:
    """Returns the number of steps of a run: `num_steps`, or where that is None the one that the attack is made for.

    Raises:
        ValueError: If `num_steps` is no positive integer, if neither is known, or if they differ.
    """
    if num_steps is None:
        if attack.num_steps is None:
            raise ValueError("num_steps must be given for an attack without a schedule of its own, got None")
        return attack.num_steps
    _check.integer(1, 2**31 - 1, num_steps=num_steps)
    if attack.num_steps not in (None, num_steps):
        raise ValueError(f"num_steps must be the {attack.num_steps} of the attack's schedule, got {num_steps}")
    return num_steps


def solve(
    attack: Attack, *, num_steps: int | None = None, num_restarts: int = 1, batch_size: int | None = 16
) -> ReconstructFn:
    """Makes of an attack the function that most users want: the best step of the best of several restarts.

    It is `restarts` around `run` around `keep_best`, and all choices are made by the attacker's own loss.

    Args:
        attack: Attack to run.
        num_steps: Number of steps of each restart, at least 1. It may be left out where `attack.num_steps` says it.
        num_restarts: Number of restarts, at least 1.
        batch_size: Number of restarts that run side by side under one `jax.vmap`, at least 1; None for all.

    Returns:
        A function `(key, observation) -> reconstruction`, for `jax.jit` and `jax.vmap`.

    Raises:
        ValueError: If a count is no positive integer, or if `num_steps` is missing or not the attack's own.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import gradient_matching, observed, solve
        >>> def client_fn(params, batch):  # gradient of the mean output of a linear model
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> params, update = {"kernel": jnp.array([1.0, 1.0])}, {"kernel": jnp.array([0.5, -1.0])}
        >>> seen = observed(params, update, inputs_like=jnp.array([[0.0, 0.0]]), labels=jnp.array([0]))
        >>> attack_fn = jax.jit(solve(gradient_matching(client_fn), num_steps=200, num_restarts=2))
        >>> reconstruction = attack_fn(jax.random.key(0), seen)
        >>> [round(pixel, 2) for pixel in reconstruction.batch.inputs[0].tolist()], reconstruction.restart_losses.shape
        ([0.5, -1.0], (2,))
    """
    best, steps = keep_best(attack), planned_steps(attack, num_steps)

    def once_fn(key: PRNGKeyArray, observation: Observation) -> Reconstruction:
        return run(best, key, observation, num_steps=steps)[0]

    return restarts(once_fn, num_restarts, batch_size=batch_size)


class Best(NamedTuple):
    """The candidate of an attack under `keep_best`.

    Attributes:
        best: Candidate of the lowest loss so far.
        best_loss: Its loss, infinite before the first step.
        last: Latest candidate, from which the attack goes on.
    """

    best: Any
    best_loss: Float[Array, ""]
    last: Any


class Kept(NamedTuple):
    """The candidate of an attack under `gia_jax.keep_path`.

    Attributes:
        points: Candidates that are kept, every leaf with a leading axis of points.
        done: Number of steps that are done.
        last: Latest candidate, from which the attack goes on.
    """

    points: Any
    done: Int[Array, ""]
    last: Any


def keep_best(attack: Attack) -> Attack:
    """Makes an attack return the candidate of its lowest loss, instead of its last candidate.

    The loss is that of the attacker, which needs no true data. The last candidate takes part in the comparison.

    Args:
        attack: Attack to wrap. Its steps stay the same.

    Returns:
        The attack with the best candidate beside the last one in its state.

    Examples:
        A learning rate that is too large makes the attack diverge, and its starting point is then the best candidate:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import gradient_matching, keep_best, observed, run
        >>> def client_fn(params, batch):  # gradient of the mean output of a linear model
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> params, update = {"kernel": jnp.array([1.0, 1.0])}, {"kernel": jnp.array([0.5, -1.0])}
        >>> seen = observed(params, update, inputs_like=jnp.array([[0.0, 0.0]]), labels=jnp.array([0]))
        >>> import optax
        >>> attack = gradient_matching(client_fn, optimizer=optax.sgd(2.0))
        >>> def losses(key, seen):
        ...     return [run(one, key, seen, num_steps=3)[0].loss for one in (attack, keep_best(attack))]
        >>> last, best = jax.jit(losses)(jax.random.key(0), seen)
        >>> bool(best < last)
        True
    """

    def compared(candidate: Any) -> Any:
        return candidate.last if isinstance(candidate, Kept) else candidate  # a path goes on, whichever is the best

    def watched(state: AttackState, observation: Observation) -> AttackState:
        dtype = wide_dtype(jnp.result_type(*jax.tree.leaves(observation.update)))
        best = Best(compared(state.candidate), jnp.asarray(jnp.inf, dtype), state.candidate)
        return AttackState(best, state.memory)

    def init(key: PRNGKeyArray, observation: Observation) -> AttackState:
        return watched(attack.init(key, observation), observation)

    def step(key: PRNGKeyArray, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
        best, best_loss, last = state.candidate
        (new, memory), info = attack.step(key, AttackState(last, state.memory), observation)
        loss = info.loss.astype(best_loss.dtype)
        better = loss < best_loss  # never true for NaN
        best = optax.tree.where(better, compared(last), best)
        return AttackState(Best(best, jnp.where(better, loss, best_loss), new), memory), info

    def finalize(candidate: Best, observation: Observation) -> Reconstruction:
        last, best = candidate.last, candidate.best
        best = last._replace(last=best) if isinstance(last, Kept) else best
        # In a loop, so that the model is compiled once for both.
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), last, best)
        found = jax.lax.map(lambda one: attack.finalize(one, observation), both)
        last, best = (jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(2))
        use_last = last.is_finite & (last.loss <= candidate.best_loss)
        best_loss = candidate.best_loss.astype(best.loss.dtype)
        best = best._replace(loss=best_loss, is_finite=best.is_finite & jnp.isfinite(best_loss))
        return optax.tree.where(use_last, last, best)._replace(path=last.path)

    kept, warm_up = Attack(init, step, finalize, num_steps=attack.num_steps), attack.warm_up
    if warm_up is None:
        return kept

    def hand_over(key: PRNGKeyArray, state: AttackState, observation: Observation) -> AttackState:
        return watched(warm_up.hand_over(key, state, observation), observation)

    return kept._replace(warm_up=warm_up._replace(hand_over=hand_over))


def warmed_up(attack: Attack, warm_up: WarmUp) -> Attack:
    """Makes an attack start from where another one ends.

    Args:
        attack: Attack that runs second. Its own `init` is not used.
        warm_up: Attack that runs first, inside of the new `init`, with its number of steps and how it hands over.

    Returns:
        The attack. Its `num_steps` and its info are of the second attack's steps only.
    """

    def init(key: PRNGKeyArray, observation: Observation) -> AttackState:
        key_init, key_steps, key_hand_over = jax.random.split(key, 3)
        state = warm_up.attack.init(key_init, observation)
        state, _ = advance(warm_up.attack, key_steps, state, observation, start=0, num_steps=warm_up.num_steps)
        return warm_up.hand_over(key_hand_over, state, observation)

    return attack._replace(init=init, warm_up=warm_up)


def continued(
    first: Attack,
    second: Attack,
    *,
    num_steps: int,
    num_starts: int = 1,
) -> Attack:
    """Builds an attack that starts from where another one ends.

    A cheap optimizer can thus lead near the solution, and an exact one finish. The unknowns are handed over. The labels
    and the state of the optimizer are those that `second` starts with.

    Args:
        first: Gradient-matching attack that runs first, as it is or under `keep_best`, whose best candidate is then
            handed over.
        second: Gradient-matching attack that runs second.
        num_steps: Number of steps of `first`, which are done inside `init`, at least 1.
        num_starts: Number of independent starts of `first`, at least 1. `second` goes on from the one of the lowest
            finite loss.

    Returns:
        The attack. Its number of steps and its info are those of `second` only. Its `init` raises ValueError where the
        unknowns that are handed over are not like those of `second`.

    Raises:
        ValueError: If a count is no positive integer.

    Examples:
        Adam reaches a loss of about 1e-3, and plain gradient descent ends the search in one step:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import continued, gradient_matching, observed, run
        >>> def client_fn(params, batch):  # gradient of the mean output of a linear model
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> params, update = {"kernel": jnp.array([1.0, 1.0])}, {"kernel": jnp.array([0.5, -1.0])}
        >>> seen = observed(params, update, inputs_like=jnp.array([[0.0, 0.0]]), labels=jnp.array([0]))
        >>> import optax
        >>> first, second = gradient_matching(client_fn), gradient_matching(client_fn, optimizer=optax.sgd(0.5))
        >>> attack = continued(first, second, num_steps=50)
        >>> attack_fn = jax.jit(lambda key, seen: run(attack, key, seen, num_steps=1))
        >>> reconstruction, info = attack_fn(jax.random.key(0), seen)
        >>> [round(pixel, 4) for pixel in reconstruction.batch.inputs[0].tolist()], info.loss.shape
        ([0.5, -1.0], (1,))
    """
    _check.integer(num_steps=num_steps, num_starts=num_starts)

    def hand_over(key: PRNGKeyArray, state: AttackState, observation: Observation) -> AttackState:
        candidate, memory = second.init(key, observation)
        if num_starts > 1:
            reached = best_start(first, state, observation)
        else:
            reached = state.candidate.best if isinstance(state.candidate, Best) else state.candidate
        _check.same_structure("the unknowns of first", reached.variables, "those of second", candidate.variables)
        return AttackState(candidate._replace(variables=reached.variables), memory)

    starts = from_starts(first, num_starts) if num_starts > 1 else first
    return warmed_up(second, WarmUp(starts, num_steps, hand_over))


def from_starts(attack: Attack, num_starts: int) -> Attack:
    """Builds an attack that runs another one from several independent starts side by side.

    Args:
        attack: Attack to run.
        num_starts: Number of starts, at least 1. `best_start` picks one of them.

    Returns:
        The attack. Every leaf of its state has a leading axis of starts. Its info and its reconstruction are those of
        the start of the lowest finite loss.
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

    starts, warm_up = Attack(init, step, finalize, num_steps=attack.num_steps), attack.warm_up
    if warm_up is None:
        return starts

    def hand_over(key: PRNGKeyArray, state: AttackState, observation: Observation) -> AttackState:
        return jax.vmap(warm_up.hand_over, (0, 0, None))(keys_of(key), state, observation)

    return warmed_up(starts, WarmUp(from_starts(warm_up.attack, num_starts), warm_up.num_steps, hand_over))


def best_start(attack: Attack, state: AttackState, observation: Observation) -> Any:
    """Returns the candidate of the start with the lowest finite loss, or its best one under `keep_best`."""
    candidate = state.candidate
    if isinstance(candidate, Best):
        return _lowest(candidate.best, candidate.best_loss)
    return _lowest(candidate, jax.vmap(attack.finalize, (0, None))(candidate, observation).loss)


def _lowest(stacked: PyTree[Array], losses: Float[Array, " n"]) -> PyTree[Array]:
    """Returns the member of a stack that has the lowest finite loss, the first one where none is finite."""
    index = jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def restarts(reconstruct_fn: ReconstructFn, num_restarts: int, *, batch_size: int | None = 16) -> ReconstructFn:
    """Repeats an attack with independent random keys and keeps the reconstruction of the lowest finite loss.

    The loss is that of the attacker: the true data play no part in the choice.

    Args:
        reconstruct_fn: Attack to repeat, a function `(key, observation) -> reconstruction`.
        num_restarts: Number of restarts, at least 1.
        batch_size: Number of restarts that run side by side under one `jax.vmap`, at least 1. Batches run one after the
            other. None runs all restarts at once. On a CPU 8 to 16 are fastest.

    Returns:
        The repeated attack, a function `(key, observation) -> reconstruction`. Its `restart_losses` hold the losses of
        all restarts. A restart that is not finite is chosen only if none is finite, and then `is_finite` is False.

    Raises:
        ValueError: If a count is no positive integer.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import gradient_matching, observed, restarts, run
        >>> def client_fn(params, batch):  # gradient of the mean output of a linear model
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> params, update = {"kernel": jnp.array([1.0, 1.0])}, {"kernel": jnp.array([0.5, -1.0])}
        >>> seen = observed(params, update, inputs_like=jnp.array([[0.0, 0.0]]), labels=jnp.array([0]))
        >>> attack = gradient_matching(client_fn)
        >>> attack_fn = restarts(lambda key, seen: run(attack, key, seen, num_steps=5)[0], num_restarts=3)
        >>> reconstruction = jax.jit(attack_fn)(jax.random.key(0), seen)
        >>> reconstruction.restart_losses.shape, bool(reconstruction.loss == reconstruction.restart_losses.min())
        ((3,), True)
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
    """Chooses the reconstruction of the lowest finite loss.

    Args:
        found: Reconstructions of r restarts, every leaf with a leading axis of length r, at least 1.

    Returns:
        The chosen reconstruction without that axis. Its `restart_losses` are the losses of all, shape (r,).

    Examples:
        The third restart diverged, and the second has the lower loss of the others:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, Reconstruction, choose
        >>> batch = Batch(jnp.array([[[1.0]], [[2.0]], [[3.0]]]), jnp.array([[0], [0], [0]]))
        >>> losses, is_finite = jnp.array([0.5, 0.1, jnp.nan]), jnp.array([True, True, False])
        >>> chosen = jax.jit(choose)(Reconstruction(batch, losses, is_finite))
        >>> chosen.batch.inputs.tolist(), chosen.restart_losses.shape
        ([[2.0]], (3,))
    """
    chosen = _lowest(found, jnp.where(found.is_finite, found.loss, jnp.inf))
    return chosen._replace(restart_losses=found.loss)


def best_of(reconstruct_fns: Sequence[ReconstructFn]) -> ReconstructFn:
    """Attacks under several assumptions and keeps the reconstruction of the lowest finite loss.

    It is for what an attacker does not know of a client and cannot search for by a derivative, such as the number of
    local steps. The losses must be comparable: one objective, and one `divisor` of all clients that are simulated. An
    assumption with more freedom has a lower loss without being nearer to the truth.

    Args:
        reconstruct_fns: Attacks `(key, observation) -> reconstruction`, one for each assumption, at least one. They run
            one after the other, each with a key of its own.

    Returns:
        The attack, a function `(key, observation) -> reconstruction`. Its `restart_losses` are those of the
        assumptions, in their order. It raises ValueError where the reconstructions have different shapes.

    Raises:
        ValueError: If there is no attack.

    Examples:
        Of the clients that take one, two and three steps, the one of two explains the change, because the inputs are
        known to be near 1:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, box, clients, gradient_matching, matching, observed, solve
        >>> loss_fn = lambda params, batch: 0.5 * jnp.mean(jnp.square(params - batch.inputs))
        >>> def client_of(steps):
        ...     return clients.federated_averaging(loss_fn, learning_rate=0.5, local_epochs=steps, divisor=1.0)
        >>> change = client_of(2)(jnp.array(0.0), Batch(jnp.ones((1, 1)), jnp.array([0])))
        >>> seen = observed(jnp.array(0.0), change, inputs_like=jnp.ones((1, 1)), labels=jnp.array([0]))
        >>> attacks = [gradient_matching(client_of(steps), project_fn=box(0.9, 1.1)) for steps in (1, 2, 3)]
        >>> attack_fn = jax.jit(matching.best_of([solve(attack, num_steps=50) for attack in attacks]))
        >>> found = attack_fn(jax.random.key(0), seen)
        >>> int(found.restart_losses.argmin()), bool(found.loss == found.restart_losses[1])
        (1, True)
    """
    if not reconstruct_fns:
        raise ValueError(f"reconstruct_fns must hold at least one attack, got {reconstruct_fns!r}")
    for i, reconstruct_fn in enumerate(reconstruct_fns):
        if not callable(reconstruct_fn):
            raise ValueError(f"reconstruct_fns[{i}] must be a function, got {_check.brief(reconstruct_fn)}")

    def best_fn(key: PRNGKeyArray, observation: Observation) -> Reconstruction:
        keys = jax.random.split(key, len(reconstruct_fns))
        found = [
            fn(own, observation)._replace(restart_losses=()) for fn, own in zip(reconstruct_fns, keys, strict=True)
        ]
        for i, other in enumerate(found):
            _check.same_structure(f"reconstruct_fns[{i}](...)", other, "reconstruct_fns[0](...)", found[0])
        return choose(jax.tree.map(lambda *leaves: jnp.stack(leaves), *found))

    return best_fn
