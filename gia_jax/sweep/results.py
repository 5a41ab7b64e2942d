"""Results of a sweep on disk, as labelled arrays that any number of processes write and that can be read meanwhile.

A store is a folder, or any address that fsspec knows. Every process writes one zarr group of its own to the store,
`shard-0`, `shard-1` and so on. The processes do not communicate, and if one dies the others go on.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import Attack, Observation
from gia_jax.matching.run import planned_steps
from gia_jax.sweep.engine import run_lanes
from gia_jax.sweep.grid import checked_settings
from gia_jax.sweep.progress import ProgressFn
from gia_jax.sweep.shards import SCORES, Shard, inside, open_group, packages, place, shards_of, whole
from gia_jax.sweep.store import forget
from gia_jax.sweep.study import plan

if TYPE_CHECKING:
    import xarray

LANE = ("setting", "victim", "restart")
# What a shard says of itself.
OWN_ATTRIBUTES = ("layout", "fingerprint", "versions", "hardware", "compile_seconds", "run_seconds")


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
        ValueError: If the store holds another sweep or is broken, `process` is no pair of an index and a larger number,
            another process of that index is running, the attributes have values that JSON cannot hold, two settings
            have one name in the store or a name that it cannot hold, the attack calls back to Python, or in the cases
            in which `sweep` raises it.
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
    store = place(store)
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
    shard = Shard(store, process[0], planned, _as_json(attributes))
    states = None if "://" in store else Path(store) / "states"
    with shard:
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
        * "path.inputs" and "path.labels" (setting, victim, restart, point, example, ...) of attacks that
          `gia_jax.keep_path` wraps: what they would have returned after fewer steps;
        * every score that `score_sweep` wrote (setting, victim, example), such as "psnr";
        * every array of the settings, as a coordinate of the dimension setting.

        Its attributes are those that were given, "fingerprint", "versions", "hardware", and the seconds of all
        processes together, "compile_seconds" and "run_seconds". It is an `xarray.Dataset`, so that `to_zarr` writes it
        as a single group, and `to_netcdf` as a single file once attributes that are dicts, such as "versions", are
        dropped.

    Raises:
        ValueError: If there is no such store, its shards are of different sweeps, or one of its files is broken.
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
    found = lanes_of(store)
    scores = _scores(place(store), int(found.done.sum()))
    taken = {*found.variables, *found.dims}
    return found.assign({f"{SCORES}.{name}" if name in taken else name: own for name, own in scores.items()})


def lanes_of(store: str | Path) -> "xarray.Dataset":
    """Reads what a store holds as `open_sweep` does, but for the scores."""
    xarray = packages()[0]
    store, found, shape, settings = place(store), {}, (), {}
    shards = shards_of(store)
    if not shards:
        raise ValueError(f"store must be one that a sweep has written to, got {store!r}")
    attributes = [dict(group.attrs) for group in shards.values()]
    for other in attributes[1:]:
        if other["fingerprint"] != attributes[0]["fingerprint"]:
            raise ValueError(f"store must be of one sweep, got {store!r} with shards of different ones")
    for path, group in shards.items():
        with whole(path):
            layout, mine = group.attrs["layout"], np.asarray(group["done"][:])
            for name in layout["arrays"]:
                array = group[name]
                if name not in found:
                    empty = np.full(array.shape, array.fill_value, array.dtype)
                    found[name] = ((*LANE, *array.metadata.dimension_names[1:]), empty)
                found[name][1][mine] = np.asarray(array[:])[mine]
            settings = {name: np.asarray(group["settings"][name][:]) for name in layout["settings"]}
            shape = layout["shape"]
    found = {name: (axes, joined.reshape(*shape, *joined.shape[1:])) for name, (axes, joined) in found.items()}
    taken, coords = {*found, *(axis for axes, _ in found.values() for axis in axes)}, {}
    for name, leaf in settings.items():
        while name in taken or name in coords:
            name = f"settings.{name}"
        coords[name] = (("setting", *(f"{name}_{axis}" for axis in range(1, leaf.ndim))), leaf)
    return xarray.Dataset(found, coords=coords, attrs=_joined(attributes))


def _joined(attributes: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins the attributes of all shards, with the sums of their seconds."""
    seconds = {name: sum(one.get(name, 0.0) for one in attributes) for name in ("compile_seconds", "run_seconds")}
    return {**{name: value for name, value in attributes[0].items() if name != "layout"}, **seconds}


def _scores(store: str, num_done: int) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Returns the scores in a store by their names, with their dimensions; none where it has none of what is done."""
    with whole(inside(store, SCORES)):
        try:
            group = open_group(inside(store, SCORES), "r")
        except FileNotFoundError:
            return {}
        if "shown" not in group.attrs:
            return {}
        if group.attrs["num_done"] != num_done:
            of_lanes = f"they are of {group.attrs['num_done']} lanes, and {num_done} have been run"
            warnings.warn(f"the scores in {store!r} are left out, for {of_lanes}: score it again", stacklevel=3)
            return {}
        return {name: (array.metadata.dimension_names, np.asarray(array[:])) for name, array in group.arrays()}


def _checked(process: Any) -> tuple[int, int]:
    """Returns the index of this process and the number of all, or raises ValueError."""
    if not isinstance(process, tuple) or len(process) != 2:
        raise ValueError(f"process must be a pair of an index and the number of processes, got {process!r}")
    _check.integer(number_of_processes=process[1])
    _check.integer(0, process[1] - 1, index_of_process=process[0])
    return process


def _as_json(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns attributes; raises ValueError where a file of JSON cannot hold them, or they have a name of the store."""
    if not isinstance(attributes, Mapping | None):
        raise ValueError(f"attributes must be a mapping, got {_check.brief(attributes)}")
    given = dict(attributes or {})
    for name in given:
        if not isinstance(name, str) or name in OWN_ATTRIBUTES:
            why = "which the store uses itself" if isinstance(name, str) else "which is no string"
            raise ValueError(f"attributes must not have the name {name!r}, {why}")
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"attributes must have values that JSON can hold, got {_check.brief(given)}: {error}"
        ) from None
    return given
