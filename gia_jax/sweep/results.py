"""Results of a sweep on disk, as labelled arrays that any number of processes write and that can be read meanwhile.

A store is a folder, or any address that fsspec knows. Every process writes one zarr group of its own to the store,
`shard-0`, `shard-1` and so on. The processes do not communicate, and if one dies the others go on.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax._environment import hardware, versions
from gia_jax.base import Attack, Observation
from gia_jax.matching.run import planned_steps
from gia_jax.sweep.engine import Finished, Ran, run_lanes
from gia_jax.sweep.grid import checked_settings
from gia_jax.sweep.progress import ProgressFn
from gia_jax.sweep.store import forget
from gia_jax.sweep.study import Plan, plan

if TYPE_CHECKING:
    import xarray

LANE = ("setting", "victim", "restart")
SCORES = "scores"  # name of the group of scores in a store


def stored_sweep(
    store: str | Path,
    make_attack: Callable[[Any], Attack],
    settings: PyTree[Any],
    key: PRNGKeyArray,
    observations: Observation,
    *,
    num_steps: int | None = None,
    num_restarts: int = 1,
    lanes: int = 16,
    mesh: Mesh | None = None,
    process: tuple[int, int] | None = None,
    attributes: Mapping[str, Any] | None = None,
    progress_fn: ProgressFn | None = None,
    checkpoint_seconds: float = 30.0,
) -> "xarray.Dataset":
    """Runs a sweep as `sweep` does, and writes the results of every batch of lanes to a store as soon as it ends.

    A lane is one restart on one victim under one setting. The memory of the process does not grow with the number of
    lanes, and `open_sweep` reads the store at any time. To go on with a sweep that was killed, call this function again
    with the same arguments: it runs the missing lanes alone, and on the same devices the results equal those of an
    uninterrupted sweep bit for bit.

    Several processes can share a sweep without communication. Each of them calls this function with the same arguments
    but for `process`, runs its own part of the batches on its own devices, and writes its own shard. If a process dies,
    the others finish their parts. On a cluster with SLURM run `srun python script.py`, where the script passes

        process=(int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"]))

    and every process computes the same observations from the same random keys. On a pod of TPUs leave `process` out,
    and run the script on all hosts with these first lines. The first of them lets the other hosts go on if one dies:

        jax.config.update("jax_enable_recoverability", True)
        jax.distributed.initialize()

    Args:
        store: Path of a folder, or an address of fsspec such as "gs://bucket/sweep". It must be new or hold the same
            sweep.
        make_attack: Function `setting -> attack`, as for `sweep`.
        settings: Tree of arrays with a leading axis of length s, such as `grid` makes it.
        key: Random key of the attacker.
        observations: Observations of v victims, stacked by `gia_jax.stack`.
        num_steps: Number of steps of every restart, at least 1. None takes the `num_steps` of the attacks.
        num_restarts: Number of restarts of every victim under every setting, at least 1.
        lanes: Number of restarts that run side by side on all devices of a process, at least 1. They form a
            batch, and every process runs whole batches: a warning tells if there are fewer batches than processes.
        mesh: Mesh of devices of this process with an axis "lanes". None takes all devices of this process.
        process: Pair of the index of this process, from 0, and the number of processes. None takes
            `jax.process_index()` and `jax.process_count()`.
        attributes: Attributes of the dataset, whose values JSON can hold. A report shows "title", "threat_model" and
            "command". The names "shape" and "fingerprint" are taken.
        progress_fn: Function that is called with a `Sign` before compiling, and every few seconds from then on.
        checkpoint_seconds: Least time in seconds between two saves of the state of the batch under way, at least 0. The
            state is kept in the folder `states` of a local store. Elsewhere an interruption loses the batch under way.

    Returns:
        The dataset of the store, as `open_sweep` reads it. Lanes that other processes have not run yet have "done"
        False.

    Raises:
        ValueError: If the store holds another sweep, `process` is no pair of an index and a larger number, the
            attributes have values that JSON cannot hold, the attack calls back to Python, or in the cases in which
            `sweep` raises it.
        ImportError: If the extra `sweep` is not installed.

    Examples:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp, optax
        >>> from gia_jax import Observation, gradient_matching
        >>> from gia_jax.sweep import grid, stored_sweep
        >>> def client_fn(params, batch):  # gradient of the mean output of a linear model
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> params, updates = {"kernel": jnp.array([1.0, 1.0])}, {"kernel": jnp.array([[0.5, -1.0], [2.0, 0.0]])}
        >>> extra = {"inputs_like": jnp.zeros((2, 1, 2)), "labels": jnp.array([[0], [0]])}
        >>> def make_attack(setting):
        ...     return gradient_matching(client_fn, optimizer=optax.sgd(setting["rate"]))
        >>> seen, key = Observation(params, updates, extra), jax.random.key(0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = stored_sweep(folder + "/rates", make_attack, grid(rate=[0.1, 0.3]), key, seen, num_steps=9)
        >>> dict(found.losses.sizes), found.rate.values.tolist()
        ({'setting': 2, 'victim': 2, 'restart': 1, 'step': 9}, [0.10000000149011612, 0.30000001192092896])
    """
    packages()
    settings, num_settings, attack = checked_settings(make_attack, settings)
    num_steps = planned_steps(attack, num_steps)
    process = (jax.process_index(), jax.process_count()) if process is None else _checked(process)
    _check.not_negative(checkpoint_seconds=checkpoint_seconds)
    planned = plan(
        key,
        observations,
        num_steps=num_steps,
        num_restarts=num_restarts,
        lanes=lanes,
        mesh=mesh,
        num_settings=num_settings,
        settings=settings,
        process=process,
    )
    shard = _Shard(str(store), process[0], planned, _as_json(attributes))
    states = None if "://" in str(store) else Path(store) / "states"
    ran = run_lanes(
        attack,
        planned.lanes,
        num_steps=num_steps,
        mesh=planned.mesh,
        progress_fn=progress_fn,
        checkpoint=states,
        checkpoint_seconds=checkpoint_seconds,
        keeper=shard,
    )
    shard.note(ran)
    if ran.checkpoint is not None:
        forget(ran.checkpoint)
    found = open_sweep(store)
    if states is not None and found.done.all():
        shutil.rmtree(states, ignore_errors=True)  # of runs with another number of processes, which nobody goes on with
    return found


def open_sweep(store: str | Path) -> "xarray.Dataset":
    """Reads the results of a sweep from its store, at any time, also while the sweep is running.

    Args:
        store: Path or address of a store that `stored_sweep` wrote.

    Returns:
        A dataset with the dimensions setting, victim, restart and step, whose arrays are in memory:

        * "loss", "is_finite" and "done" (setting, victim, restart): the loss that the attack ends with, whether loss
          and reconstruction are finite, and whether this restart has been run. The entries of a restart that has not
          been run are NaN, False or 0;
        * "losses" (setting, victim, restart, step): the loss at every step;
        * "inputs" and "labels" (setting, victim, restart, example, ...): the reconstructions. Inputs that are a tree
          become several arrays, such as "inputs.nodes";
        * every score that `score_sweep` wrote (setting, victim, example), such as "psnr";
        * every array of the settings, as a coordinate of the dimension setting.

        Its attributes are those given to `stored_sweep`, "fingerprint", "versions", "hardware", and the sums over all
        processes of "compile_seconds" and "run_seconds". Its methods `to_netcdf` and `to_zarr` write it as a whole.

    Raises:
        ValueError: If there is no such store, or its shards belong to different sweeps.
        ImportError: If the extra `sweep` is not installed.

    Examples:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp, optax
        >>> from gia_jax import Observation, gradient_matching
        >>> from gia_jax.sweep import grid, open_sweep, stored_sweep
        >>> def client_fn(params, batch):  # gradient of the mean output of a linear model
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> extra = {"inputs_like": jnp.zeros((1, 1, 2)), "labels": jnp.array([[0]])}
        >>> seen = Observation({"kernel": jnp.ones(2)}, {"kernel": jnp.array([[0.5, -1.0]])}, extra)
        >>> make = lambda setting: gradient_matching(client_fn, optimizer=optax.sgd(setting["rate"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = stored_sweep(folder + "/rates", make, grid(rate=[0.1, 0.3]), jax.random.key(0), seen, num_steps=4)
        ...     found = open_sweep(folder + "/rates")
        >>> bool(found.done.all()), found.inputs.shape, found.sel(setting=1).losses.dims
        (True, (2, 1, 1, 1, 2), ('victim', 'restart', 'step'))
    """
    xarray, zarr, fsspec = packages()
    shards = [zarr.open_group(path, mode="r") for path in _shards(fsspec, str(store))]
    shards = [shard for shard in shards if "fingerprint" in shard.attrs]
    if not shards:
        raise ValueError(f"store must be one that a sweep has written to, got {str(store)!r}")
    attributes = [dict(shard.attrs) for shard in shards]
    for other in attributes[1:]:
        if other["fingerprint"] != attributes[0]["fingerprint"]:
            raise ValueError(f"store must hold a single sweep, got {str(store)!r} with shards of different sweeps")
    shape, found = tuple(attributes[0].pop("shape")), {}
    done = [np.asarray(shard["done"][:]) for shard in shards]
    for name, first in shards[0].arrays():
        joined = np.full(first.shape, first.fill_value, first.dtype)
        for shard, mine in zip(shards, done, strict=True):
            joined[mine] = np.asarray(shard[name][:])[mine]
        found[name] = ((*LANE, *first.metadata.dimension_names[1:]), joined.reshape(*shape, *first.shape[1:]))
    settings = {}
    for name, array in shards[0]["settings"].arrays():
        name = f"settings.{name}" if name in found else name
        settings[name] = (("setting", *(f"{name}_{axis}" for axis in range(1, array.ndim))), np.asarray(array[:]))
    for name, array in _scores(zarr, fsspec, str(store)).items():
        name = f"{SCORES}.{name}" if name in found else name
        found[name] = (array.metadata.dimension_names, np.asarray(array[:]))
    return xarray.Dataset(found, coords=settings, attrs=_joined(attributes))


class _Shard:
    """The zarr group that one process writes, with a row for every lane. The process fills the rows of its own lanes.

    Rows that are not filled take no space on disk.
    """

    def __init__(self, store: str, index: int, planned: Plan, attributes: dict[str, Any]) -> None:
        self._store, self._path, self._planned = store, f"{store.rstrip('/')}/shard-{index}", planned
        self._attributes, self._group = attributes, None

    def open(self, fingerprint: str, found: Finished) -> None:
        """Opens the group, and creates it if it is new."""
        _, zarr, fsspec = packages()
        if "://" not in self._path:
            for part in Path(self._path).rglob("*.partial"):
                part.unlink(missing_ok=True)  # left by a process that was killed while it wrote
        self._done = np.zeros(int(np.prod(self._planned.shape)), bool)
        for path in _shards(fsspec, self._store):
            group = zarr.open_group(path, mode="r")
            written = group.attrs.get("fingerprint")
            if written is None:
                continue  # a process was killed, or is busy, before it had made the arrays
            if written != fingerprint:
                raise ValueError(
                    f"store must be new or hold the same sweep, got {self._store!r}, which was written with other "
                    "settings, data, devices or versions"
                )
            self._done |= np.asarray(group["done"][:])
        group = zarr.open_group(self._path, mode="a")
        if "fingerprint" not in group.attrs:
            self._make(group, found)
            # The attributes are written last: a group without a fingerprint is created anew.
            own = {"shape": list(self._planned.shape), "fingerprint": fingerprint}
            group.attrs.update({"versions": versions(), "hardware": hardware(), **self._attributes, **own})
        self._group = group

    def _make(self, group: Any, found: Finished) -> None:
        """Makes the arrays of all lanes, and those of the settings."""
        lanes, total = self._planned.lanes, int(np.prod(self._planned.shape))
        done = jax.ShapeDtypeStruct((lanes.size,), bool)
        for name, (dimensions, leaf) in {**_named(found), "done": (("lane",), done)}.items():
            group.create_array(
                name,
                shape=(total, *leaf.shape[1:]),
                chunks=leaf.shape,
                dtype=leaf.dtype,
                fill_value=np.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else np.zeros((), leaf.dtype).item(),
                dimension_names=dimensions,
                overwrite=True,
            )
        settings = group.require_group("settings")
        for path, leaf in jax.tree.leaves_with_path(lanes.settings):
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "setting_value"
            settings.create_array(name, data=leaf, overwrite=True)

    def note(self, ran: Ran) -> None:
        """Adds the time of a run to that of the runs before it."""
        assert self._group is not None
        for name in ("compile_seconds", "run_seconds"):
            self._group.attrs[name] = self._group.attrs.get(name, 0.0) + getattr(ran, name)

    def has(self, first: int, last: int) -> bool:
        """Tells whether the results of these lanes are stored already."""
        return bool(self._done[first:last].all())

    def keep(self, first: int, found: Finished) -> None:
        """Writes the results of lanes. The lanes count as done when all their results are written."""
        assert self._group is not None
        for name, (_, leaf) in _named(found).items():
            self._group[name][first : first + len(leaf)] = leaf
        self._group["done"][first : first + len(found.losses)] = True


def _named(found: Finished) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Returns the arrays of results by name, each with the names of its dimensions."""
    reconstruction, losses = found
    named: dict[str, tuple[tuple[str, ...], Any]] = {
        "loss": (("lane",), reconstruction.loss),
        "is_finite": (("lane",), reconstruction.is_finite),
        "losses": (("lane", "step"), losses),
    }
    for path, leaf in jax.tree.leaves_with_path(reconstruction.batch._asdict()):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        named[name] = (("lane", "example", *(f"{name}_{axis}" for axis in range(2, len(leaf.shape)))), leaf)
    return {name: (dimensions, _storable(leaf)) for name, (dimensions, leaf) in named.items()}


def _storable(leaf: Any) -> Any:
    """Returns an array, or its shape, in a type that zarr knows: types such as bfloat16 become float32."""
    if np.dtype(leaf.dtype).kind != "V":
        return leaf
    return leaf.astype(np.float32) if isinstance(leaf, np.ndarray) else jax.ShapeDtypeStruct(leaf.shape, np.float32)


def _joined(attributes: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins the attributes of all shards, with the sums of their seconds."""
    seconds = {name: sum(one.get(name, 0.0) for one in attributes) for name in ("compile_seconds", "run_seconds")}
    return {**attributes[0], **seconds}


def _scores(zarr: Any, fsspec: Any, store: str) -> dict[str, Any]:
    """Returns the arrays of scores in a store by their names, none where it has no scores."""
    path = f"{store.rstrip('/')}/{SCORES}"
    system, root = fsspec.core.url_to_fs(path)
    if not system.exists(root):
        return {}
    group = zarr.open_group(path, mode="r")
    return dict(group.arrays()) if "shown" in group.attrs else {}


def _shards(fsspec: Any, store: str) -> list[str]:
    """Returns the paths or addresses of the shards of a store, in their order."""
    system, root = fsspec.core.url_to_fs(store)
    if not system.exists(root):
        return []
    names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in system.ls(root, detail=False)]
    names = [name for name in names if name.startswith("shard-") and name[len("shard-") :].isdigit()]
    return [f"{store.rstrip('/')}/{name}" for name in sorted(names, key=lambda name: int(name[len("shard-") :]))]


def _checked(process: Any) -> tuple[int, int]:
    """Returns the index of this process and the number of all, or raises ValueError."""
    if not isinstance(process, tuple) or len(process) != 2:
        raise ValueError(f"process must be a pair of an index and the number of processes, got {process!r}")
    _check.integer(number_of_processes=process[1])
    _check.integer(0, process[1] - 1, index_of_process=process[0])
    return process


def _as_json(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns attributes. Raises ValueError for values that JSON cannot hold, and for names that the store uses."""
    given = dict(attributes or {})
    for name in ("shape", "fingerprint"):
        if name in given:
            raise ValueError(f"attributes must not have the name {name!r}, which the store itself uses")
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"attributes must have values that JSON can hold, got {_check.brief(given)}: {error}"
        ) from None
    return given


def packages() -> tuple[Any, Any, Any]:
    """Imports xarray, zarr and fsspec, or raises ImportError that names the extra to install."""
    try:
        import fsspec
        import xarray
        import zarr
    except ImportError as error:
        raise ImportError("a store needs the extra 'sweep': pip install 'gia-jax[sweep]'") from error
    return xarray, zarr, fsspec
