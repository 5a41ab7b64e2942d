"""Lanes of a sweep on many devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def map_sharded(fn: Callable[..., Any], mesh: Mesh, axis: str) -> Callable[..., Any]:
    """`jax.vmap(fn)` with its lanes spread over the devices of one axis of a mesh.

    Nothing is replicated and nothing is communicated: each device maps its own lanes. Sharding the arrays and letting
    XLA partition the program instead gives wrong kernel gradients on every device but the first.

    Args:
        fn: A function of arrays, such as an attack on one victim.
        mesh: The devices; with several hosts, every process calls this alike.
        axis: Name of the mesh's axis over which the lanes are spread.

    Returns:
        The mapped function: every leaf of its arguments and results has a leading axis of lanes, a positive
        multiple of the number of devices along `axis`. Call it inside `jax.jit`.

    Raises:
        ValueError: There is no such axis, or (when called) there are no arguments, lanes that the devices do not
            divide, or arguments of different numbers of lanes.
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
