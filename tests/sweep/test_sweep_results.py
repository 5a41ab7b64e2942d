"""Sweeps in a store: what is read is what a sweep in memory finds, whoever wrote it and whatever killed it."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gia_jax import Attack, Observation, gradient_matching, keep_path
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


def test_a_store_holds_paths(tmp_path: Path, whole: Sweep) -> None:
    def attack(setting: Any) -> Attack:
        return keep_path(_attack(setting), num_points=2, num_steps=4)

    found = stored_sweep(tmp_path, attack, SETTINGS, KEY, OBSERVATIONS, **OPTIONS)
    _assert_same(found, whole)
    names = {"path.inputs", "path.labels"}
    assert {name for name in map(str, found.data_vars) if name.startswith("path")} == names
    assert found["path.inputs"].dims[:5] == ("setting", "victim", "restart", "point", "example")
    np.testing.assert_array_equal(found["path.inputs"][:, :, :, -1], found.inputs)
    best = found.isel(restart=found.loss.argmin("restart"))
    in_memory = sweep(attack, SETTINGS, KEY, OBSERVATIONS, **OPTIONS).reconstruction.path
    np.testing.assert_array_equal(best["path.inputs"], in_memory.inputs)
    assert (best["path.inputs"][:, :, 0] != best.inputs).any()


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
    rates = {"rate": jnp.array([0.1, 0.3, 0.2], jnp.bfloat16)}
    found = stored_sweep(tmp_path, _attack, rates, KEY, seen, **OPTIONS)
    assert found.inputs.dtype == found.rate.dtype == np.float32
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
        ({"attributes": {"versions": 1}}, "attributes must not have the name 'versions'"),
        ({"attributes": {"rate": float("nan")}}, "attributes must have values that JSON can hold"),
        ({"attributes": [1]}, r"attributes must be a mapping, got \[1\]"),
        ({"attributes": {1: 2}}, "attributes must not have the name 1, which is no string"),
        ({"checkpoint_seconds": -1.0}, "checkpoint_seconds must not be negative, got -1.0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_arguments_that_fit_no_store_are_named(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _stored(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_store_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="store must be one that a sweep has written to, got"):
            open_sweep(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("file", "store must be a folder, got the file '.*file'"),
        ("", "store must be the path of a folder or an address"),
    ],
)
def test_a_place_for_no_store_is_named(tmp_path: Path, kind: str, message: str) -> None:
    (tmp_path / "file").write_text("mine")
    store = tmp_path / kind / "below" if kind else kind
    for call in (_stored, open_sweep):
        with pytest.raises(ValueError, match=message):
            call(store)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_store_may_have_any_name(tmp_path: Path, whole: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    _assert_same(_stored(tmp_path / "store"), whole)
    for name, store in {"a b#c": "a b#c", "d::e": "d::e", "home": "~/home", "url": f"file://{tmp_path}/url/"}.items():
        (tmp_path / "store").rename(name)
        signs = []
        _assert_same(_stored(store, progress_fn=signs.append), whole)
        assert signs[1].done == 16  # it found what is there
        _assert_same(open_sweep(store), whole)
        (tmp_path / name).rename("store")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize(
    "settings", [{"a/b": np.ones(2)}, {"a.b": np.ones(2), "a": {"b": np.ones(2)}}, {"..": np.ones(2)}]
)
def test_settings_that_a_store_cannot_name_are_named(tmp_path: Path, settings: Any) -> None:
    with pytest.raises(ValueError, match="settings must have names that"):
        stored_sweep(tmp_path, lambda _: _attack({"rate": 0.1}), settings, KEY, OBSERVATIONS, **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_settings_may_have_the_names_of_results(tmp_path: Path) -> None:
    settings = {name: np.full(2, i) for i, name in enumerate(("loss", "settings.loss", "step", "psnr"))}
    found = stored_sweep(tmp_path, lambda _: _attack({"rate": 0.1}), settings, KEY, OBSERVATIONS, num_steps=2)
    kept = {name: int(array[0]) for name, array in found.coords.items()}
    assert kept == {"settings.loss": 0, "settings.settings.loss": 1, "settings.step": 2, "psnr": 3}


def test_what_is_broken_in_a_store_is_named(tmp_path: Path, whole: Sweep) -> None:
    _stored(tmp_path)
    shard = tmp_path / "shard-0"
    chunk = next(path for path in (shard / "losses" / "c").rglob("*") if path.is_file())
    for path, content in {
        chunk: bytes([*chunk.read_bytes()[:-5], *(255 - byte for byte in chunk.read_bytes()[-5:])]),
        shard / "loss" / "zarr.json": b"",
        shard / "zarr.json": b"{",
    }.items():
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"store must be whole, got '.*/shard-0', which is broken"):
            open_sweep(tmp_path)
        path.write_bytes(before)
    shutil.rmtree(shard / "settings")
    with pytest.raises(ValueError, match=r"store must be whole, got '.*/shard-0', which is broken"):
        _stored(tmp_path)
    shutil.rmtree(shard)
    (tmp_path / "shard-1").mkdir()  # another process is just beginning
    _assert_same(_stored(tmp_path), whole)


def test_no_two_processes_write_one_shard(tmp_path: Path, whole: Sweep) -> None:
    def again(sign: Any) -> None:
        with pytest.raises(ValueError, match=r"process must be of another index .* is running with index 0 on"):
            _stored(tmp_path)

    claims = []
    _stored(tmp_path, progress_fn=lambda sign: again(sign) if claims else claims.append(sign))
    _assert_same(_stored(tmp_path), whole)


def test_victims_that_are_not_finite_are_marked(tmp_path: Path) -> None:
    extra = {**OBSERVATIONS.extra, "of no use": jnp.array([1.0, jnp.nan])}
    with pytest.warns(UserWarning, match="victims 1 are not finite"):
        found = stored_sweep(tmp_path, _attack, SETTINGS, KEY, OBSERVATIONS._replace(extra=extra), **OPTIONS)
    assert np.array_equal(found.is_finite.all(("setting", "restart")), [True, False])
    assert np.isfinite(found.loss).all()


def test_a_function_may_be_named_a_callback(tmp_path: Path) -> None:
    @jax.jit
    def callback(inputs: Any) -> Any:
        return inputs.mean(0)

    def make_attack(setting: Any) -> Attack:
        return gradient_matching(lambda _, batch: {"kernel": callback(batch.inputs)}, optimizer=optax.sgd(setting))

    assert stored_sweep(tmp_path, make_attack, np.ones(1), KEY, OBSERVATIONS, num_steps=1).done.all()


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (np.array([0.1, 1e300]), r"settings\['rate'\] must be numbers that float32 can hold, got 1e\+300"),
        (np.array([1e-60, 0.1]), r"settings\['rate'\] must be numbers that float32 can hold, got 1e-60"),
        (np.array([1, 2**40]), r"settings\['rate'\] must be numbers that int32 can hold, got 1099511627776"),
    ],
)
def test_numbers_that_would_be_lost_are_named(rate: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(_attack, {"rate": rate}, KEY, OBSERVATIONS, **OPTIONS)
