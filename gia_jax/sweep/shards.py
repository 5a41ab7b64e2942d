"""Where the parts of a store lie, and how they are opened: a shard of every process, and the scores."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gia_jax._environment import hardware, versions
from gia_jax._files import claimed
from gia_jax.sweep.engine import Finished, Ran
from gia_jax.sweep.study import Plan

SCORES = "scores"  # name of the group of scores in a store


def place(store: str | Path) -> str:
    """Returns the path or address of a store in one form; raises ValueError for what is none."""
    if not isinstance(store, str | Path) or not str(store):
        raise ValueError(f"store must be the path of a folder or an address, got {store!r}")
    kind, mark, rest = str(store).partition("://")
    if mark and kind not in ("file", "local"):
        return f"{kind}://{rest.rstrip('/')}"
    path = Path(rest if mark else str(store)).expanduser()
    there = next((part for part in (path, *path.parents) if part.exists()), None)
    if there is not None and not there.is_dir():
        raise ValueError(f"store must be a folder, got the file {str(there)!r}")
    return str(path)


def inside(store: str, name: str) -> str:
    """Returns the path or address of a part of a store."""
    return f"{store}{name}" if store.endswith("/") else f"{store}/{name}"


def open_group(path: str, mode: str) -> Any:
    """Opens a zarr group at a path or address."""
    _, zarr, _ = packages()
    return zarr.open_group(path if "://" in path else Path(path), mode=mode)


@contextlib.contextmanager
def whole(path: str) -> Generator[None]:
    """Says which part of a store it is that cannot be read."""
    try:
        yield
    except FileNotFoundError:  # zarr's are ValueErrors too
        raise
    except (ValueError, LookupError, AttributeError, TypeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise ValueError(
            f"store must be whole, got {path!r}, which is broken; without it, a sweep computes it again ({reason})"
        ) from error


def shards_of(store: str) -> dict[str, Any]:
    """Returns the zarr groups of the shards of a store by their paths or addresses, in their order.

    One that was being made when its process was killed, or is being made, is no shard yet.
    """
    if "://" in store:
        system, root = packages()[2].core.url_to_fs(store)
        system.invalidate_cache()  # zarr writes by another connection
        entries = system.ls(root, detail=False) if system.exists(root) else []
        names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries]
    else:
        names = [path.name for path in Path(store).iterdir()] if Path(store).is_dir() else []
    names = [name for name in names if name.startswith("shard-") and name[len("shard-") :].isdigit()]
    shards = {}
    for path in (inside(store, name) for name in sorted(names, key=lambda name: int(name[len("shard-") :]))):
        with contextlib.suppress(FileNotFoundError), whole(path):
            group = open_group(path, "r")
            if "fingerprint" in group.attrs:
                shards[path] = group
    return shards


def packages() -> tuple[Any, Any, Any]:
    """Imports xarray, zarr and fsspec, or raises ImportError that names the extra to install."""
    try:
        import fsspec
        import xarray
        import zarr
    except ImportError as error:
        raise ImportError("a store needs the extra 'sweep': pip install 'gia-jax[sweep]'") from error
    return xarray, zarr, fsspec


class Shard:
    """The zarr group that one process writes, with a row for every lane. The process fills the rows of its own lanes.

    Rows that are not filled take no space on disk.
    """

    def __init__(self, store: str, index: int, planned: Plan, attributes: dict[str, Any]) -> None:
        self._store, self._path, self._index, self._planned = store, inside(store, f"shard-{index}"), index, planned
        self._attributes, self._group = attributes, None
        self._claim: int | None = None
        self._settings = by_name("settings", planned.lanes.settings)

    def __enter__(self) -> "Shard":
        return self

    def __exit__(self, *error: object) -> None:
        if self._claim is not None:
            os.close(self._claim)

    def open(self, fingerprint: str, found: Finished) -> None:
        """Opens the group, or makes it."""
        named = _named(found)
        self._see(fingerprint)
        if "://" not in self._path:
            Path(self._path).mkdir(parents=True, exist_ok=True)
            try:
                self._claim = claimed(Path(self._path))
            except BlockingIOError:
                message = "process must be of another index than those that are running, and another one is running"
                raise ValueError(f"{message} with index {self._index} on {self._store!r}") from None
            for part in Path(self._path).rglob("*.partial"):
                part.unlink(missing_ok=True)  # of a process that was killed while it wrote
        self._see(fingerprint)  # another process may have written until this one had the shard for itself
        with whole(self._path):
            group = open_group(self._path, "a")
            if "fingerprint" not in group.attrs:
                self._make(group, named)
                layout = {"shape": self._planned.shape, "arrays": list(named), "settings": list(self._settings)}
                own = {"versions": versions(), "hardware": hardware(), "layout": layout, "fingerprint": fingerprint}
                group.attrs.update({**self._attributes, **own})  # last: a group without a fingerprint is made anew
        self._group = group

    def _see(self, fingerprint: str) -> None:
        """Notes what is done in all shards; raises ValueError where one is of another sweep."""
        self._done = np.zeros(int(np.prod(self._planned.shape)), bool)
        for path, group in shards_of(self._store).items():
            if group.attrs["fingerprint"] != fingerprint:
                raise ValueError(
                    f"store must be new or hold the same sweep, got {self._store!r}, which was written with other "
                    "settings, data, devices or versions, or another number of lanes side by side"
                )
            with whole(path):
                self._done |= np.asarray(group["done"][:])

    def _make(self, group: Any, named: dict[str, tuple[tuple[str, ...], Any]]) -> None:
        """Makes the arrays of all lanes, and those of the settings."""
        total = int(np.prod(self._planned.shape))
        _, zarr, _ = packages()
        for name, (dimensions, leaf) in named.items():
            group.create_array(
                name,
                shape=(total, *leaf.shape[1:]),
                chunks=leaf.shape,
                dtype=leaf.dtype,
                fill_value=np.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else np.zeros((), leaf.dtype).item(),
                compressors=zarr.codecs.ZstdCodec(checksum=True),
                dimension_names=dimensions,
                overwrite=True,
            )
        settings = group.require_group("settings")
        for name, leaf in self._settings.items():
            settings.create_array(name, data=_storable(leaf), overwrite=True)

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
        _, victims, restarts = self._planned.shape
        of_lanes = self._planned.finite[np.arange(first, first + len(found.losses)) // restarts % victims]
        kept = found.reconstruction._replace(is_finite=found.reconstruction.is_finite & of_lanes)
        for name, (_, leaf) in _named(found._replace(reconstruction=kept)).items():
            self._group[name][first : first + len(leaf)] = leaf


def _named(found: Finished) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Returns the arrays of what was found by their names, each with the names of its dimensions, "done" last."""
    reconstruction, losses = found
    done: Any = jax.ShapeDtypeStruct(losses.shape[:1], bool)
    if isinstance(losses, np.ndarray):
        done = np.ones(done.shape, bool)
    named: dict[str, tuple[tuple[str, ...], Any]] = {
        "loss": (("lane",), reconstruction.loss),
        "is_finite": (("lane",), reconstruction.is_finite),
        "losses": (("lane", "step"), losses),
    }
    for name, leaf in by_name("observations.extra['inputs_like']", reconstruction.batch._asdict()).items():
        named[name] = (("lane", "example", *(f"{name}_{axis}" for axis in range(2, len(leaf.shape)))), leaf)
    for name, leaf in by_name("observations.extra['inputs_like']", {"path": reconstruction.path}).items():
        named[name] = (("lane", "point", "example", *(f"{name}_{axis}" for axis in range(3, len(leaf.shape)))), leaf)
    named["done"] = (("lane",), done)
    return {name: (dimensions, _storable(leaf)) for name, (dimensions, leaf) in named.items()}


def by_name(what: str, tree: PyTree[Any]) -> dict[str, Any]:
    """Returns the leaves of a tree by their names in a store; raises ValueError for names that it cannot hold."""
    named = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "setting_value"
        if name in named:
            raise ValueError(f"{what} must have names that differ in a store, got {name!r} twice")
        if "/" in name or "\\" in name or name.startswith("__") or name.strip(".") == "" or name == "zarr.json":
            raise ValueError(f"{what} must have names that a store can hold, without a slash, got {name!r}")
        named[name] = leaf
    return named


def _storable(leaf: Any) -> Any:
    """Returns an array, or its shape, in a type that zarr knows: types such as bfloat16 become float32."""
    if np.dtype(leaf.dtype).kind != "V":
        return leaf
    return leaf.astype(np.float32) if isinstance(leaf, np.ndarray) else jax.ShapeDtypeStruct(leaf.shape, np.float32)
