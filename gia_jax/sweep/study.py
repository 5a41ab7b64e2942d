"""One attack on many victims from many starts: what the command line and the benchmarks run.

This is a driver: it compiles, runs lanes in batches, shows progress, and can be interrupted and resumed.
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
from gia_jax.matching.run import choose
from gia_jax.sweep.store import Place, Progress, RunState

SHARED_PARAMS = Observation(params=None, update=0, extra=0)  # vmap axes: one set of parameters, many victims
SECONDS_PER_CALL = 2.0  # aimed at between two signs of life
MAX_STEPS_PER_CALL = 4_096


class Sign(NamedTuple):
    """A sign of life of a study.

    Attributes:
        phase: "compiling", "warm-up" (of an attack that has one) or "steps".
        done: Steps done, over all lanes, warm-up included.
        total: Steps in all.
        seconds: Seconds that the run took so far, those before an interruption included.
        seconds_left: About how many seconds are left; None where nothing is known yet.
    """

    phase: str
    done: int
    total: int
    seconds: float
    seconds_left: float | None


ProgressFn = Callable[[Sign], None]


class Timing(NamedTuple):
    """Wall-clock cost: seconds to compile, seconds to run, and milliseconds of one step of one restart.

    The seconds to run count all parts of a run that was interrupted and resumed, those to compile the last one only.
    """

    compile_seconds: float
    run_seconds: float
    ms_per_step_per_restart: float


class Study(NamedTuple):
    """The outcome.

    Attributes:
        reconstruction: The chosen restart of every victim, leading axis v; `restart_losses` has shape (v, r).
        losses: The loss at every step of every restart, shape (v, r, num_steps); (v, r, 0) for an analytic attack.
        timing: Its cost.
        checkpoint: The file that keeps this outcome, so that nothing is computed again before it is written elsewhere:
            remove it then. None where nothing was kept.
    """

    reconstruction: Reconstruction
    losses: np.ndarray
    timing: Timing
    checkpoint: Path | None = None


def victim_keys(key: PRNGKeyArray, num_victims: int, num_restarts: int) -> Key[Array, "v r"]:
    """The key of every restart of every victim, shape (v, r): independent of how many of each there are."""
    per_victim = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_victims))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(per_victim, jnp.arange(num_restarts))


class Stage(NamedTuple):
    """A part of a run, of which warm-ups come first: how it starts from the last part's state, and its steps.

    Attributes:
        start: `(key, state, observation) -> state`, with the key of the lane; that of the first stage reads no state.
        attack: The attack whose steps these are.
        num_steps: Number of steps.
        steps_key: Makes from the key of the lane the key of these steps.
    """

    start: Callable[[PRNGKeyArray, Any, Observation], AttackState]
    attack: Attack
    num_steps: int
    steps_key: Callable[[PRNGKeyArray], PRNGKeyArray]


def stages_of(attack: Attack, num_steps: int) -> list[Stage]:
    """What `gia_jax.run` does in one piece, with the same keys, as stages that a driver can show and save."""

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
    num_steps: int,
    num_restarts: int = 1,
    lanes: int = 16,
    progress_fn: ProgressFn | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30,
) -> Study:
    """Runs an attack on victims that share the server's parameters.

    Args:
        attack: The attack.
        key: The attacker's randomness.
        observations: `params` once, the leaves of `update` and `extra` with a leading axis of victims. A victim whose
            observation is not finite is named in a warning, and its reconstruction is marked by `is_finite`; the
            others are not affected.
        num_steps: Steps of every restart, at least 1.
        num_restarts: Restarts of every victim, at least 1; the one of the lowest finite loss is kept.
        lanes: Restarts under one `vmap`, at least 1.
        progress_fn: Called with a `Sign` before compiling, and every few seconds while steps are done.
        checkpoint: A folder for the state of the run, in a file of its own. A run of the same attack with equal
            arguments goes on from it, after an interruption (Ctrl-C, an exception in `progress_fn`, a kill) as after
            its end; the caller removes the file, `Study.checkpoint`, once the outcome is safe. The result does not
            depend on where a run was interrupted, bit for bit. Where the state cannot be written, a warning says so.
        checkpoint_seconds: Least number of seconds between two saves.

    Returns:
        The study.

    Raises:
        ValueError: A count below one or too large for memory, parameters that are not finite, no victim whose
            observation is finite, or a file in `checkpoint` that was changed.
    """
    _check.integer(num_restarts=num_restarts, lanes=lanes)
    _check.integer(1, 2**31 - 1, num_steps=num_steps)
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
    place, finished, curves, state = saved.load(states, found, Place(total, len(stages), most))
    compiled = [] if place.first >= total else _compiled(programs)
    compile_seconds = time.perf_counter() - began

    resumed, last_saved = pace.resume(place), time.perf_counter()
    try:
        while place.first < total:
            index = _lane_indices(place.first, lanes, total)
            observation = _select(observations, index // num_restarts)
            stage = stages[place.stage]
            start, step = compiled[2 * place.stage : 2 * place.stage + 2]
            if place.step < 0:
                before = (state,) if place.stage else ()
                state, place = start(keys[index], *before, observation), place._replace(step=0)
            while place.step < stage.num_steps:
                count = pace.count(place)
                after, losses = step(keys[index], state, observation, jnp.asarray(place.step), jnp.asarray(count))
                losses = np.asarray(losses)[:, :count]
                # Nothing between here and the next call is lost by an interruption: state, curve and place go together.
                later = place._replace(step=place.step + count, seconds=pace.seconds())
                state, place, curves = after, later, curves + [losses] * (place.stage == len(stages) - 1)
                pace.done(count, place)
                if checkpoint is not None and time.perf_counter() - last_saved >= checkpoint_seconds:
                    saved.save(Progress(place, finished, curves, state))
                    last_saved = time.perf_counter()
            if place.stage < len(stages) - 1:
                place = place._replace(stage=place.stage + 1, step=-1)
                continue
            assert state is not None
            done = jax.tree.map(np.asarray, compiled[-1](state.candidate, observation))
            later = Place(place.first + lanes, 0, -1, pace.seconds())
            finished, state, place = [*finished, done], None, later._replace(first=min(later.first, total))
    except BaseException as stopped:
        saved.save(Progress(place._replace(seconds=pace.seconds()), finished, curves, state))
        if saved.is_kept:
            stopped.add_note(f"the same run goes on from the state kept in {saved.path}")
        raise
    if resumed is not place:
        saved.save(Progress(place, finished, curves, None))

    stacked = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:total], *finished)
    stacked = jax.tree.map(lambda leaf: leaf.reshape(victims, num_restarts, *leaf.shape[1:]), stacked)
    timing = Timing(compile_seconds, place.seconds, 1e3 * place.seconds / (total * num_steps))
    chosen = jax.tree.map(np.asarray, jax.vmap(choose)(stacked))
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
    """`study` of an attack that needs no steps.

    Args:
        reconstruct_fn: `(key, observation) -> reconstruction`.
        key: The attacker's randomness.
        observations: Observations as `study` takes them; victims that are not finite are treated as it treats them.
        progress_fn: Called with a `Sign` before compiling, before running and at the end.

    Returns:
        The study, of one restart for every victim.

    Raises:
        ValueError: Parameters that are not finite, or no victim whose observation is.
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
    """A key of the new style, also of one of the old style."""
    shapes = [()] if isinstance(key, jax.Array) and _check.is_key(key) else [(2,), (4,)]  # raw: threefry, rbg
    if not isinstance(key, jax.Array) or key.shape not in shapes:
        raise ValueError(f"key must be one random key, got {key!r}")
    impl = "threefry2x32" if key.shape == (2,) else "rbg"
    return key if key.shape == () else jax.random.wrap_key_data(key, impl=impl)


def finite_victims(observations: Observation) -> tuple[int, Bool[np.ndarray, " v"]]:
    """The number of victims, and which of them have a finite observation; a warning names the others.

    Raises:
        ValueError: The parameters are not finite, or no victim's observation is.
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
    """The programs that start every stage and do its steps, and one that ends the run; the shapes of the states of
    the stages, and of what the run gives.
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
    """One program for up to `MAX_STEPS_PER_CALL` steps: what a step computes does not depend on their number."""
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
    """Compiles the programs side by side, to use every core; the last one, which runs only at the end, in haste."""
    options = [RUN_ONCE if i == len(programs) - 1 else None for i in range(len(programs))]
    pool = ThreadPoolExecutor()
    try:
        return list(pool.map(lambda program, own: program.compile(own), programs, options))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interruption does not wait for a compiler


class _Pace:
    """How fast the stages go: how many steps a call may do, and how much time is left."""

    def __init__(self, stages: list[Stage], lanes: int, total: int, progress_fn: ProgressFn | None) -> None:
        self._steps, self._lanes, self._total = [stage.num_steps for stage in stages], lanes, total
        self._progress_fn = progress_fn
        self._each: list[float | None] = [None] * len(stages)  # seconds of a step of all lanes
        self._calls = [0] * len(stages)
        self._most = [1] * len(stages)
        self._before, self._began = 0.0, time.perf_counter()
        self._called = self._began

    def resume(self, place: Place) -> Place:
        """Starts the clock where the run was left."""
        self._before, self._began = place.seconds, time.perf_counter()
        if place.first or place.stage or place.step > 0:
            self.sign(self._phase(place.stage), place)
        return place

    def seconds(self) -> float:
        """Seconds that the run took so far."""
        return self._before + time.perf_counter() - self._began

    def count(self, place: Place) -> int:
        """Steps of the next call: about `SECONDS_PER_CALL` long, the first ones short."""
        each, left = self._each[place.stage], self._steps[place.stage] - place.step
        wanted = 1 if each is None else int(SECONDS_PER_CALL / max(each, 1e-9))
        self._called = time.perf_counter()
        return max(1, min(wanted, self._most[place.stage], left, MAX_STEPS_PER_CALL))

    def done(self, count: int, place: Place) -> None:
        """Notes how long a call took, and shows where the run is."""
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


def _joined(curves: list[np.ndarray], num_steps: int) -> np.ndarray:
    """The losses of all lanes in turn, shape (lanes, num_steps), from pieces of a batch of lanes after the other."""
    rows, batch, length = [], [], 0
    for curve in curves:
        batch.append(curve)
        length += curve.shape[1]
        if length == num_steps:
            rows.append(np.concatenate(batch, 1))
            batch, length = [], 0
    return np.concatenate(rows)


def over_lanes(fn: Callable[..., Any], in_axes: tuple[Any, ...], lanes: int) -> Callable[..., Any]:
    """`vmap` of `fn`; but a single lane runs as it is, so that `lax.cond` really skips what it need not compute."""
    if lanes > 1:
        return jax.vmap(fn, in_axes)

    def first(axis: Any, part: Any) -> Any:
        return part if axis is None else jax.tree.map(lambda leaf: leaf[0], part)

    def one_lane(*args: Any) -> Any:
        lane = jax.tree.map(first, in_axes, args, is_leaf=lambda axis: axis is None)
        return jax.tree.map(lambda leaf: leaf[None], fn(*lane))

    return one_lane


def _lane_indices(first: int, lanes: int, total: int) -> np.ndarray:
    """`lanes` indices from `first`; where they run out the last one is repeated, and its results are dropped."""
    return np.minimum(np.arange(first, first + lanes), total - 1)


def _select(observations: Observation, victims: np.ndarray) -> Observation:
    params, update, extra = observations
    update, extra = jax.tree.map(lambda leaf: leaf[victims], (update, extra))
    return Observation(params, update, extra)


def _fingerprint(programs: list[Any], keys: Key[Array, " lanes"], observations: Observation, settings: tuple) -> str:
    """A hash of everything a result depends on; the attack and its settings are in the programs they became."""
    digest = hashlib.sha256(repr(settings).encode())
    for program in programs:
        digest.update(program.as_text().encode())
    for leaf in jax.tree.leaves((keys, observations)):
        digest.update(np.asarray(jax.random.key_data(leaf) if _check.is_key(leaf) else leaf).tobytes())
    return digest.hexdigest()
