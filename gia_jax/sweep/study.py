"""Runs one attack on many victims with many restarts.

The functions here compile the attack, run it in batches, report progress, and can be interrupted and resumed. A lane is
one restart on one victim under one setting, and the lanes of a batch run side by side under one `jax.vmap`.
"""

import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import Attack, Observation, ReconstructFn, Reconstruction
from gia_jax.matching.run import choose, planned_steps
from gia_jax.sweep.devices import AXIS, lane_mesh
from gia_jax.sweep.engine import Finished, Ran, run_lanes
from gia_jax.sweep.lanes import SHARED_PARAMS, Lanes, finite_victims, victim_keys
from gia_jax.sweep.progress import ProgressFn, Sign
from gia_jax.sweep.stages import over_settings


class Timing(NamedTuple):
    """Wall-clock time of a study.

    Attributes:
        compile_seconds: Time to compile the attack in seconds. After a study was resumed, it is the time of the last
            compilation alone.
        run_seconds: Time to run the attack in seconds. After a study was resumed, it is the sum over all its parts.
        ms_per_step_per_restart: Time of one step of one restart on one victim in milliseconds: `run_seconds` divided by
            the number of all steps, without those of warm-ups. An analytic attack counts as one step.

    Examples:
        >>> from gia_jax.sweep import Timing
        >>> Timing(compile_seconds=1.5, run_seconds=6.0, ms_per_step_per_restart=0.5).run_seconds
        6.0
    """

    compile_seconds: float
    run_seconds: float
    ms_per_step_per_restart: float


class Plan(NamedTuple):
    """Plan of a study of s settings, v victims and r restarts: its lanes and their devices.

    Attributes:
        lanes: The lanes of this process.
        finite: Whether the observation of each victim is finite, shape (v,).
        mesh: Mesh over whose devices the lanes are spread, None for a single device.
    """

    lanes: Lanes
    finite: Bool[np.ndarray, " v"]
    mesh: Mesh | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of settings, victims and restarts."""
        victims, restarts = self.lanes.keys.shape
        return self.lanes.num_settings, victims, restarts


class Study(NamedTuple):
    """Result of a study of v victims with r restarts.

    Attributes:
        reconstruction: For every victim the reconstruction with the lowest finite loss, each leaf an array with a
            leading axis of length v. Its `restart_losses` have shape (v, r).
        losses: Loss at every step of every restart, shape (v, r, num_steps). An analytic attack has no steps.
        timing: Time that the study took.
        checkpoint: Path of the file that keeps this result, so that a study with equal arguments computes nothing
            again. Remove the file once the result is stored elsewhere. None if the study had no checkpoint.

    Examples:
        The update of this client is its input, and the attack returns the update:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, Observation, Reconstruction
        >>> from gia_jax.sweep import study_analytic
        >>> def reconstruct_fn(key, observation):
        ...     return Reconstruction(Batch(observation.update[None], jnp.array([0])), jnp.array(0.0), jnp.array(True))
        >>> observations = Observation(params=jnp.array([1.0, 1.0]), update=jnp.array([[0.5, -1.0], [2.0, 0.0]]))
        >>> found = study_analytic(reconstruct_fn, jax.random.key(0), observations)
        >>> found.reconstruction.loss.shape, found.losses.shape, found.checkpoint
        ((2,), (2, 1, 0), None)
    """

    reconstruction: Reconstruction
    losses: np.ndarray
    timing: Timing
    checkpoint: Path | None = None


def plan(
    key: PRNGKeyArray,
    observations: Observation,
    *,
    num_steps: int,
    num_restarts: int,
    lanes: int,
    mesh: Mesh | None = None,
    num_settings: int = 1,
    settings: PyTree[Any] = (),
    process: tuple[int, int] = (0, 1),
) -> Plan:
    """Checks the arguments of a study, and divides its lanes among batches, devices and processes.

    Args:
        key: Random key of the attacker.
        observations: Observations of v victims, stacked by `gia_jax.stack`.
        num_steps: Number of steps of every restart.
        num_restarts: Number r of restarts of every victim.
        lanes: Number of lanes that are to run side by side.
        mesh: Mesh of devices of this process, or None for all of them.
        num_settings: Number s of settings.
        settings: Settings with a leading axis of length s.
        process: Index of this process, and the number of all processes, which share the batches of lanes.

    Returns:
        The plan of this process.

    Raises:
        ValueError: If a count is no positive integer or too large for memory, the key is no random key, the mesh has no
            axis "lanes" or devices of another process, the parameters are not finite, or no victim has a finite
            observation.
    """
    _check.integer(num_restarts=num_restarts, lanes=lanes)
    _check.outside_of_jit("a study", (key, observations))
    key, mesh = _typed(key), lane_mesh(mesh)
    victims, finite = finite_victims(observations)
    _check.fits(num_settings * victims * num_restarts, num_restarts=num_restarts)
    total = num_settings * victims * num_restarts
    _check.fits(total * num_steps, num_steps=num_steps)
    lanes = -(-total // -(-total // lanes))  # as many batches as needed, all alike, whatever the number of processes
    devices = 1 if mesh is None else mesh.shape[AXIS]
    lanes = -(-lanes // devices) * devices
    batches, (index, count) = -(-total // lanes), process
    if batches < count:
        warnings.warn(
            f"{count - batches} of {count} processes have nothing to do: there are {batches} batches of {lanes} lanes",
            stacklevel=3,
        )
    first, last = (min(share * batches // count * lanes, total) for share in (index, index + 1))
    keys = victim_keys(key, victims, num_restarts)
    return Plan(Lanes(keys, num_settings, settings, observations, lanes, first, last), finite, mesh)


def chosen_of(finished: Finished, planned: Plan) -> tuple[Reconstruction, Float[np.ndarray, "s v r num_steps"]]:
    """Chooses the restart with the lowest finite loss for every victim under every setting.

    Args:
        finished: Results of all lanes.
        planned: Plan of the study.

    Returns:
        The reconstructions, each leaf with leading axes (s, v), and the losses, shape (s, v, r, num_steps).
    """
    split = jax.tree.map(lambda leaf: leaf.reshape(*planned.shape, *leaf.shape[1:]), finished)
    chosen = jax.tree.map(np.asarray, jax.vmap(jax.vmap(choose))(split.reconstruction))
    return chosen._replace(is_finite=chosen.is_finite & planned.finite), split.losses


def timing_of(ran: Ran, planned: Plan, num_steps: int) -> Timing:
    """Returns the time of a study, and of one step of one restart."""
    steps = max(1, planned.lanes.num_lanes * num_steps)
    return Timing(ran.compile_seconds, ran.run_seconds, 1e3 * ran.run_seconds / steps)


def state_folder(checkpoint: Path | None, checkpoint_seconds: float) -> Path | None:
    """Returns the folder for the state of a run. Raises ValueError for a file in its place, and for a negative time."""
    _check.not_negative(checkpoint_seconds=checkpoint_seconds)
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if checkpoint is not None and checkpoint.exists() and not checkpoint.is_dir():
        raise ValueError(f"checkpoint must be a folder, got the file {str(checkpoint)!r}")
    return checkpoint


def study(
    attack: Attack,
    key: PRNGKeyArray,
    observations: Observation,
    *,
    num_steps: int | None = None,
    num_restarts: int = 1,
    lanes: int = 16,
    mesh: Mesh | None = None,
    progress_fn: ProgressFn | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
) -> Study:
    """Runs an attack on several victims that hold the same parameters, with restarts.

    A study can be interrupted and resumed. Its result is the same bit for bit, wherever it was interrupted.

    Args:
        attack: Attack to run.
        key: Random key of the attacker.
        observations: Observations of v victims, stacked by `gia_jax.stack`: every leaf of `update` and `extra` has
            a leading axis of victims, and `params` has none. A warning names the victims whose observation is not
            finite. Their reconstruction has `is_finite` False, and the others are not affected.
        num_steps: Number of steps of every restart, at least 1. None takes `attack.num_steps`.
        num_restarts: Number of restarts of every victim, at least 1. The restart with the lowest finite loss is kept.
        lanes: Number of restarts that run side by side under one `jax.vmap`, at least 1. It is rounded up to a multiple
            of the number of devices.
        mesh: Mesh of devices of this process with an axis "lanes", over which the restarts are spread. None takes all
            devices of this process.
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
    num_steps = planned_steps(attack, num_steps)
    planned = plan(key, observations, num_steps=num_steps, num_restarts=num_restarts, lanes=lanes, mesh=mesh)
    ran = run_lanes(
        over_settings(lambda _: attack, ()),
        planned.lanes,
        num_steps=num_steps,
        mesh=planned.mesh,
        progress_fn=progress_fn,
        checkpoint=state_folder(checkpoint, checkpoint_seconds),
        checkpoint_seconds=checkpoint_seconds,
    )
    assert ran.finished is not None
    chosen, losses = chosen_of(ran.finished, planned)
    found = jax.tree.map(lambda leaf: leaf[0], chosen)
    return Study(found, losses[0], timing_of(ran, planned, num_steps), ran.checkpoint)


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
        observations: Observations of v victims, stacked by `gia_jax.stack`: every leaf of `update` and `extra` has
            a leading axis of victims, and `params` has none. A warning names the victims whose observation is not
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
        observations: Observations of v victims, stacked by `gia_jax.stack`: every leaf of `update` and `extra` has
            a leading axis of victims, and `params` has none. A warning names the victims whose observation is not
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
