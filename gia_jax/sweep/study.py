"""Runs one attack on many victims with many restarts.

The functions here compile the attack, run it in batches, report progress, and can be interrupted and resumed. A lane is
one restart on one victim, and the lanes of a batch run side by side under one `jax.vmap`.
"""

import hashlib
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key, PRNGKeyArray

from gia_jax import _check
from gia_jax._compile import RUN_ONCE
from gia_jax.base import Attack, AttackState, Observation, ReconstructFn, Reconstruction
from gia_jax.matching.run import choose, planned_steps
from gia_jax.sweep.store import Place, Progress, RunState

SHARED_PARAMS = Observation(params=None, update=0, extra=0)  # vmap axes: one set of parameters, many victims
SECONDS_PER_CALL = 2.0  # aimed at between two signs of life
MAX_STEPS_PER_CALL = 4_096


class Sign(NamedTuple):
    """What a study reports while it runs.

    Attributes:
        phase: What the study is doing: "compiling", "warm-up" or "steps". A warm-up is what some attacks run first.
        done: Number of steps done, summed over all restarts of all victims, with those of warm-ups.
        total: Number of steps in all.
        seconds: Time that the run took so far in seconds, with the time before an interruption.
        seconds_left: Estimate of the time that is left in seconds. None where nothing is known yet.
    """

    phase: str
    done: int
    total: int
    seconds: float
    seconds_left: float | None


ProgressFn = Callable[[Sign], None]
"""Function that a study calls with its progress."""


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


class Stage(NamedTuple):
    """A part of a run: a warm-up of the attack, or the attack's own steps, which come last.

    Attributes:
        start: Function `(key, state, observation) -> state` from the key of the lane and the last state of the stage
            before to the first state of this one. The first stage does not read the state that it is given.
        attack: Attack whose steps these are.
        num_steps: Number of steps.
        steps_key: Function from the key of the lane to the key of these steps.
    """

    start: Callable[[PRNGKeyArray, Any, Observation], AttackState]
    attack: Attack
    num_steps: int
    steps_key: Callable[[PRNGKeyArray], PRNGKeyArray]


def stages_of(attack: Attack, num_steps: int) -> list[Stage]:
    """Divides what `gia_jax.run` does into stages, with the same random keys.

    Args:
        attack: Attack to be run.
        num_steps: Number of its own steps.

    Returns:
        The stages in their order, warm-ups first.
    """

    def stages(attack: Attack, num_steps: int, init_key: Callable, steps_key: Callable) -> list[Stage]:
        warm_up = attack.warm_up
        if warm_up is None:
            return [Stage(lambda key, _, seen: attack.init(init_key(key), seen), attack, num_steps, steps_key)]

        def part(index: int) -> Callable[[PRNGKeyArray], PRNGKeyArray]:
            return lambda key: jax.random.split(init_key(key), 3)[index]

        def start(key: PRNGKeyArray, state: Any, observation: Observation) -> AttackState:
            return warm_up.hand_over(part(2)(key), state, observation)

        before = stages(warm_up.attack, warm_up.num_steps, part(0), part(1))
        return [*before, Stage(start, attack, num_steps, steps_key)]

    return stages(attack, num_steps, lambda key: jax.random.split(key)[0], lambda key: jax.random.split(key)[1])


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
    pace = _Pace(stages, lanes, total, progress_fn)
    pace.sign("compiling", Place())

    began = time.perf_counter()
    index = _lane_indices(0, lanes, total)
    example = _select(observations, index // num_restarts)
    programs, states, found = _programs(stages, attack, lanes, keys[index], example)
    settings = (num_steps, num_restarts, lanes)
    fingerprint = "" if checkpoint is None else _fingerprint(programs, keys, observations, settings)
    if checkpoint is not None and any("callback" in program.as_text() for program in programs):
        warnings.warn(
            "no state is kept of an attack that calls back to Python, which no fingerprint tells", stacklevel=2
        )
        checkpoint = None
    saved = RunState(checkpoint, fingerprint)
    most = max(stage.num_steps for stage in stages)
    begun = saved.load(states, found, Place(total, len(stages), most))
    compiled = [] if begun.place.first >= total else _compiled(programs)
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


def _typed(key: PRNGKeyArray) -> PRNGKeyArray:
    """Returns a typed random key, made from a raw one where it is one; raises ValueError where it is no key."""
    shapes = [()] if isinstance(key, jax.Array) and _check.is_key(key) else [(2,), (4,)]  # raw: threefry, rbg
    if not isinstance(key, jax.Array) or key.shape not in shapes:
        raise ValueError(f"key must be one random key, got {key!r}")
    impl = "threefry2x32" if key.shape == (2,) else "rbg"
    return key if key.shape == () else jax.random.wrap_key_data(key, impl=impl)


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


def _programs(
    stages: list[Stage], attack: Attack, lanes: int, keys: Any, example: Observation
) -> tuple[list[Any], list[Any], Any]:
    """Lowers the programs of a run, and returns them with the shapes of the states of its stages and of its result.

    There are two programs for each stage, which start it and do its steps, and a last one that ends the run.
    """
    programs, states, state = [], [], None
    for number, stage in enumerate(stages):
        if number == 0:

            def first_fn(key: PRNGKeyArray, observation: Observation, stage: Stage = stage) -> AttackState:
                return stage.start(key, None, observation)

            start, arguments = over_lanes(first_fn, (0, SHARED_PARAMS), lanes), (keys, example)
        else:
            start, arguments = over_lanes(stage.start, (0, 0, SHARED_PARAMS), lanes), (keys, state, example)
        state = jax.eval_shape(start, *arguments)
        states.append(state)
        step = over_lanes(_steps_fn(stage), (0, 0, SHARED_PARAMS, None, None), lanes)
        count = jnp.asarray(0)
        programs += [jax.jit(start).lower(*arguments), jax.jit(step).lower(keys, state, example, count, count)]
    assert state is not None
    finish = over_lanes(attack.finalize, (0, SHARED_PARAMS), lanes)
    programs.append(jax.jit(finish).lower(state.candidate, example))
    return programs, states, jax.eval_shape(finish, state.candidate, example)


def _steps_fn(stage: Stage) -> Callable[..., tuple[AttackState, Array]]:
    """Returns a function that does up to `MAX_STEPS_PER_CALL` steps, each as if it were done alone."""
    size = max(1, min(stage.num_steps, MAX_STEPS_PER_CALL))

    def steps_fn(
        key: PRNGKeyArray, state: AttackState, observation: Observation, start: Array, count: Array
    ) -> tuple[AttackState, Array]:
        steps_key = stage.steps_key(key)

        def body(carry: tuple[Array, AttackState, Array]) -> tuple[Array, AttackState, Array]:
            t, state, losses = carry
            state, info = stage.attack.step(jax.random.fold_in(steps_key, start + t), state, observation)
            return t + 1, state, losses.at[t].set(info.loss)

        loss = jax.eval_shape(stage.attack.step, steps_key, state, observation)[1].loss
        carry = (jnp.zeros_like(count), state, jnp.zeros(size, loss.dtype))
        _, state, losses = jax.lax.while_loop(lambda carry: carry[0] < count, body, carry)
        return state, losses

    return steps_fn


def _compiled(programs: list[Any]) -> list[Any]:
    """Compiles the programs side by side, the last one without costly optimisation, for it runs only at the end."""
    options = [RUN_ONCE if i == len(programs) - 1 else None for i in range(len(programs))]
    pool = ThreadPoolExecutor()
    try:
        return list(pool.map(lambda program, own: program.compile(own), programs, options))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interruption does not wait for a compiler


class _Pace:
    """Measures how fast the stages go, decides how many steps a call does, and reports the progress."""

    def __init__(self, stages: list[Stage], lanes: int, total: int, progress_fn: ProgressFn | None) -> None:
        self._steps, self._lanes, self._total = [stage.num_steps for stage in stages], lanes, total
        self._progress_fn = progress_fn
        self._each: list[float | None] = [None] * len(stages)  # seconds of a step of all lanes
        self._calls = [0] * len(stages)
        self._most = [1] * len(stages)
        self._before, self._began = 0.0, time.perf_counter()
        self._called = self._began

    def resume(self, place: Place) -> None:
        """Starts the clock where the run was left."""
        self._before, self._began = place.seconds, time.perf_counter()
        if place.first or place.stage or place.step > 0:
            self.sign(self._phase(place.stage), place)

    def seconds(self) -> float:
        """Returns the time that the run took so far in seconds."""
        return self._before + time.perf_counter() - self._began

    def count(self, place: Place) -> int:
        """Returns the number of steps of the next call, which is to take `SECONDS_PER_CALL`, and less at first."""
        each, left = self._each[place.stage], self._steps[place.stage] - place.step
        wanted = 1 if each is None else int(SECONDS_PER_CALL / max(each, 1e-9))
        self._called = time.perf_counter()
        return max(1, min(wanted, self._most[place.stage], left, MAX_STEPS_PER_CALL))

    def done(self, count: int, place: Place) -> None:
        """Notes how long a call took, and reports the progress."""
        self._each[place.stage] = (time.perf_counter() - self._called) / count
        self._most[place.stage] = 8 * count
        self._calls[place.stage] += 1
        self.sign(self._phase(place.stage), place)

    def sign(self, phase: str, place: Place) -> None:
        """Calls the progress function, if there is one."""
        if self._progress_fn is None:
            return
        batches, batch = -(-self._total // self._lanes), place.first // self._lanes
        lanes = min(self._lanes, self._total - place.first)
        before = [s < place.stage for s in range(len(self._steps))]
        done = place.first * sum(self._steps) + lanes * max(place.step, 0)
        done += lanes * sum(n for n, passed in zip(self._steps, before, strict=True) if passed)
        left: float | None = 0.0
        for s, (steps, each) in enumerate(zip(self._steps, self._each, strict=True)):
            each = each if self._calls[s] > 1 else None  # the first call of a stage is no measure of the others
            gone = steps if before[s] else max(place.step, 0) if s == place.stage else 0
            remaining = steps * (batches - batch - 1) + steps - gone
            if remaining and each is None:
                left = None
            elif left is not None:
                left += remaining * (each or 0.0)
        self._progress_fn(Sign(phase, done, self._total * sum(self._steps), self.seconds(), left))

    def _phase(self, stage: int) -> str:
        return "steps" if stage == len(self._steps) - 1 else "warm-up"


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
        pace: _Pace,
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
            index = _lane_indices(first, self._lanes, len(self._keys))
            self._selected = first, self._keys[index], _select(self._observations, index // self._num_restarts)
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


def _lane_indices(first: int, lanes: int, total: int) -> np.ndarray:
    """Returns the indices of a batch of lanes. The last index fills up the last batch, and its results are dropped."""
    return np.minimum(np.arange(first, first + lanes), total - 1)


def _select(observations: Observation, victims: np.ndarray) -> Observation:
    params, update, extra = observations
    update, extra = jax.tree.map(lambda leaf: leaf[victims], (update, extra))
    return Observation(params, update, extra)


def _fingerprint(programs: list[Any], keys: Key[Array, " lanes"], observations: Observation, settings: tuple) -> str:
    """Returns a hash of all that a result depends on. The attack and its settings are part of its programs."""
    digest = hashlib.sha256(repr(settings).encode())
    for program in programs:
        digest.update(program.as_text().encode())
    for leaf in jax.tree.leaves((keys, observations)):
        digest.update(np.asarray(jax.random.key_data(leaf) if _check.is_key(leaf) else leaf).tobytes())
    return digest.hexdigest()
