"""The driver of many victims and restarts: it computes what a plain loop computes, and survives interruption."""

import errno
import functools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

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
    keep_path,
    observe,
)
from gia_jax.labels import dense
from gia_jax.matching.optimizers import fixed_step_lbfgs
from gia_jax.matching.run import advance, continued, from_starts
from gia_jax.sweep.lanes import victim_keys
from gia_jax.sweep.store import MAGIC, Place, Progress, RunState
from gia_jax.sweep.study import Sign, Study, study, study_analytic, study_on_host

NUM_STEPS, NUM_VICTIMS, NUM_RESTARTS = 20, 3, 2

pytestmark = pytest.mark.usefixtures("x64")


def _apply(params: Any, inputs: jax.Array) -> jax.Array:
    return inputs @ params["head"]["kernel"] + params["head"]["bias"]


CLIENT = clients.federated_sgd(clients.cross_entropy(_apply))


@functools.cache
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


def _path() -> Attack:
    return keep_path(_walk(), num_points=6, num_steps=NUM_STEPS)


def _study(attack: Attack, **options: Any) -> Study:
    options = {"num_steps": NUM_STEPS, "num_restarts": NUM_RESTARTS} | options
    return study(attack, jax.random.key(5), _observations(), **options)


@functools.cache
def _whole(build: Callable[[], Attack], lanes: int = 16) -> Study:
    """What a study that nothing disturbs finds: of several tests, which compare with it."""
    return _study(build(), lanes=lanes)


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
    _assert_same(_whole(_walk, lanes), _whole(_walk, 3), rtol=1e-9)


def test_more_victims_or_restarts_leave_the_keys_of_the_others_alone() -> None:
    few, many = (jax.random.key_data(victim_keys(jax.random.key(0), v, r)) for v, r in ((2, 3), (4, 5)))
    np.testing.assert_array_equal(many[:2, :3], few)
    flat = np.asarray(many).reshape(20, -1)
    assert len(np.unique(flat, axis=0)) == 20


def test_progress_grows_to_the_whole() -> None:
    signs: list[Sign] = []
    _study(_walk(), lanes=4, progress_fn=signs.append)
    phase, done, total, seconds, left = zip(*signs, strict=True)
    assert phase[0] == "compiling"
    assert set(phase[1:]) == {"steps"}
    assert (np.diff(done) > 0).all()
    assert (np.diff(seconds) >= 0).all()
    assert set(total) == {NUM_VICTIMS * NUM_RESTARTS * NUM_STEPS} == {done[-1]}
    assert left[:2] == (None, None)  # the first call is no measure of the others
    assert all(seconds > 0 for seconds in left[2:-1])
    assert left[-1] == 0


def test_signs_of_life_come_by_time_and_not_by_number() -> None:
    """A prime number of steps is no different from others: there are few calls, of which the first ones are short."""
    calls = {}
    for num_steps in (997, 1_000, 4_000):
        signs: list[Sign] = []
        _study(_walk(), num_steps=num_steps, progress_fn=signs.append)
        calls[num_steps] = len(signs)
    assert max(calls.values()) < 12
    assert abs(calls[997] - calls[1_000]) <= 2


class _Interrupted(Exception):
    pass


def _interrupt_at(call: int, error: type[BaseException] = _Interrupted) -> Callable[[Sign], None]:
    calls: list[Sign] = []

    def progress_fn(sign: Sign) -> None:
        calls.append(sign)
        if len(calls) == call:
            raise error

    return progress_fn


def _interrupted(attack: Attack, path: Path, call: int) -> Path:
    """Interrupts a run at a sign of life, and returns the file that keeps its state."""
    with pytest.raises(_Interrupted) as stopped:
        _study(attack, lanes=4, checkpoint=path, progress_fn=_interrupt_at(call))
    (state,) = path.iterdir()
    assert stopped.value.__notes__ == [f"the same run goes on from the state kept in {state}"]
    return state


@pytest.mark.parametrize(
    ("build", "call"),
    # Calls do 1, 8, 8 and 3 steps of the first lanes, then 8, 8 and 4 of the second.
    [(_walk, 2), (_walk, 5), (_walk, 7), (_walk, 8), (_lbfgs, 7), (_path, 4), (_path, 7)],
)
def test_an_interrupted_study_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[[], Attack], call: int
) -> None:
    monkeypatch.setattr("gia_jax.sweep.stages.MAX_STEPS_PER_CALL", 8)
    state = _interrupted(build(), tmp_path, call)
    signs: list[Sign] = []
    resumed = _study(build(), lanes=4, checkpoint=tmp_path, progress_fn=signs.append)
    assert signs[1].done > 0  # nothing that was saved is done again
    assert resumed.checkpoint == state
    desired = _whole(build, 4)
    _assert_same(resumed, desired)
    again = _study(build(), lanes=4, checkpoint=tmp_path)  # nothing is lost before the caller says so
    _assert_same(again, desired)
    assert again.timing.run_seconds == resumed.timing.run_seconds


def test_a_path_is_kept_beside_an_unchanged_result() -> None:
    found = _whole(_path, 4)
    path = found.reconstruction.path
    _assert_same(found._replace(reconstruction=found.reconstruction._replace(path=())), _whole(_walk, 4))
    assert path.inputs.shape == (NUM_VICTIMS, 6, 2, 6)
    np.testing.assert_array_equal(path.inputs[:, -1], found.reconstruction.batch.inputs)
    assert (path.inputs[:, 0] != path.inputs[:, -1]).all()


def test_the_seconds_of_all_parts_count(tmp_path: Path) -> None:
    def slow(sign: Sign) -> None:
        time.sleep(0.5 if sign.done else 0)
        if sign.done:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        _study(_walk(), checkpoint=tmp_path, progress_fn=slow)
    assert _study(_walk(), checkpoint=tmp_path).timing.run_seconds > 0.5


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_whatever_stops_a_study_its_state_is_kept(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        _study(_walk(), checkpoint=tmp_path, progress_fn=_interrupt_at(3, error))
    _assert_same(_study(_walk(), checkpoint=tmp_path), _whole(_walk))


OTHERS: dict[str, Callable[[Path | None], Study]] = {
    "hyperparameter": lambda path: _study(_walk(0.2), lanes=4, checkpoint=path),
    "attack": lambda path: _study(_lbfgs(), lanes=4, checkpoint=path),
    "restarts": lambda path: _study(_walk(), lanes=4, checkpoint=path, num_restarts=1),
    "steps": lambda path: _study(_walk(), lanes=4, checkpoint=path, num_steps=30),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_runs_in_the_same_folder_leave_a_state_alone(
    tmp_path: Path, other: Callable[[Path | None], Study]
) -> None:
    state = _interrupted(_walk(), tmp_path, 4)
    before = state.read_bytes()
    _assert_same(other(tmp_path), other(None))
    assert state.read_bytes() == before
    _assert_same(_study(_walk(), lanes=4, checkpoint=tmp_path), _whole(_walk, 4))


def test_runs_at_the_same_time_share_a_folder(tmp_path: Path) -> None:
    """Two equal runs and another one save all the time, and none disturbs another."""

    @jax.enable_x64(True)  # the setting of the fixture, which holds in its own thread only
    def run(attack: Attack) -> Study:
        return _study(attack, lanes=2, checkpoint=tmp_path, checkpoint_seconds=0.0)

    with ThreadPoolExecutor() as pool:
        found = [pool.submit(run, attack) for attack in (_walk(), _walk(), _walk(0.2))]
    alone = _whole(_walk, 2)
    for one, desired in zip(found, (alone, alone, _study(_walk(0.2), lanes=2)), strict=True):
        _assert_same(one.result(), desired)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_state_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a state of an interruption before: it is not that of the end."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    state = _interrupted(_walk(), tmp_path, 3)
    monkeypatch.setattr("gia_jax._files.os.fsync", full)
    with pytest.warns(UserWarning, match="the run goes on, but its state cannot be kept in") as warned:
        found = _study(_walk(), lanes=4, checkpoint=tmp_path, checkpoint_seconds=0.0)
    assert len(warned) == 1
    assert found.checkpoint is None
    _assert_same(found, _whole(_walk, 4))
    assert list(tmp_path.iterdir()) == [state]  # no part of a file is left


def test_what_is_no_folder_or_time_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"checkpoint must be a folder, got the file '.*file'"):
        _study(_walk(), checkpoint=tmp_path / "file")
    with pytest.raises(ValueError, match="checkpoint_seconds must not be negative, got nan"):
        _study(_walk(), checkpoint=tmp_path, checkpoint_seconds=float("nan"))


def test_leaves_of_another_number_of_victims_are_named() -> None:
    observations = _observations()
    for wrong, name in (
        (observations._replace(extra={"labels": jnp.zeros((6, 1))}), r"extra'\]\['labels'\]"),
        (observations._replace(update={"a": jnp.zeros((3, 4)), "b": jnp.zeros((1, 4))}), r"update'\]\['b'\]"),
    ):
        with pytest.raises(ValueError, match=rf"observations\['{name} must have a first axis of 3 victims, got shape"):
            study(_walk(), jax.random.key(0), wrong, num_steps=1)


def test_an_attack_that_calls_back_keeps_no_state(tmp_path: Path) -> None:
    """What it calls is not part of the program, and another call must not be taken for it."""

    def attack(value: float) -> Attack:
        walk = _walk()

        def step(key: jax.Array, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
            state, info = walk.step(key, state, observation)
            # Not float64: JAX calls back from a thread of its own, in which the fixture's setting does not hold.
            shape = jax.ShapeDtypeStruct((), jnp.float32)
            loss = jax.pure_callback(lambda: np.asarray(value, np.float32), shape, vmap_method="sequential")
            return state, info._replace(loss=loss.astype(info.loss.dtype))

        return walk._replace(step=step)

    for value in (1.0, 2.0):
        with pytest.warns(UserWarning, match="no state is kept of an attack that calls back to Python"):
            found = _study(attack(value), num_restarts=1, checkpoint=tmp_path)
        assert found.checkpoint is None
        np.testing.assert_array_equal(found.losses, value)


def _damages() -> Iterator[Callable[[bytes], bytes]]:
    yield lambda data: b""
    yield lambda data: b"notes"
    yield lambda data: data[: len(data) // 2]
    yield lambda data: data + b"x"
    for place in range(0, 100_000, 397):
        yield lambda data, place=place: _flipped(data, place % len(data))


def _flipped(data: bytes, place: int) -> bytes:
    """The data with the lowest bit of one byte changed."""
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_a_file_that_is_no_state_is_an_error_and_is_left_alone(tmp_path: Path) -> None:
    state = _interrupted(_walk(), tmp_path, 3)
    whole = state.read_bytes()
    shapes = jax.eval_shape(lambda: jnp.zeros(3))
    fingerprint = serialization.msgpack_restore(whole[len(MAGIC) + 32 :])["fingerprint"]
    for damage in _damages():
        state.write_bytes(damage(whole))
        with pytest.raises(ValueError, match=r"checkpoint must be a file that a study wrote, got '.*\.state'") as error:
            RunState(tmp_path, fingerprint).load([shapes], shapes, Place(6, 1, 20))
        assert "\n" not in str(error.value)
        assert "pickle" not in str(error.value)
    with pytest.raises(ValueError, match=r"got '.*\.state': its content was changed"):
        _study(_walk(), lanes=4, checkpoint=tmp_path)
    assert state.read_bytes() == damage(whole)


@pytest.mark.parametrize(
    "place", [Place(first=-2), Place(first=7), Place(stage=1), Place(step=21), Place(step=-2), Place(seconds=-1.0)]
)
def test_a_place_outside_of_the_run_is_refused(tmp_path: Path, place: Place) -> None:
    saved = RunState(tmp_path, "0" * 64)
    saved.save(Progress(place, [], [], None))
    shapes = jax.eval_shape(lambda: jnp.zeros(3))
    with pytest.raises(ValueError, match=r"its place \(.*\) is not in the run"):
        saved.load([shapes], shapes, Place(6, 1, 20))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "bool", "key"])
def test_a_state_of_any_type_comes_back(tmp_path: Path, dtype: str) -> None:
    """Keys are among them: `optax.noisy_sgd` keeps one in its state."""
    leaf = jax.random.split(jax.random.key(3), 4) if dtype == "key" else jnp.arange(4).astype(dtype)
    saved, shape = RunState(tmp_path, "1" * 64), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    saved.save(Progress(Place(step=2), [], [np.zeros((4, 2))], {"a": leaf}))
    found = saved.load([{"a": shape}], shape, Place(6, 1, 20)).state["a"]
    assert found.dtype == leaf.dtype
    data = jax.random.key_data if dtype == "key" else np.asarray
    np.testing.assert_array_equal(data(found), data(leaf))


def test_an_optimizer_with_a_key_is_resumed(tmp_path: Path) -> None:
    attack = gradient_matching(CLIENT, optimizer=optax.noisy_sgd(0.1, key=jax.random.key(0)))
    _interrupted(attack, tmp_path, 3)
    _assert_same(_study(attack, lanes=4, checkpoint=tmp_path), _study(attack, lanes=4))


def _warmed_up() -> Attack:
    return keep_best(continued(_walk_from(), _lbfgs(), num_steps=7, num_starts=3))


def _walk_from() -> Attack:
    return keep_best(gradient_matching(CLIENT, optimizer=optax.adam(0.1)))


def test_a_warm_up_is_run_in_sight(tmp_path: Path) -> None:
    """In pieces a warm-up does what `run` does in one, and it is saved and resumed like the steps."""
    attack, signs = _warmed_up(), []
    found = _study(attack, num_restarts=1, progress_fn=signs.append)
    total = NUM_VICTIMS * (NUM_STEPS + 7)
    assert {sign.phase for sign in signs} == {"compiling", "warm-up", "steps"}
    assert signs[-1].done == signs[-1].total == total
    keys, observations = victim_keys(jax.random.key(5), NUM_VICTIMS, 1), _observations()
    for v in range(NUM_VICTIMS):
        update, extra = jax.tree.map(lambda leaf, v=v: leaf[v], (observations.update, observations.extra))
        seen = Observation(observations.params, update, extra)
        reconstruction, info = jax.jit(lambda k, o: gia_jax.run(attack, k, o, num_steps=NUM_STEPS))(keys[v, 0], seen)
        np.testing.assert_allclose(found.losses[v, 0], info.loss, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(found.reconstruction.batch.inputs[v], reconstruction.batch.inputs, atol=1e-5)
    for call in range(2, len(signs)):
        path = tmp_path / str(call)
        with pytest.raises(_Interrupted):
            _study(attack, num_restarts=1, checkpoint=path, progress_fn=_interrupt_at(call))
        _assert_same(_study(attack, num_restarts=1, checkpoint=path), found)


def test_the_best_of_several_starts_goes_on() -> None:
    """The start that ends at the lowest loss is handed over, and never one that is not finite."""

    def init_fn(key: jax.Array, observation: Observation) -> jax.Array:
        start = 3 * jax.random.normal(key, observation.extra["inputs_like"].shape)
        return jnp.where(jax.random.bernoulli(key, 0.3), jnp.nan, start)

    first = gradient_matching(CLIENT, init_fn=init_fn, optimizer=optax.sgd(0.01))
    still = gradient_matching(CLIENT, optimizer=optax.sgd(0.0))
    observations = _observations()
    seen = Observation(observations.params, *jax.tree.map(lambda x: x[0], (observations.update, observations.extra)))
    starts = from_starts(first, 8)
    key_init, key_steps, _ = jax.random.split(jax.random.key(2), 3)
    ended, _ = advance(starts, key_steps, starts.init(key_init, seen), seen, start=0, num_steps=5)
    losses = np.asarray(jax.vmap(first.finalize, (0, None))(ended.candidate, seen).loss)
    assert np.isnan(losses).any()
    state = continued(first, still, num_steps=5, num_starts=8).init(jax.random.key(2), seen)
    handed = ended.candidate.variables[np.nanargmin(losses)]
    np.testing.assert_allclose(state.candidate.variables, handed, rtol=1e-6)


def test_old_style_keys_are_keys() -> None:
    new = study(_walk(), jax.random.key(5), _observations(), num_steps=3)
    _assert_same(study(_walk(), jax.random.PRNGKey(5), _observations(), num_steps=3), new)


@pytest.mark.parametrize("value", [0, -1, True])
@pytest.mark.parametrize("name", ["num_steps", "num_restarts", "lanes"])
def test_counts_that_are_none_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer .*, got {value}"):
        _study(_walk(), **{name: value})


@pytest.mark.parametrize("name", ["num_steps", "num_restarts"])
def test_counts_beyond_memory_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must fit into memory: it needs .* GiB, got 2147483647"):
        _study(_walk(), **{"num_restarts": 1_000} | {name: 2**31 - 1})


def test_one_victim_that_is_not_finite_leaves_the_others_alone() -> None:
    observations = _observations()
    bias = observations.update["head"]["bias"].at[1, 2].set(jnp.nan)
    observations = observations._replace(update={"head": observations.update["head"] | {"bias": bias}})
    kept = np.asarray([0, 2])

    def others(found: Study) -> Any:
        return jax.tree.map(lambda leaf: leaf[kept], (found.reconstruction, found.losses))

    def analytic(observations: Observation) -> Study:
        return study_analytic(attacks.linear_inversion(dense("head")), jax.random.key(5), observations)

    for run in (lambda seen: study(_lbfgs(), jax.random.key(5), seen, num_steps=5), analytic):
        with pytest.warns(UserWarning, match="the observations of victims 1 are not finite: their is_finite is False"):
            found = run(observations)
        np.testing.assert_array_equal(found.reconstruction.is_finite, [True, False, True])
        jax.tree.map(np.testing.assert_array_equal, others(found), others(run(_observations())))


def found_of(update: np.ndarray) -> Reconstruction:
    return Reconstruction(Batch(update[None], np.array([1])), np.array(0.0), np.array(True))


def test_a_search_on_the_host_is_spared_what_is_not_finite() -> None:
    updates, searched = jnp.array([[1.0, 2.0], [jnp.nan, 1.0], [3.0, 4.0], [5.0, 6.0]]), []
    extra = {"mask": jnp.array([1.0, 1.0, 1.0, jnp.inf])}

    def search(key: jax.Array, observation: Observation) -> Reconstruction:
        searched.append(np.asarray(observation.update))
        assert np.isfinite(searched[-1]).all()
        assert np.isfinite(observation.extra["mask"])
        return found_of(searched[-1])

    with pytest.warns(UserWarning, match="victims 1, 3 are not finite"):
        found = study_on_host(search, jax.random.key(0), Observation({}, updates, extra)).reconstruction
    assert len(searched) == 2
    assert found.is_finite.tolist() == [True, False, True, False]
    np.testing.assert_array_equal(found.batch.inputs[:, 0], [[1, 2], [np.nan] * 2, [3, 4], [np.nan] * 2])
    np.testing.assert_array_equal(found.restart_losses, [[0], [np.nan], [0], [np.nan]])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("search", "message"),
    [
        (3, "reconstruct_fn must be a function, got 3"),
        (lambda key, seen: None, "reconstruct_fn must return a Reconstruction, got None for victim 0"),
        (
            lambda key, seen: found_of(np.zeros(int(seen.update[0]))),
            r"reconstruct_fn\(...\) of victim 1 does not fit .*inputs has shape \(1, 3\), expected \(1, 1\)",
        ),
        (
            lambda key, seen: found_of(np.zeros(1))._replace(loss=np.zeros(1)),
            r"reconstruct_fn must return a scalar loss, got shape \(1,\) for victim 0",
        ),
    ],
)
def test_a_search_on_the_host_that_returns_something_else_is_named(search: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study_on_host(search, jax.random.key(0), Observation({}, jnp.array([[1.0], [3.0]])))


def test_observations_of_which_none_is_finite_are_named() -> None:
    observations = _observations()
    bad = jax.tree.map(lambda leaf: leaf.at[:].set(jnp.nan), observations.update)
    for seen, message in (
        (observations._replace(update=bad), r"observations must be finite, got nan at observations.*head.*bias"),
        (
            observations._replace(params=jax.tree.map(lambda leaf: leaf * jnp.inf, observations.params)),
            "params must be",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            study(_walk(), jax.random.key(0), seen, num_steps=1)
        with pytest.raises(ValueError, match=message):
            study_analytic(attacks.linear_inversion(dense("head")), jax.random.key(0), seen)


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
