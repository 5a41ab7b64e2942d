"""Runs the lanes of a sweep, such as attacks on many victims, on many devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def map_sharded(fn: Callable[..., Any], mesh: Mesh, axis: str) -> Callable[..., Any]:
    """Maps a function over lanes as `jax.vmap(fn)` does, with the lanes spread over the devices of one axis of a mesh.

    Nothing is replicated and nothing is communicated: each device maps its own lanes. Sharding the arrays and letting
    XLA partition the program instead gives wrong kernel gradients on every device but the first.

    Args:
        fn: Function of trees of arrays, such as an attack on one victim.
        mesh: Mesh of the devices. With several hosts, every process calls this alike.
        axis: Name of the mesh's axis over which the lanes are spread.

    Returns:
        The mapped function, to be called inside `jax.jit`. Every leaf of its arguments and results has a leading axis
        of lanes, whose length is a positive multiple of the number of devices along `axis`. It raises ValueError if
        there are no arguments, the devices do not divide the lanes, or the arguments have different numbers of lanes.

    Raises:
        ValueError: If the mesh has no such axis.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import map_sharded
        >>> mesh = jax.make_mesh((1,), ("lanes",))
        >>> norms = jax.jit(map_sharded(jnp.linalg.norm, mesh, "lanes"))(jnp.array([[3.0, 4.0], [6.0, 8.0]]))
        >>> print(norms.tolist())
        [5.0, 10.0]
    """
    if axis not in mesh.shape:
        raise ValueError(f"axis must be one of {tuple(mesh.shape)}, got {axis!r}")
    devices = mesh.shape[axis]
    lanes = PartitionSpec(axis)
    # `jax.make_mesh` makes explicit axes: their arguments are not placed on the way in.
    explicit = dict(zip(mesh.axis_names, mesh.axis_types))[axis] == AxisType.Explicit
    mapped = jax.shard_map(jax.vmap(fn), mesh=mesh, in_specs=lanes, out_specs=lanes, check_vma=False)

    def checked(*args: Any) -> Any:
        shapes = [(jax.tree_util.keystr(path), jnp.shape(leaf)) for path, leaf in jax.tree.leaves_with_path(args)]
        if not shapes:
            raise ValueError("args must have a leaf with lanes, got none")
        for name, shape in shapes:
            if not shape or not shape[0] or shape[0] % devices:
                raise ValueError(
                    f"lanes must be a positive multiple of the {devices} devices, got shape {shape} at args{name}"
                )
            if shape[0] != shapes[0][1][0]:
                raise ValueError(f"lanes must be {shapes[0][1][0]} as at args{shapes[0][0]}, got {shape} at args{name}")
        return mapped(*(jax.reshard(args, NamedSharding(mesh, lanes)) if explicit else args))

    return checked
