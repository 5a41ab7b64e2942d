"""Where the parts of a store lie, and how they are opened: a shard of every process, and the scores."""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

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
