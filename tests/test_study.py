"""The driver of many victims and restarts: it computes what a plain loop computes, and survives interruption."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import gia_jax
from gia_jax import (
    Attack,
    AttackInfo,
    AttackState,
    Batch,
    Observation,
    Reconstruction,
    ThreatModel,
    attacks,
    clients,
    gradient_matching,
    keep_best,
    observe,
)
from gia_jax.labels import dense
from gia_jax.matching.optimizers import fixed_step_lbfgs
from gia_jax.study import Study, study, study_analytic, victim_keys

NUM_STEPS, NUM_VICTIMS, NUM_RESTARTS = 20, 3, 2

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Most tests compile the same few programs anew: keep them for the length of this module."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("cache")), 0), strict=True):
        jax.config.update(name, value)
    reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def _apply(params: Any, inputs: jax.Array) -> jax.Array:
    return inputs @ params["head"]["kernel"] + params["head"]["bias"]


CLIENT = clients.federated_sgd(clients.cross_entropy(_apply))


def _observations() -> Observation:
    key_params, key_inputs = jax.random.split(jax.random.key(0))
    params = {"head": {"kernel": jax.random.normal(key_params, (6, 3)), "bias": jnp.zeros(3)}}

    def of_one(inputs: jax.Array, labels: jax.Array) -> Observation:
        return observe(jax.random.key(1), ThreatModel(labels=True), CLIENT, params, Batch(inputs, labels))

    inputs = jax.random.normal(key_inputs, (NUM_VICTIMS, 2, 6))
    return jax.vmap(of_one)(inputs, jnp.asarray([[0, 1], [2, 2], [1, 0]]))._replace(params=params)


def _walk(learning_rate: float = 0.1) -> Attack:
    """A random walk with momentum towards what the update says: quick to compile, and every wrong key shows."""

    def target(observation: Observation) -> jax.Array:
        return jnp.mean(observation.update["head"]["kernel"] + observation.params["head"]["kernel"])

    def loss_fn(candidate: jax.Array, observation: Observation) -> jax.Array:
        return jnp.sum(jnp.square(candidate - target(observation)))

    def init(key: jax.Array, observation: Observation) -> AttackState:
        start = jax.random.uniform(key, observation.extra["inputs_like"].shape)
        return AttackState(start, jnp.zeros_like(start))

    def step(key: jax.Array, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
        loss, gradient = jax.value_and_grad(loss_fn)(state.candidate, observation)
        noise = jax.random.uniform(key, gradient.shape, minval=-1.0)
        velocity = 0.5 * state.memory - learning_rate * gradient + 0.01 * noise
        info = AttackInfo(loss, loss, jnp.linalg.norm(gradient))
        return AttackState(state.candidate + velocity, velocity), info

    def finalize(candidate: jax.Array, observation: Observation) -> Reconstruction:
        loss = loss_fn(candidate, observation)
        return Reconstruction(Batch(candidate, observation.extra["labels"]), loss, jnp.isfinite(loss))

    return keep_best(Attack(init, step, finalize))


def _lbfgs() -> Attack:
    return gradient_matching(CLIENT, optimizer=fixed_step_lbfgs(memory_size=5))


def _study(attack: Attack, **options: Any) -> Study:
    options = {"num_steps": NUM_STEPS, "num_restarts": NUM_RESTARTS} | options
    return study(attack, jax.random.key(5), _observations(), **options)


def _assert_same(actual: Study, desired: Study, rtol: float = 0) -> None:
    jax.tree.map(
        lambda a, d: np.testing.assert_allclose(a, d, rtol=rtol, atol=rtol),
        (actual.reconstruction, actual.losses),
        (desired.reconstruction, desired.losses),
    )


@pytest.mark.parametrize("build", [_walk, _lbfgs])
def test_a_study_is_a_loop_of_runs(build: Callable[[], Attack]) -> None:
    attack, observations = build(), _observations()
    found = _study(attack)
    keys = victim_keys(jax.random.key(5), NUM_VICTIMS, NUM_RESTARTS)
    run = jax.jit(lambda key, observation: gia_jax.run(attack, key, observation, num_steps=NUM_STEPS))
    for v in range(NUM_VICTIMS):
        update, extra = jax.tree.map(lambda leaf, v=v: leaf[v], (observations.update, observations.extra))
        runs = [run(keys[v, r], Observation(observations.params, update, extra)) for r in range(NUM_RESTARTS)]
        np.testing.assert_allclose(found.losses[v], [info.loss for _, info in runs], rtol=1e-9)
        losses = [reconstruction.loss for reconstruction, _ in runs]
        np.testing.assert_allclose(found.reconstruction.restart_losses[v], losses, rtol=1e-9)
        best = runs[int(np.argmin(losses))][0]
        np.testing.assert_allclose(found.reconstruction.batch.inputs[v], best.batch.inputs, rtol=1e-9)
        np.testing.assert_array_equal(found.reconstruction.batch.labels[v], best.batch.labels)
        assert found.reconstruction.is_finite[v]


@pytest.mark.parametrize("lanes", [1, 4, 100])
def test_lanes_do_not_change_the_results(lanes: int) -> None:
    _assert_same(_study(_walk(), lanes=lanes), _study(_walk(), lanes=3), rtol=1e-9)


def test_more_victims_or_restarts_leave_the_keys_of_the_others_alone() -> None:
    few, many = (jax.random.key_data(victim_keys(jax.random.key(0), v, r)) for v, r in ((2, 3), (4, 5)))
    np.testing.assert_array_equal(many[:2, :3], few)
    flat = np.asarray(many).reshape(20, -1)
    assert len(np.unique(flat, axis=0)) == 20


def test_progress_grows_to_the_whole() -> None:
    calls: list[tuple[int, int, float]] = []
    _study(_walk(), lanes=4, progress_fn=lambda *call: calls.append(call))
    done, total, seconds = map(np.asarray, zip(*calls, strict=True))
    assert (np.diff(done) > 0).all()
    assert (np.diff(seconds) >= 0).all()
    assert set(total) == {NUM_VICTIMS * NUM_RESTARTS * NUM_STEPS} == {done[-1]}


class _Interrupted(Exception):
    pass


def _interrupt_at(call: int) -> Callable[[int, int, float], None]:
    calls: list[int] = []

    def progress_fn(done: int, total: int, seconds: float) -> None:
        calls.append(done)
        if len(calls) == call:
            raise _Interrupted

    return progress_fn


def _interrupted(attack: Attack, path: Path, call: int) -> None:
    with pytest.raises(_Interrupted):
        _study(attack, lanes=4, checkpoint=path, checkpoint_seconds=0.0, progress_fn=_interrupt_at(call))
    assert path.exists()


@pytest.mark.parametrize(
    ("build", "call"),
    # Within the first lanes, right after them, within the second.
    [(_walk, 2), (_walk, 11), (_walk, 15), (_lbfgs, 15)],
)
def test_an_interrupted_study_goes_on_where_it_was(tmp_path: Path, build: Callable[[], Attack], call: int) -> None:
    path = tmp_path / "checkpoint.npz"
    _interrupted(build(), path, call)
    calls: list[int] = []
    resumed = _study(build(), lanes=4, checkpoint=path, progress_fn=lambda done, *_: calls.append(done))
    assert len(calls) == 20 - (call - 1)  # nothing that was saved is done again
    assert not list(tmp_path.iterdir())
    _assert_same(resumed, _study(build(), lanes=4))


@pytest.mark.parametrize(
    "other",
    [
        lambda path: _study(_walk(0.2), lanes=4, checkpoint=path),
        lambda path: _study(_lbfgs(), lanes=4, checkpoint=path),
        lambda path: _study(_walk(), lanes=4, checkpoint=path, num_restarts=1),
        lambda path: _study(_walk(), lanes=4, checkpoint=path, num_steps=30),
    ],
    ids=["hyperparameter", "attack", "restarts", "steps"],
)
def test_a_checkpoint_of_another_run_is_not_used(tmp_path: Path, other: Callable[[Path | None], Study]) -> None:
    path = tmp_path / "checkpoint.npz"
    _interrupted(_walk(), path, 15)
    _assert_same(other(path), other(None))


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"notes", lambda data: data[: len(data) // 2]])
def test_a_file_that_is_no_checkpoint_is_an_error_and_is_left_alone(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "checkpoint.npz"
    _interrupted(_walk(), path, 3)
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint must be a file that a study wrote, got '.*checkpoint\.npz'"):
        _study(_walk(), lanes=4, checkpoint=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["num_steps", "num_restarts", "lanes"])
def test_counts_below_one_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        _study(_walk(), **{name: 0})


def test_observations_that_are_not_finite_are_named() -> None:
    observations = _observations()
    observations.update["head"]["bias"] = observations.update["head"]["bias"].at[1, 2].set(jnp.nan)
    with pytest.raises(ValueError, match=r"observations must be finite, got nan at observations.*head.*bias"):
        study(_walk(), jax.random.key(0), observations, num_steps=1)
    with pytest.raises(ValueError, match="observations must be finite"):
        study_analytic(attacks.linear_inversion(dense("head")), jax.random.key(0), observations)


def test_an_analytic_study_is_a_loop_of_reconstructions() -> None:
    observations = _observations()
    reconstruct_fn = attacks.linear_inversion(dense("head"))
    found = study_analytic(reconstruct_fn, jax.random.key(0), observations)
    assert found.losses.shape == (NUM_VICTIMS, 1, 0)
    for v in range(NUM_VICTIMS):
        update, extra = jax.tree.map(lambda leaf, v=v: leaf[v], (observations.update, observations.extra))
        one = reconstruct_fn(jax.random.key(0), Observation(observations.params, update, extra))
        np.testing.assert_allclose(found.reconstruction.batch.inputs[v], one.batch.inputs, rtol=1e-9)
        np.testing.assert_allclose(found.reconstruction.restart_losses[v], [one.loss], rtol=1e-6, atol=1e-12)


def test_the_timing_is_a_time() -> None:
    timing = _study(_walk()).timing
    steps = NUM_STEPS * NUM_VICTIMS * NUM_RESTARTS
    assert timing.compile_seconds > 0
    assert timing.ms_per_step_per_restart == pytest.approx(1e3 * timing.run_seconds / steps)
