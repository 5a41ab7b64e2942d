"""Sweeps in a store: what is read is what a sweep in memory finds, whoever wrote it and whatever killed it."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gia_jax import Attack, Observation, gradient_matching
from gia_jax.sweep import Sweep, grid, open_sweep, stored_sweep, sweep

SETTINGS, KEY = grid(rate=[0.1, 0.3, 0.2]), jax.random.key(0)
OPTIONS: dict[str, Any] = {"num_steps": 4, "num_restarts": 3, "lanes": 4}  # 18 lanes in 5 batches
OBSERVATIONS = Observation(
    {"kernel": jnp.ones(2)},
    {"kernel": jnp.array([[0.5, -1.0], [2.0, 0.0]])},
    {"inputs_like": jnp.zeros((2, 1, 2)), "labels": jnp.array([[0], [0]])},
)


def _client(params: Any, batch: Any) -> Any:
    return {"kernel": batch.inputs.mean(0)}


def _attack(setting: Any) -> Attack:
    return gradient_matching(_client, optimizer=optax.adam(setting["rate"]))


def _stored(store: Any, **options: Any) -> Any:
    return stored_sweep(store, _attack, SETTINGS, KEY, OBSERVATIONS, **(OPTIONS | options))


@pytest.fixture(scope="module")
def whole() -> Sweep:
    return sweep(_attack, SETTINGS, KEY, OBSERVATIONS, **OPTIONS)


def _assert_same(found: Any, whole: Sweep) -> None:
    assert found.done.all()
    np.testing.assert_array_equal(found.losses, whole.losses)
    np.testing.assert_array_equal(found.loss, whole.reconstruction.restart_losses)
    best = found.isel(restart=found.loss.argmin("restart"))
    np.testing.assert_array_equal(best.inputs, whole.reconstruction.batch.inputs)
    np.testing.assert_array_equal(best.labels, whole.reconstruction.batch.labels)
    np.testing.assert_array_equal(found.rate, SETTINGS["rate"].astype(np.float32))


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_a_store_holds_what_a_sweep_finds(tmp_path: Path, whole: Sweep, kind: str) -> None:
    store = tmp_path / "store" if kind == "folder" else f"memory://{tmp_path.name}"
    given = {"threat model": "server with labels", "n": 2}
    found = _stored(store, attributes=given)
    _assert_same(found, whole)
    assert found.attrs.items() >= given.items()
    assert found.losses.dims == ("setting", "victim", "restart", "step")
    signs = []
    _assert_same(_stored(store, progress_fn=signs.append), whole)
    assert [sign.done for sign in signs[1:]] == [16, 32, 48, 64, 72] + [72]  # nothing is computed again
    if kind == "folder":
        assert [path.name for path in tmp_path.glob("store/*")] == ["shard-0"]


def test_processes_write_their_own_shards(tmp_path: Path, whole: Sweep) -> None:
    first = _stored(tmp_path, process=(1, 2))
    assert first.done.values.sum() == 18 - 2 * 4
    assert np.isnan(first.loss.values[~first.done.values]).all()
    np.testing.assert_array_equal(first.losses.values[first.done.values], whole.losses[first.done.values])
    _assert_same(_stored(tmp_path, process=(0, 2)), whole)
    # Of a store that lost a shard, any number of processes computes what is missing, and no more.
    shutil.rmtree(tmp_path / "shard-0")
    signs = []
    _assert_same(_stored(tmp_path, progress_fn=signs.append), whole)
    assert signs[-1].done == 18 * 4


def test_processes_without_a_batch_are_told(tmp_path: Path, whole: Sweep) -> None:
    for index in range(6):
        with pytest.warns(UserWarning, match="1 of 6 processes have nothing to do: there are 5 batches of 4 lanes"):
            found = _stored(tmp_path, process=(index, 6))
    _assert_same(found, whole)


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("call", [2, 3, 5, 7])
def test_an_interrupted_store_is_completed(tmp_path: Path, whole: Sweep, call: int) -> None:
    signs = []

    def stop(sign: Any) -> None:
        signs.append(sign)
        assert not signs[1:] or open_sweep(tmp_path).done.values.sum() <= sign.done // 4  # read while it is written
        if len(signs) == call:
            raise _Stopped

    with pytest.raises(_Stopped):
        _stored(tmp_path, progress_fn=stop)
    for state in (tmp_path / "states").iterdir():
        state.with_name(f"{state.name}.0f.part").write_bytes(b"half")  # of a process that was killed as it wrote
    left = []
    _assert_same(_stored(tmp_path, progress_fn=left.append), whole)
    assert left[1].done >= signs[-1].done  # nothing is done again
    assert [path.name for path in tmp_path.iterdir()] == ["shard-0"]


def test_a_shard_that_was_killed_in_the_making_is_made_anew(tmp_path: Path, whole: Sweep) -> None:
    _stored(tmp_path)
    description = tmp_path / "shard-0" / "zarr.json"
    description.write_text(description.read_text().replace('"fingerprint"', '"other"'))
    (tmp_path / "shard-0" / "loss" / "c" / "0.1f.partial").write_bytes(b"half")
    with pytest.raises(ValueError, match="store must be one that a sweep has written to"):
        open_sweep(tmp_path)
    _assert_same(_stored(tmp_path), whole)
    assert not list(tmp_path.rglob("*.partial"))


def test_half_precision_is_kept_as_float32(tmp_path: Path) -> None:
    seen = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, OBSERVATIONS)
    found = stored_sweep(tmp_path, _attack, SETTINGS, KEY, seen, **OPTIONS)
    assert found.inputs.dtype == np.float32
    assert found.is_finite.all()


def test_inputs_that_are_a_tree_are_several_arrays(tmp_path: Path) -> None:
    def client_fn(params: Any, batch: Any) -> Any:
        return {"kernel": batch.inputs["a"].mean(0) + batch.inputs["b"].mean()}

    like = {"a": jnp.zeros((2, 1, 2)), "b": jnp.zeros((2, 1))}
    seen = OBSERVATIONS._replace(extra={**OBSERVATIONS.extra, "inputs_like": like})
    found = stored_sweep(
        tmp_path, lambda setting: gradient_matching(client_fn, optimizer=optax.sgd(setting)), np.ones(2), KEY, seen,
        num_steps=2,
    )  # fmt: skip
    assert found["inputs.a"].shape == (2, 2, 1, 1, 2)
    assert found["inputs.b"].shape == (2, 2, 1, 1)
    assert found["setting_value"].shape == (2,)


def test_what_another_sweep_wrote_is_left_alone(tmp_path: Path, whole: Sweep) -> None:
    _stored(tmp_path)
    for other in (
        lambda: stored_sweep(tmp_path, _attack, grid(rate=[0.1, 0.3, 0.4]), KEY, OBSERVATIONS, **OPTIONS),
        lambda: _stored(tmp_path, num_steps=5),
        lambda: stored_sweep(tmp_path, _attack, SETTINGS, jax.random.key(1), OBSERVATIONS, **OPTIONS),
    ):
        with pytest.raises(ValueError, match=r"store must be new or hold the same sweep, got '.*', which was"):
            other()
    _assert_same(open_sweep(tmp_path), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process": (2, 2)}, "index_of_process must be .*, got 2"),
        ({"attributes": {"shape": 1}}, "attributes must not have the name 'shape'"),
        ({"attributes": {"rate": float("nan")}}, "attributes must have values that JSON can hold"),
        ({"checkpoint_seconds": -1.0}, "checkpoint_seconds must not be negative, got -1.0"),
    ],
)
def test_arguments_that_fit_no_store_are_named(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _stored(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_store_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="store must be one that a sweep has written to, got"):
            open_sweep(path)
