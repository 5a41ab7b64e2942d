"""Runs lanes, such as one attack on each of many victims, on many devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "lanes"
"""Name of the axis of a mesh over which a study spreads its lanes."""


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
    mapped = spread(jax.vmap(fn), mesh, axis, 0)

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


def spread(mapped: Callable[..., Any], mesh: Mesh, axis: str, in_axes: Any) -> Callable[..., Any]:
    """Lets every device along an axis of a mesh compute its own lanes, without communication between the devices.

    Args:
        mapped: Function of the lanes of one device, whose results have a leading axis of lanes.
        mesh: Mesh of the devices.
        axis: Name of the mesh's axis.
        in_axes: Axis of every argument, or tree of arguments: 0 if it has a leading axis of lanes, and None if it is
            replicated on all devices.

    Returns:
        The function of all lanes, to be called inside of `jax.jit`.
    """
    # With `check_vma` a gradient with respect to a replicated argument would be summed over the devices.
    return jax.shard_map(
        mapped, mesh=mesh, in_specs=_specs(in_axes, axis), out_specs=PartitionSpec(axis), check_vma=False
    )


def placed(mesh: Mesh | None, in_axes: Any) -> Any:
    """Returns the shardings of the arguments of a function of lanes.

    Args:
        mesh: Mesh with the axis "lanes", or None for the default device.
        in_axes: Axes of the arguments, as `spread` takes them.

    Returns:
        A sharding for every argument, or None without a mesh.
    """
    if mesh is None:
        return None
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs(in_axes, AXIS))


def on_devices(args: Any, mesh: Mesh | None, in_axes: Any) -> Any:
    """Returns arguments of a function of lanes with every lane on its device.

    Args:
        args: Arguments, or a tree of them.
        mesh: Mesh with the axis "lanes". With None the arguments stay where they are.
        in_axes: Axes of the arguments, as `spread` takes them.
    """
    return args if mesh is None else jax.device_put(args, placed(mesh, in_axes))


def _specs(in_axes: Any, axis: str) -> Any:
    """Returns the partition specifications of arguments: spread over the axis, or replicated."""
    return jax.tree.map(
        lambda place: PartitionSpec() if place is None else PartitionSpec(axis), in_axes, is_leaf=lambda x: x is None
    )


def lane_mesh(mesh: Mesh | None) -> Mesh | None:
    """Returns the mesh over which lanes are spread: the given one, or that of all devices of this process, unless
    `jax.default_device` names a single one.

    Args:
        mesh: Mesh of devices of this process with the axis "lanes", or None.

    Returns:
        The mesh, or None for a single device, which needs none.

    Raises:
        ValueError: If the mesh has no axis "lanes", or devices of another process, or `jax.set_mesh` has set another.
    """
    if mesh is None:
        devices, chosen = jax.local_devices(), jax.config.values["jax_default_device"]
        return None if len(devices) == 1 or chosen is not None else _automatic(np.asarray(devices), (AXIS,))
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}")
    if AXIS not in mesh.shape:
        raise ValueError(f"mesh must have an axis {AXIS!r}, got the axes {tuple(mesh.shape)}")
    strange = [device for device in mesh.devices.flat if device.process_index != jax.process_index()]
    if strange:
        raise ValueError(f"mesh must have devices of this process alone, got {strange[0]}")
    return _automatic(mesh.devices, mesh.axis_names)


def _automatic(devices: np.ndarray, axes: tuple[str, ...]) -> Mesh:
    """Makes a mesh of automatic axes, so that arguments are placed on the way in; refuses where another one is set."""
    mesh, known = Mesh(devices, axes), jax.sharding.get_abstract_mesh()
    if not known.empty and known != mesh.abstract_mesh:
        raise ValueError(
            f"mesh must be given as an argument, and not be set by jax.set_mesh, got {known.axis_names} set"
        )
    return mesh
