"""Runs one attack on many victims with many restarts.

The functions here compile the attack, run it in batches, report progress, and can be interrupted and resumed. A lane is
one restart on one victim, and the lanes of a batch run side by side under one `jax.vmap`.
"""

import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Attack, Observation, ReconstructFn, Reconstruction
from gia_jax.matching.run import choose, planned_steps
from gia_jax.sweep.lanes import SHARED_PARAMS, finite_victims, lane_indices, selected, victim_keys
from gia_jax.sweep.lanes import over_lanes as over_lanes
from gia_jax.sweep.progress import Pace, ProgressFn, Sign
from gia_jax.sweep.stages import Stage, compile_programs, fingerprint_of, programs_of, stages_of
from gia_jax.sweep.store import Place, Progress, RunState


class Timing(NamedTuple):
    """How long a study took, by the clock on the wall.

    Attributes:
        compile_seconds: Time to compile the attack in seconds. Of a run that was resumed, it is that of the last part.
        run_seconds: Time to run the attack in seconds. Of a run that was resumed, it is that of all parts together.
        ms_per_step_per_restart: Time of one step of one restart on one victim in milliseconds: `run_seconds` divided by
            the number of all steps, without those of warm-ups. An analytic attack counts as one step.
    """

    compile_seconds: float
    run_seconds: float
    ms_per_step_per_restart: float


class Study(NamedTuple):
    """What a study of v victims with r restarts found.

    Attributes:
        reconstruction: Reconstruction of the lowest finite loss of every victim, each leaf an array with a leading axis
            of length v. Its `restart_losses` have shape (v, r).
        losses: Loss at every step of every restart, shape (v, r, num_steps). An analytic attack has no steps.
        timing: Time that the study took.
        checkpoint: Path of the file that keeps this outcome, so that the same study computes nothing again. Remove it
            once the outcome is stored elsewhere. None where nothing was kept.
    """

    reconstruction: Reconstruction
    losses: np.ndarray
    timing: Timing
    checkpoint: Path | None = None


def study(
    attack: Attack,
    key: PRNGKeyArray,
    observations: Observation,
    *,
    num_steps: int | None = None,
    num_restarts: int = 1,
    lanes: int = 16,
    progress_fn: ProgressFn | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30,
) -> Study:
    """Runs an attack on several victims that hold the same parameters, with restarts.

    A study can be interrupted and resumed: its result does not depend on where that happened, bit for bit.

    Args:
        attack: Attack to run.
        key: Random key of the attacker.
        observations: Observations of v victims in one, as `gia_jax.stack` makes it: every leaf of `update` and `extra`
            has a leading axis of victims, and `params` has none. A warning names the victims whose observation is not
            finite. Their reconstruction has `is_finite` False, and the others are not affected.
        num_steps: Number of steps of every restart, at least 1. It may be left out where `attack.num_steps` says it.
        num_restarts: Number of restarts of every victim, at least 1. The one of the lowest finite loss is kept.
        lanes: Number of restarts that run side by side under one `jax.vmap`, at least 1.
        progress_fn: Function that is called with a `Sign` before compiling, and every few seconds from then on. None
            reports nothing.
        checkpoint: Folder in which the state of the run is kept, in a file with a name of its own. A study of the same
            attack with equal arguments goes on from it after an interruption (Ctrl-C, an exception in `progress_fn`, a
            killed process), and returns the outcome at once after the end. Remove the file, `Study.checkpoint`, when
            the outcome is stored elsewhere. If the state cannot be written, a warning says so and the study goes on.
            None keeps nothing.
        checkpoint_seconds: Least time between two saves in seconds, at least 0.

    Returns:
        The study.

    Raises:
        ValueError: If a count is no positive integer or too large for memory, `checkpoint_seconds` is negative, the
            key is no random key, the parameters are not finite, no victim has a finite observation, or a file in
            `checkpoint` was changed.

    Examples:
        Two victims, whose updates are their inputs, are attacked from three starting points each:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Observation, gradient_matching
        >>> from gia_jax.sweep import study
        >>> def client_fn(params, batch):  # gradient of the mean output of a linear model
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> params, updates = {"kernel": jnp.array([1.0, 1.0])}, {"kernel": jnp.array([[0.5, -1.0], [2.0, 0.0]])}
        >>> extra = {"inputs_like": jnp.zeros((2, 1, 2)), "labels": jnp.array([[0], [0]])}
        >>> attack = gradient_matching(client_fn)
        >>> found = study(attack, jax.random.key(0), Observation(params, updates, extra), num_steps=9, num_restarts=3)
        >>> found.reconstruction.batch.inputs.shape, found.losses.shape
        ((2, 1, 2), (2, 3, 9))
    """
    _check.integer(num_restarts=num_restarts, lanes=lanes)
    num_steps = planned_steps(attack, num_steps)
    _check.not_negative(checkpoint_seconds=checkpoint_seconds)
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if checkpoint is not None and checkpoint.exists() and not checkpoint.is_dir():
        raise ValueError(f"checkpoint must be a folder, got the file {str(checkpoint)!r}")
    key = _typed(key)
    victims, finite = finite_victims(observations)
    _check.fits(victims * num_restarts, num_restarts=num_restarts)
    _check.fits(victims * num_restarts * num_steps, num_steps=num_steps)
    total = victims * num_restarts
    lanes = -(-total // -(-total // lanes))  # as many batches as needed, all alike
    keys = victim_keys(key, victims, num_restarts).reshape(-1)
    stages = stages_of(attack, num_steps)
    pace = Pace(stages, lanes, total, progress_fn)
    pace.sign("compiling", Place())

    began = time.perf_counter()
    index = lane_indices(0, lanes, total)
    example = selected(observations, index // num_restarts)
    programs, states, found = programs_of(stages, attack, lanes, keys[index], example)
    settings = (num_steps, num_restarts, lanes)
    fingerprint = "" if checkpoint is None else fingerprint_of(programs, keys, observations, settings)
    if checkpoint is not None and any("callback" in program.as_text() for program in programs):
        warnings.warn(
            "no state is kept of an attack that calls back to Python, which no fingerprint tells", stacklevel=2
        )
        checkpoint = None
    saved = RunState(checkpoint, fingerprint)
    most = max(stage.num_steps for stage in stages)
    begun = saved.load(states, found, Place(total, len(stages), most))
    compiled = [] if begun.place.first >= total else compile_programs(programs)
    compile_seconds = time.perf_counter() - began

    run = _Run(stages, compiled, keys, observations, num_restarts, lanes, pace, begun)
    pace.resume(begun.place)
    last_saved = time.perf_counter()
    try:
        while not run.is_done:
            did_steps = run.call()
            if did_steps and checkpoint is not None and time.perf_counter() - last_saved >= checkpoint_seconds:
                saved.save(run.progress)
                last_saved = time.perf_counter()
    except BaseException as stopped:
        saved.save(run.progress._replace(place=run.progress.place._replace(seconds=pace.seconds())))
        if saved.is_kept:
            stopped.add_note(f"the same run goes on from the state kept in {saved.path}")
        raise
    if run.progress is not begun:
        saved.save(run.progress)
    place, finished, curves, _ = run.progress
    timing = Timing(compile_seconds, place.seconds, 1e3 * place.seconds / (total * num_steps))
    chosen = _chosen(finished, victims, num_restarts)
    chosen = chosen._replace(is_finite=chosen.is_finite & finite)
    losses = _joined(curves, num_steps)[:total].reshape(victims, num_restarts, num_steps)
    return Study(chosen, losses, timing, saved.path if saved.is_kept else None)


def study_analytic(
    reconstruct_fn: ReconstructFn,
    key: PRNGKeyArray,
    observations: Observation,
    *,
    progress_fn: ProgressFn | None = None,
) -> Study:
    """Runs an analytic attack, which has no steps, on several victims that hold the same parameters.

    Args:
        reconstruct_fn: Attack to run, a function `(key, observation) -> reconstruction`.
        key: Random key of the attacker.
        observations: Observations of v victims in one, as `gia_jax.stack` makes it: every leaf of `update` and `extra`
            has a leading axis of victims, and `params` has none. A warning names the victims whose observation is not
            finite. Their reconstruction has `is_finite` False, and the others are not affected.
        progress_fn: Function that is called with a `Sign` before compiling, before running and at the end. None reports
            nothing.

    Returns:
        The study, with one restart of every victim.

    Raises:
        ValueError: If the key is no random key, the parameters are not finite, or no victim has a finite observation.

    Examples:
        The update of this client is its input:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, Observation, Reconstruction
        >>> from gia_jax.sweep import study_analytic
        >>> def reconstruct_fn(key, observation):
        ...     return Reconstruction(Batch(observation.update[None], jnp.array([0])), jnp.array(0.0), jnp.array(True))
        >>> observations = Observation(params=jnp.array([1.0, 1.0]), update=jnp.array([[0.5, -1.0], [2.0, 0.0]]))
        >>> study_analytic(reconstruct_fn, jax.random.key(0), observations).reconstruction.batch.inputs.tolist()
        [[[0.5, -1.0]], [[2.0, 0.0]]]
    """
    key = _typed(key)
    victims, finite = finite_victims(observations)
    keys = victim_keys(key, victims, 1)[:, 0]
    show_fn = (lambda sign: None) if progress_fn is None else progress_fn
    show_fn(Sign("compiling", 0, victims, 0.0, None))
    began = time.perf_counter()
    compiled = jax.jit(jax.vmap(reconstruct_fn, (0, SHARED_PARAMS))).lower(keys, observations).compile()
    compile_seconds = time.perf_counter() - began
    show_fn(Sign("steps", 0, victims, 0.0, None))
    began = time.perf_counter()
    found = jax.tree.map(np.asarray, compiled(keys, observations))
    elapsed = time.perf_counter() - began
    show_fn(Sign("steps", victims, victims, elapsed, 0.0))
    found = found._replace(restart_losses=found.loss[:, None], is_finite=found.is_finite & finite)
    return Study(found, np.zeros((victims, 1, 0)), Timing(compile_seconds, elapsed, 1e3 * elapsed / victims))


def study_on_host(
    reconstruct_fn: ReconstructFn,
    key: PRNGKeyArray,
    observations: Observation,
    *,
    progress_fn: ProgressFn | None = None,
) -> Study:
    """Runs an attack that JAX cannot trace, such as a discrete search, on one victim after the other.

    Args:
        reconstruct_fn: Attack to run, a function `(key, observation) -> reconstruction` of arrays on the host, whose
            shapes are the same for all victims.
        key: Random key of the attacker.
        observations: Observations of v victims in one, as `gia_jax.stack` makes it: every leaf of `update` and `extra`
            has a leading axis of victims, and `params` has none. A warning names the victims whose observation is not
            finite. They are not attacked: their reconstruction is NaN and has `is_finite` False.
        progress_fn: Function that is called with a `Sign` before every victim and at the end. None reports nothing.

    Returns:
        The study, with one restart of every victim.

    Raises:
        ValueError: If the key is no random key, the parameters are not finite, no victim has a finite observation, or
            `reconstruct_fn` returns no `Reconstruction`, or one of other shapes than for the first victim.

    Examples:
        The update of this client is its input, which is known to be of whole numbers:

        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from gia_jax import Batch, Observation, Reconstruction
        >>> from gia_jax.sweep import study_on_host
        >>> def reconstruct_fn(key, observation):
        ...     rounded = np.round(np.asarray(observation.update))
        ...     return Reconstruction(Batch(rounded[None], np.array([0])), np.array(0.0), np.array(True))
        >>> observations = Observation(params=jnp.array([1.0, 1.0]), update=jnp.array([[0.6, -1.0], [2.2, 0.0]]))
        >>> study_on_host(reconstruct_fn, jax.random.key(0), observations).reconstruction.batch.inputs.tolist()
        [[[1.0, -1.0]], [[2.0, 0.0]]]
    """
    _check.functions(reconstruct_fn=reconstruct_fn)
    key = _typed(key)
    victims, finite = finite_victims(observations)
    total = int(finite.sum())
    keys = victim_keys(key, victims, 1)[:, 0]
    show_fn = (lambda sign: None) if progress_fn is None else progress_fn
    began, found = time.perf_counter(), {}
    for done, v in enumerate(np.flatnonzero(finite)):
        elapsed = time.perf_counter() - began
        show_fn(Sign("steps", done, total, elapsed, elapsed / done * (total - done) if done else None))
        update, extra = jax.tree.map(lambda leaf, v=v: leaf[v], (observations.update, observations.extra))
        one = reconstruct_fn(keys[v], Observation(observations.params, update, extra))
        if not isinstance(one, Reconstruction):
            raise ValueError(f"reconstruct_fn must return a Reconstruction, got {_check.brief(one)} for victim {v}")
        found[v] = jax.tree.map(np.asarray, one._replace(restart_losses=()))
        _check_alike(int(v), found[v], next(iter(found.values())))
    nothing = jax.tree.map(_nothing, next(iter(found.values())))
    elapsed = time.perf_counter() - began
    show_fn(Sign("steps", total, total, elapsed, 0.0))
    every: Reconstruction = jax.tree.map(
        lambda *leaves: np.stack(leaves), *(found.get(v, nothing) for v in range(victims))
    )
    every = every._replace(restart_losses=every.loss[:, None], is_finite=every.is_finite & finite)
    return Study(every, np.zeros((victims, 1, 0)), Timing(0.0, elapsed, 1e3 * elapsed / victims))


def _check_alike(victim: int, one: Reconstruction, first: Reconstruction) -> None:
    """Raises ValueError for a reconstruction of other shapes than that of the first victim."""
    _check.same_structure(f"reconstruct_fn(...) of victim {victim}", one, "that of the first victim", first)
    for name in ("loss", "is_finite"):
        if np.shape(getattr(one, name)) != ():
            got = np.shape(getattr(one, name))
            raise ValueError(f"reconstruct_fn must return a scalar {name}, got shape {got} for victim {victim}")


def _nothing(leaf: np.ndarray) -> np.ndarray:
    """Returns what stands for a part of a reconstruction that there is not: NaN, or 0 where the type has none."""
    return np.full_like(leaf, np.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0)


def _typed(key: PRNGKeyArray) -> PRNGKeyArray:
    """Returns a typed random key, made from a raw one where it is one; raises ValueError where it is no key."""
    shapes = [()] if isinstance(key, jax.Array) and _check.is_key(key) else [(2,), (4,)]  # raw: threefry, rbg
    if not isinstance(key, jax.Array) or key.shape not in shapes:
        raise ValueError(f"key must be one random key, got {key!r}")
    impl = "threefry2x32" if key.shape == (2,) else "rbg"
    return key if key.shape == () else jax.random.wrap_key_data(key, impl=impl)


class _Run:
    """A run under way, which calls the programs of its stages in turn.

    `progress` is only ever replaced as a whole: its state, its curves and its place belong together, whenever the run
    is interrupted.
    """

    def __init__(
        self,
        stages: list[Stage],
        compiled: list[Any],
        keys: Key[Array, " lanes"],
        observations: Observation,
        num_restarts: int,
        lanes: int,
        pace: Pace,
        progress: Progress,
    ) -> None:
        self._stages, self._compiled, self._keys, self._observations = stages, compiled, keys, observations
        self._num_restarts, self._lanes, self._pace = num_restarts, lanes, pace
        self._selected: tuple[int, Any, Observation] | None = None
        self.progress = progress

    @property
    def is_done(self) -> bool:
        """Whether no lane is left."""
        return self.progress.place.first >= len(self._keys)

    def call(self) -> bool:
        """Starts a stage, does steps of it, or ends a batch of lanes; returns whether it did steps."""
        place = self.progress.place
        if place.step < 0:
            self._start()
        elif place.step < self._stages[place.stage].num_steps:
            self._do_steps()
            return True
        elif place.stage < len(self._stages) - 1:
            self.progress = self.progress._replace(place=place._replace(stage=place.stage + 1, step=-1))
        else:
            self._finish()
        return False

    def _batch(self) -> tuple[Any, Observation]:
        """Returns the keys and the observations of the lanes under way."""
        first = self.progress.place.first
        if self._selected is None or self._selected[0] != first:
            index = lane_indices(first, self._lanes, len(self._keys))
            self._selected = first, self._keys[index], selected(self._observations, index // self._num_restarts)
        return self._selected[1:]

    def _start(self) -> None:
        keys, observation = self._batch()
        place, _, _, state = self.progress
        before = (state,) if place.stage else ()
        state = self._compiled[2 * place.stage](keys, *before, observation)
        self.progress = self.progress._replace(place=place._replace(step=0), state=state)

    def _do_steps(self) -> None:
        keys, observation = self._batch()
        place, finished, curves, state = self.progress
        count, step = self._pace.count(place), self._compiled[2 * place.stage + 1]
        state, losses = step(keys, state, observation, jnp.asarray(place.step), jnp.asarray(count))
        losses = np.asarray(losses)[:, :count]
        place = place._replace(step=place.step + count, seconds=self._pace.seconds())
        is_last = place.stage == len(self._stages) - 1
        self.progress = Progress(place, finished, curves + [losses] * is_last, state)
        self._pace.done(count, place)

    def _finish(self) -> None:
        _, observation = self._batch()
        place, finished, curves, state = self.progress
        assert state is not None
        done = jax.tree.map(np.asarray, self._compiled[-1](state.candidate, observation))
        first = min(place.first + self._lanes, len(self._keys))
        self.progress = Progress(Place(first, 0, -1, self._pace.seconds()), [*finished, done], curves, None)


def _chosen(finished: list[Reconstruction], victims: int, num_restarts: int) -> Reconstruction:
    """Chooses a restart of every victim from the reconstructions of all batches of lanes."""
    stacked = jax.tree.map(lambda *leaves: np.concatenate(leaves)[: victims * num_restarts], *finished)
    stacked = jax.tree.map(lambda leaf: leaf.reshape(victims, num_restarts, *leaf.shape[1:]), stacked)
    return jax.tree.map(np.asarray, jax.vmap(choose)(stacked))


def _joined(curves: list[np.ndarray], num_steps: int) -> np.ndarray:
    """Joins the pieces of the loss curves, batch after batch of lanes, into an array of shape (lanes, num_steps)."""
    rows, batch, length = [], [], 0
    for curve in curves:
        batch.append(curve)
        length += curve.shape[1]
        if length == num_steps:
            rows.append(np.concatenate(batch, 1))
            batch, length = [], 0
    return np.concatenate(rows)
