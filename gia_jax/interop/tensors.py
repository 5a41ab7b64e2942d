"""Arrays by name: from the tensors of any library to NumPy, and from names to the tree of a model's parameters."""

import re
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gia_jax import _check

MOST_NAMED = 5  # mismatches that one message names


@runtime_checkable
class TorchTensor(Protocol):
    """What the library uses of a `torch.Tensor`. PyTorch itself is never imported."""

    def detach(self) -> "TorchTensor":
        """Returns the tensor without its history."""
        ...

    def cpu(self) -> "TorchTensor":
        """Returns the tensor in the memory of the host."""
        ...

    def float(self) -> "TorchTensor":
        """Returns the tensor in float32."""
        ...

    def numpy(self) -> np.ndarray:
        """Returns the values."""
        ...


Tensor = np.ndarray | np.generic | jax.Array | TorchTensor
Struct = np.ndarray | np.generic | jax.Array | jax.ShapeDtypeStruct


def as_numpy(name: str, value: object) -> np.ndarray:
    """Returns the values of a tensor of any library in the memory of the host.

    Args:
        name: Name of the tensor, for the error message.
        value: Array of NumPy or JAX, tensor of PyTorch on any device and with or without a history, or numbers.

    Returns:
        The array. bfloat16 stays bfloat16.

    Raises:
        ValueError: If it is no array of numbers.

    Examples:
        >>> from gia_jax.interop.tensors import as_numpy
        >>> as_numpy("bias", [1.0, 2.0]).shape
        (2,)
    """
    try:
        array = _values(value) if isinstance(value, TorchTensor) else np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name} must be an array of numbers, got {type(value).__name__}: {reason}") from None
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise ValueError(f"{name} must be an array of numbers, got {type(value).__name__} of type {array.dtype}")
    return array


def _values(tensor: TorchTensor) -> np.ndarray:
    """Returns the values of a tensor of PyTorch."""
    dense = getattr(tensor, "to_dense", None)
    tensor = dense() if getattr(tensor, "is_sparse", False) and dense is not None else tensor
    tensor = tensor.detach().cpu()
    if str(getattr(tensor, "dtype", "")) == "torch.bfloat16":  # NumPy has no such type of its own
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()


def natural(name: str) -> list[tuple[int, str]]:
    """Returns a key that sorts names as people do, such as conv2 before conv10.

    Args:
        name: Name to be sorted.

    Returns:
        The key.

    Examples:
        >>> from gia_jax.interop.tensors import natural
        >>> sorted(["conv10", "conv2"], key=natural)
        ['conv2', 'conv10']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def joined(path: tuple[jax.tree_util.KeyEntry, ...]) -> str:
    """Returns the name of a leaf: the keys of its path, joined by dots.

    Args:
        path: Path of the leaf, as `jax.tree.leaves_with_path` gives it.

    Returns:
        The name, such as "conv1.kernel".
    """
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named(tree: PyTree, argument: str = "tree") -> dict[str, np.ndarray]:
    """Returns the leaves of a tree by their names.

    Args:
        tree: Tree of arrays or tensors, such as parameters, or a state dict of PyTorch.
        argument: Name of the tree, for error messages.

    Returns:
        The arrays by name, in the order of the tree's leaves. A name is a path's keys joined by dots.

    Raises:
        ValueError: If there is no leaf, a leaf has no name or is no array of numbers, or two leaves have one name.

    Examples:
        >>> import numpy as np
        >>> from gia_jax.interop.tensors import named
        >>> list(named({"conv1": {"kernel": np.zeros(3), "bias": np.zeros(1)}}))
        ['conv1.bias', 'conv1.kernel']
    """
    found: dict[str, np.ndarray] = {}
    for name, leaf in tree.items() if _is_flat(tree) else leaves_by_name(tree):
        if not name:
            raise ValueError(f"{argument} must have a name for every array, got one without")
        if name in found:
            raise ValueError(f"{argument} must have one array for every name, got two for {name!r}")
        found[name] = as_numpy(f"{argument}[{name!r}]", leaf)
    if not found:
        raise ValueError(f"{argument} must hold at least one array, got none")
    return found


def leaves_by_name(tree: PyTree) -> list[tuple[str, object]]:
    """Returns names and leaves of a tree in its order. None is a leaf: a gradient that is missing must not pass.

    Args:
        tree: Tree of anything.

    Returns:
        Pairs of a name and a leaf.
    """
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda node: node is None)
    return [(joined(path), leaf) for path, leaf in leaves]


def _is_flat(tree: PyTree) -> bool:
    """Tells whether a tree is a mapping from names to leaves, whose own order is then kept."""
    if not isinstance(tree, Mapping):
        return False
    return all(isinstance(name, str) and jax.tree.structure(leaf).num_nodes == 1 for name, leaf in tree.items())


def fitted(name: str, array: np.ndarray, like: Struct) -> Array:
    """Returns an array in the type of a leaf that it replaces, whose shape it has.

    Args:
        name: Name of the array, for error messages.
        array: The array.
        like: The leaf, or its shape and type.

    Returns:
        The array in the type of `like`.

    Raises:
        ValueError: If one of the two is of floating-point numbers and the other is not, or a value is not finite, in
            its own type or in that of `like`.

    Examples:
        >>> import jax, numpy as np
        >>> from gia_jax.interop.tensors import fitted
        >>> fitted("bias", np.ones(2, np.float64), jax.ShapeDtypeStruct((2,), np.float32)).dtype
        dtype('float32')
    """
    wanted = jax.dtypes.canonicalize_dtype(like.dtype)
    if jnp.issubdtype(array.dtype, jnp.floating) != jnp.issubdtype(wanted, jnp.floating):
        raise ValueError(f"{name} must be of type {wanted}, got {array.dtype}")
    if not jnp.issubdtype(wanted, jnp.floating):
        return jnp.asarray(array, wanted)
    _check.finite(name, array)
    wide = array.astype(np.promote_types(array.dtype, np.float32))
    largest = np.abs(wide).max(initial=0)
    if largest > float(jnp.finfo(wanted).max):
        raise ValueError(f"{name} must fit into {wanted}, got {largest:.7g}")
    return jnp.asarray(wide.astype(wanted))


def several(argument: str, like_name: str, problems: list[str]) -> ValueError:
    """Returns the error that names what does not fit, in one line.

    Args:
        argument: Name of what was given.
        like_name: Name of what it must fit.
        problems: What does not fit, at least one.

    Returns:
        The error, to be raised.
    """
    rest = len(problems) - MOST_NAMED
    more = f"; and {rest} more" if rest > 0 else ""
    return ValueError(f"{argument} does not fit {like_name}: {'; '.join(problems[:MOST_NAMED])}{more}")


def must_fit(argument: str, given: Mapping[str, Struct], like_name: str, wanted: Mapping[str, Struct]) -> None:
    """Raises ValueError naming every array that is missing, left over or of another shape.

    Args:
        argument: Name of what was given.
        given: Arrays by name.
        like_name: Name of what they must fit.
        wanted: Arrays, or their shapes and types, by name.
    """
    problems = [f"{name!r} of shape {leaf.shape} is missing" for name, leaf in wanted.items() if name not in given]
    problems += [f"{name!r} of shape {leaf.shape} is left over" for name, leaf in given.items() if name not in wanted]
    problems += [
        f"{name!r} has shape {given[name].shape}, expected {leaf.shape}"
        for name, leaf in wanted.items()
        if name in given and given[name].shape != leaf.shape
    ]
    if problems:
        raise several(argument, like_name, problems)


def unflatten(tensors: Mapping[str, Tensor], like: PyTree[Struct] | None = None) -> PyTree[Array]:
    """Puts arrays with the names of a model's own parameters into the tree of these parameters.

    It is the way back from `save_tensors` and `load_tensors`. Arrays with PyTorch's names and layouts take
    `from_torch`.

    Args:
        tensors: Arrays by name, a path's keys joined by dots, such as "conv1.kernel".
        like: Tree of arrays or of their shapes and types, such as the parameters of `models.functional`. None makes
            nested dicts, one for every dot in a name.

    Returns:
        A tree of the structure, shapes and types of `like`, or nested dicts of the arrays in their own types.

    Raises:
        ValueError: If arrays are missing, are too many, are not finite, or have another shape or kind of number. The
            message names each of them. Without `like`, if a name is that of an array and of a dict.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from gia_jax import interop
        >>> like = {"head": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
        >>> tree = interop.unflatten({"head.kernel": np.ones((2, 3)), "head.bias": np.ones(3)}, like)
        >>> tree["head"]["kernel"].shape, tree["head"]["bias"].dtype
        ((2, 3), dtype('float32'))
        >>> interop.unflatten({"fc.0.weight": np.ones(2), "scale": np.ones(())})["fc"]["0"]["weight"].shape
        (2,)
    """
    arrays = named(dict(tensors), "tensors")
    if like is None:
        return _nested(arrays)
    wanted = {joined(path): leaf for path, leaf in jax.tree.leaves_with_path(like)}
    must_fit("tensors", arrays, "like", wanted)
    leaves = [fitted(f"tensors[{name!r}]", arrays[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _nested(arrays: Mapping[str, np.ndarray]) -> dict[str, PyTree[Array]]:
    """Returns nested dicts of the arrays, or raises ValueError where a name is that of an array and of a dict."""
    tree: dict[str, PyTree[Array]] = {}
    for name, array in arrays.items():
        *outer, own = name.split(".")
        node = tree
        for key in outer:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or own in node:
            raise ValueError(f"tensors must have names of an array or of a group of them, got both beside {name!r}")
        node[own] = jnp.asarray(array)
    return tree
