"""One attack on many victims from many starts: what the command line and the benchmarks run.

This is a driver: it compiles, runs lanes in batches, shows progress, and can be interrupted and resumed.
"""

import hashlib
import os
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Attack, Observation, ReconstructFn, Reconstruction
from gia_jax.matching.run import advance, choose

ProgressFn = Callable[[int, int, float], None]
# Compiler options of a program that runs once: compiling it is all that it costs.
RUN_ONCE: dict[str, Any] = {"xla_backend_optimization_level": 0}
SHARED_PARAMS = Observation(params=None, update=0, extra=0)  # vmap axes: one set of parameters, many victims


class Timing(NamedTuple):
    """Wall-clock cost: seconds to compile, seconds to run, and milliseconds of one step of one restart."""

    compile_seconds: float
    run_seconds: float
    ms_per_step_per_restart: float


class Study(NamedTuple):
    """The outcome.

    Attributes:
        reconstruction: The chosen restart of every victim, leading axis v; `restart_losses` has shape (v, r).
        losses: The loss at every step of every restart, shape (v, r, num_steps); (v, r, 0) for an analytic attack.
        timing: Its cost.
    """

    reconstruction: Reconstruction
    losses: np.ndarray
    timing: Timing


def victim_keys(key: PRNGKeyArray, num_victims: int, num_restarts: int) -> Key[Array, "v r"]:
    """The key of every restart of every victim, shape (v, r): independent of how many of each there are."""
    per_victim = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_victims))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(per_victim, jnp.arange(num_restarts))


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
        observations: `params` once, the leaves of `update` and `extra` with a leading axis of victims.
        num_steps: Steps of every restart, >= 1.
        num_restarts: Restarts of every victim, >= 1; the one of the lowest finite loss is kept.
        lanes: Restarts under one `vmap`, >= 1.
        progress_fn: Called with steps done, steps in all (over all lanes), and seconds so far.
        checkpoint: A file that keeps the state of an interrupted run. A run of the same attack with equal arguments
            goes on from it, any other replaces it; both remove it at their end.
        checkpoint_seconds: Between two checkpoints, at least.

    Returns:
        The study.

    Raises:
        ValueError: A count below one, observations that are not finite, or a `checkpoint` that is no checkpoint.
    """
    _check.positive(num_steps=num_steps, num_restarts=num_restarts, lanes=lanes)
    _check.finite("observations", observations)
    victims = jax.tree.leaves(observations.update)[0].shape[0]
    total = victims * num_restarts
    lanes = -(-total // -(-total // lanes))  # as many batches as needed, all alike
    keys = victim_keys(key, victims, num_restarts).reshape(-1)
    chunk = _chunk(num_steps)

    def start_fn(key: PRNGKeyArray, observation: Observation) -> Any:
        return attack.init(jax.random.split(key)[0], observation)

    def chunk_fn(key: PRNGKeyArray, state: Any, observation: Observation, start: Any) -> tuple[Any, Any]:
        state, info = advance(attack, jax.random.split(key)[1], state, observation, start=start, num_steps=chunk)
        return state, info.loss

    began = time.perf_counter()
    index = _lane_indices(0, lanes, total)
    example = _select(observations, index // num_restarts)
    start_lanes = over_lanes(start_fn, (0, SHARED_PARAMS), lanes)
    finish_lanes = over_lanes(attack.finalize, (0, SHARED_PARAMS), lanes)
    state = jax.eval_shape(start_lanes, keys[index], example)
    step_lanes = jax.jit(over_lanes(chunk_fn, (0, 0, SHARED_PARAMS, None), lanes), donate_argnums=1)
    programs = [
        jax.jit(start_lanes).lower(keys[index], example),
        step_lanes.lower(keys[index], state, example, jnp.asarray(0)),
        jax.jit(finish_lanes).lower(state.candidate, example),
    ]
    # Compilers share no state: side by side they use every core.
    with ThreadPoolExecutor() as pool:
        start, step, finish = pool.map(
            lambda program, options: program.compile(options), programs, (None, None, RUN_ONCE)
        )
    compiled = time.perf_counter() - began

    settings = (num_steps, num_restarts, lanes)
    saved = _Checkpoint(checkpoint, "" if checkpoint is None else _fingerprint(programs, keys, observations, settings))
    finished, curves, position, at, resumed = saved.load(state, jax.eval_shape(finish_lanes, state.candidate, example))
    began, last_saved = time.perf_counter(), time.perf_counter()
    for first in range(position, total, lanes):
        index = _lane_indices(first, lanes, total)
        observation = _select(observations, index // num_restarts)
        state = start(keys[index], observation) if resumed is None else resumed
        resumed = None
        for t in range(at, num_steps, chunk):
            state, losses = step(keys[index], state, observation, jnp.asarray(t))
            curves.append(np.asarray(losses))
            if progress_fn is not None:
                done = min(first, total) * num_steps + (t + chunk) * min(lanes, total - first)
                progress_fn(done, total * num_steps, time.perf_counter() - began)
            if checkpoint is not None and time.perf_counter() - last_saved >= checkpoint_seconds:
                saved.save(finished, curves, first, t + chunk, state)
                last_saved = time.perf_counter()
        at = 0
        found = finish(state.candidate, observation)
        finished.append(jax.tree.map(lambda leaf: np.asarray(leaf), found))
    elapsed = time.perf_counter() - began
    saved.remove()

    stacked = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:total], *finished)
    stacked = jax.tree.map(lambda leaf: leaf.reshape(victims, num_restarts, *leaf.shape[1:]), stacked)
    per_batch = num_steps // chunk
    rows = [np.concatenate(curves[i : i + per_batch], 1) for i in range(0, len(curves), per_batch)]
    losses = np.concatenate(rows)[:total].reshape(victims, num_restarts, num_steps)
    timing = Timing(compiled, elapsed, 1e3 * elapsed / (total * num_steps))
    return Study(jax.tree.map(np.asarray, jax.vmap(choose)(stacked)), losses, timing)


def study_analytic(reconstruct_fn: ReconstructFn, key: PRNGKeyArray, observations: Observation) -> Study:
    """The same for an attack that needs no steps."""
    _check.finite("observations", observations)
    victims = jax.tree.leaves(observations.update)[0].shape[0]
    keys = victim_keys(key, victims, 1)[:, 0]
    began = time.perf_counter()
    compiled = jax.jit(jax.vmap(reconstruct_fn, (0, SHARED_PARAMS))).lower(keys, observations).compile()
    compile_seconds = time.perf_counter() - began
    began = time.perf_counter()
    found = jax.tree.map(np.asarray, compiled(keys, observations))
    elapsed = time.perf_counter() - began
    found = found._replace(restart_losses=found.loss[:, None])
    return Study(found, np.zeros((victims, 1, 0)), Timing(compile_seconds, elapsed, 1e3 * elapsed / victims))


def _chunk(num_steps: int) -> int:
    """Steps between two signs of life: a divisor, so that one program serves them all."""
    return max(n for n in range(1, max(1, num_steps // 10) + 1) if num_steps % n == 0)


def over_lanes(fn: Callable[..., Any], in_axes: tuple[Any, ...], lanes: int) -> Callable[..., Any]:
    """`vmap`; but a single lane runs as it is, so that `lax.cond` really skips what it need not compute."""
    if lanes > 1:
        return jax.vmap(fn, in_axes)

    def first(axis: Any, part: Any) -> Any:
        return part if axis is None else jax.tree.map(lambda leaf: leaf[0], part)

    def one_lane(*args: Any) -> Any:
        lane = jax.tree.map(first, in_axes, args, is_leaf=lambda axis: axis is None)
        return jax.tree.map(lambda leaf: leaf[None], fn(*lane))

    return one_lane


def _lane_indices(first: int, lanes: int, total: int) -> np.ndarray:
    """`lanes` indices from `first`; the last one again where they run out, its results are dropped."""
    return np.minimum(np.arange(first, first + lanes), total - 1)


def _select(observations: Observation, victims: np.ndarray) -> Observation:
    params, update, extra = observations
    update, extra = jax.tree.map(lambda leaf: leaf[victims], (update, extra))
    return Observation(params, update, extra)


def _fingerprint(programs: list[Any], keys: Key[Array, " lanes"], observations: Observation, settings: tuple) -> str:
    """Of everything a result depends on; the attack and its settings are told by the programs they became."""
    digest = hashlib.sha256(repr(settings).encode())
    for program in programs:
        digest.update(program.as_text().encode())
    for leaf in jax.tree.leaves((jax.random.key_data(keys), observations)):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


class _Checkpoint:
    """A file with the state of a run and the fingerprint of what it ran; a no-op without a path."""

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint

    def save(self, finished: list[Any], curves: list[np.ndarray], first: int, at: int, state: Any) -> None:
        assert self.path is not None
        arrays: dict[str, Any] = {f"state_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        arrays |= {f"curve_{i}": curve for i, curve in enumerate(curves)}
        for n, reconstruction in enumerate(finished):
            arrays |= {f"done_{n}_{i}": leaf for i, leaf in enumerate(jax.tree.leaves(reconstruction))}
        place = np.asarray([first, at, len(finished), len(curves)])
        temporary = self.path.with_suffix(".part")
        with temporary.open("wb") as file:
            np.savez(file, fingerprint=self.fingerprint, place=place, **arrays)
        os.replace(temporary, self.path)

    def load(self, state: Any, reconstruction: Any) -> tuple[list[Any], list[np.ndarray], int, int, Any]:
        if self.path is None or not self.path.exists():
            return [], [], 0, 0, None
        try:
            with np.load(self.path) as file:
                return self._read(file, state, reconstruction)
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"checkpoint must be a file that a study wrote, got {str(self.path)!r}: {error}") from None

    def _read(self, file: Any, state: Any, reconstruction: Any) -> tuple[list[Any], list[np.ndarray], int, int, Any]:
        if str(file["fingerprint"]) != self.fingerprint:
            return [], [], 0, 0, None
        first, at, done, curves = (int(n) for n in file["place"])
        count = len(jax.tree.leaves(reconstruction))
        tree = jax.tree.structure(reconstruction)
        finished = [jax.tree.unflatten(tree, [file[f"done_{n}_{i}"] for i in range(count)]) for n in range(done)]
        leaves = [jnp.asarray(file[f"state_{i}"]) for i in range(len(jax.tree.leaves(state)))]
        resumed = jax.tree.unflatten(jax.tree.structure(state), leaves)
        return finished, [file[f"curve_{i}"] for i in range(curves)], first, at, resumed

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
