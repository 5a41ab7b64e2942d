"""Checks of arguments. Values are checked where they are known, which they are not inside of a trace; shapes always."""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

GRAPH_PARTS = ("nodes", "adjacency", "mask")


def brief(value: Any) -> str:
    """Returns the beginning of what is printed for a value, on one line, for an error message."""
    return " ".join(repr(value).split())[:60]


def is_concrete(tree: PyTree) -> bool:
    """Tells whether the values of all leaves are known, because none of them is being traced."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def outside_of_jit(what: str, tree: PyTree) -> None:
    """Raises ValueError where a leaf is traced, or new arrays would be, for what compiles and runs programs itself."""
    if not is_concrete(tree) or not is_concrete(jnp.zeros(())):
        raise ValueError(f"{what} must be called outside of jax.jit and the like, for it compiles its own programs")


def is_zero(number: ArrayLike) -> bool:
    """Tells whether a number is known to be 0. The value of a traced number is not known."""
    return is_concrete(number) and not np.any(number)


def finite(name: str, tree: PyTree[ArrayLike]) -> None:
    """Raises ValueError where a concrete leaf of `tree` holds a NaN or an infinity."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if is_concrete(leaf) and _is_inexact(leaf) and not np.isfinite(np.asarray(leaf)).all():
            bad = np.asarray(leaf)[~np.isfinite(np.asarray(leaf))].flat[0]
            raise ValueError(f"{name} must be finite, got {bad} at {name}{jax.tree_util.keystr(path)}")


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype if hasattr(leaf, "dtype") else type(leaf), jnp.inexact)


def arrays(name: str, tree: PyTree[Any], hint: str = "") -> None:
    """Raises ValueError for a tree without leaves, or naming a leaf that is no array of JAX or NumPy and no number."""
    leaves = jax.tree.leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"{name} must hold at least one array, got {tree!r}")
    for path, leaf in leaves:
        known = isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int)
        if not known or (isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "OSU"):
            where, kind = name + jax.tree_util.keystr(path), type(leaf).__name__
            raise ValueError(f"{where} must be an array of numbers, of JAX or NumPy, got {kind} {brief(leaf)}{hint}")


def same_structure(name: str, tree: PyTree, like_name: str, like: PyTree) -> None:
    """Raises ValueError naming the first place where the structure or a shape of `tree` differs from that of `like`."""
    got = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
    want = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(like)}
    for key in want:
        if key not in got:
            raise ValueError(f"{name} does not fit {like_name}: {name}{key} is missing")
    for key in got:
        if key not in want:
            raise ValueError(f"{name} does not fit {like_name}: {name}{key} is one too many")
    for key, shape in want.items():
        if got[key] != shape:
            raise ValueError(f"{name} does not fit {like_name}: {name}{key} has shape {got[key]}, expected {shape}")


def _bounded(values: dict[str, Any], holds: Callable[[np.ndarray], np.ndarray], requirement: str) -> None:
    for name, tree in values.items():
        for leaf in jax.tree.leaves(tree):
            if not is_concrete(leaf):
                continue
            numbers = np.asarray(leaf)
            if numbers.dtype.kind in "OSUc":  # objects, strings and complex numbers have no order
                raise ValueError(f"{name} must be a number, got {leaf!r}")
            if not np.all(holds(numbers)):
                raise ValueError(f"{name} must {requirement}, got {numbers[~holds(numbers)].flat[0]}")


def positive(**values: Any) -> None:
    """Raises ValueError naming a number, or a leaf of a tree, that is known not to be above zero. None passes."""
    _bounded(values, lambda value: value > 0, "be positive")


def not_negative(**values: Any) -> None:
    """Raises ValueError naming a number, or a leaf of a tree, that is known to be below zero. None passes."""
    _bounded(values, lambda value: value >= 0, "not be negative")


def scalar(**values: Any) -> None:
    """Raises ValueError naming a value that is None or an array with an axis, in place of a single number."""
    for name, value in values.items():
        if value is None:
            raise ValueError(f"{name} must be a single number, got None")
        shape = value.shape if hasattr(value, "shape") else np.shape(value)
        if shape != ():
            raise ValueError(f"{name} must be a single number, got shape {shape}")


def sizes(name: str, shape: Any) -> tuple[int, ...]:
    """Returns a shape as a tuple, or raises ValueError where it is no sequence of positive integers."""
    if isinstance(shape, str) or not isinstance(shape, Sequence | np.ndarray):
        raise ValueError(f"{name} must be a sequence of integers of at least 1, got {shape!r}")
    for size in shape:
        integer(**{name: size})
    return tuple(shape)


def floating(dtype: Any) -> None:
    """Raises ValueError for what is no floating-point type."""
    try:
        is_floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    except TypeError:  # no type has this name
        is_floating = False
    if not is_floating:
        raise ValueError(f"dtype must be a floating-point type, got {dtype!r}")


def weight(**values: Any) -> None:
    """Raises ValueError naming a weight that is not one finite number of at least 0."""
    scalar(**values)
    not_negative(**values)
    for name, value in values.items():
        finite(name, value)


def share(**values: Any) -> None:
    """Raises ValueError naming a value that is not one number in [0, 1]."""
    scalar(**values)
    _bounded(values, lambda value: (value >= 0) & (value <= 1), "be in [0, 1]")


def limits(name: str, values: Any) -> None:
    """Raises ValueError for what is no pair of a lowest and a highest value, each a number or an array of them."""
    if not isinstance(values, tuple | list) or len(values) != 2:
        raise ValueError(f"{name} must be a pair, of the lowest and the highest value, got {brief(values)}")
    for i, value in enumerate(values):
        arrays(f"{name}[{i}]", value if jax.tree.leaves(value) else (value,))


def functions(**values: Any) -> None:
    """Raises ValueError naming a value that cannot be called. None passes."""
    for name, value in values.items():
        if value is not None and not callable(value):
            raise ValueError(f"{name} must be a function, got {brief(value)}")


def is_key(leaf: Any) -> bool:
    """Tells whether an array holds typed random keys, as `jax.random.key` makes them."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def different(**keys: Any) -> None:
    """Raises ValueError naming two random keys that are known to be equal, because they would draw the same numbers."""
    known = {name: key for name, key in keys.items() if key is not None and is_concrete(key)}
    data = {name: np.asarray(jax.random.key_data(key) if is_key(key) else key) for name, key in known.items()}
    for (name, one), (other, two) in itertools.combinations(data.items(), 2):
        if np.array_equal(one, two):
            raise ValueError(f"{other} must be another key than {name}, got {two.tolist()} for both")


def integer(low: int = 1, high: int | None = None, **values: Any) -> None:
    """Raises ValueError naming a value that is not an integer in [low, high]. None as `high` sets no upper limit."""
    for name, value in values.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):
            limits = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{name} must be an integer {limits}, got {value!r}")


def fits(num_entries: int, **values: Any) -> None:
    """Raises ValueError naming the value that asks for an array of more float32 entries than memory can hold.

    It is called before the array is made, because an allocation that fails ends the process, or takes minutes to fail.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * num_entries > memory:
        ((name, value),) = values.items()
        needed, there = (f"{number / 2**30:,.0f} GiB" for number in (4 * num_entries, memory))
        raise ValueError(f"{name} must fit into memory: it needs {needed} of {there}, got {value!r}")


def captions(given: Mapping[str, Sequence[str]] | None, columns: Mapping[str, Any], count: int, examples: str) -> None:
    """Raises ValueError for captions that are not one line for each of `count` examples, say images, of a column."""
    for heading, lines in (given or {}).items():
        if heading not in columns or len(lines) != count:
            place = f"captions[{heading!r}] must be a line for each of the {count} {examples} of a column"
            raise ValueError(f"{place}, got {len(lines)} and the columns {list(columns)}")


def examples(inputs: PyTree[Any], *, name: str = "batch.inputs", hint: str = "") -> int:
    """Returns the number of examples of a batch's inputs, one array or a tree of them.

    Raises ValueError where it is empty, an array has no axis of examples, or two arrays have different numbers of them.
    """
    leaves = jax.tree.leaves_with_path(inputs)
    if not leaves:
        raise ValueError(f"{name} must hold at least one array, got {inputs!r}")
    _no_numbers(name, inputs)
    first, size = name + jax.tree_util.keystr(leaves[0][0]), (*jnp.shape(leaves[0][1]), 0)[0]
    for path, leaf in leaves:
        where, shape = name + jax.tree_util.keystr(path), jnp.shape(leaf)
        # One array without another axis is an example that lacks the axis of the batch; in a tree it is one field.
        if len(shape) < (1 if path else 2) or shape[0] == 0:
            raise ValueError(f"{where} must have shape (b, *d) with b > 0, got {shape}{hint}")
        if shape[0] != size:
            raise ValueError(f"{where} must have a first axis of {size} examples, as {first} has, got {shape}")
    return size


def one_array(name: str, inputs: PyTree[Any], where: str = "here") -> None:
    """Raises ValueError for inputs that are a tree where only one array is taken."""
    _no_numbers(name, inputs)
    if not isinstance(inputs, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        raise ValueError(f"{name} must be one array of shape (b, *d) {where}, got a {type(inputs).__name__}")


def _no_numbers(name: str, tree: PyTree[Any]) -> None:
    """Raises ValueError for a list or tuple of numbers, which a tree takes for as many arrays without an axis."""
    if isinstance(tree, list | tuple) and any(jnp.shape(leaf) == () for leaf in jax.tree.leaves(tree)):
        kind = type(tree).__name__
        raise ValueError(f"{name} must be an array, got a {kind} of {len(tree)}: jnp.asarray makes one of it")


def graphs(name: str, inputs: Any) -> None:
    """Raises ValueError unless `inputs` is a mapping with exactly the three parts of graphs."""
    if not isinstance(inputs, Mapping) or set(inputs) != set(GRAPH_PARTS):
        got = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ValueError(f"{name} must be a dict of 'nodes', 'adjacency' and 'mask', got {got}")


def batch(inputs: PyTree[Any], labels: PyTree[Any], num_classes: int | None = None) -> None:
    """Raises ValueError for an empty batch, non-finite inputs or labels, or labels that are not of its examples.

    Labels must be classes where `num_classes` is given, and may be targets of any kind otherwise.
    """
    size = examples(inputs)
    _no_numbers("batch.labels", labels)
    for path, leaf in jax.tree.leaves_with_path(labels):
        if jnp.shape(leaf)[:1] != (size,):
            where = f"batch.labels{jax.tree_util.keystr(path)}"
            raise ValueError(
                f"batch.labels must have a first axis of {size} examples, got {jnp.shape(leaf)} at {where}"
            )
    finite("batch.inputs", inputs)
    finite("batch.labels", labels)
    if num_classes is not None:
        integer(num_classes=num_classes)
        if not isinstance(labels, jax.Array | np.ndarray):
            raise ValueError(f"batch.labels must be one array where num_classes is given, got {type(labels).__name__}")
        are_indices = labels.ndim == 1 or jnp.issubdtype(labels.dtype, jnp.integer)
        classes(labels, labels.shape if are_indices else labels.shape[:-1], num_classes)


def classes(labels: Array | np.ndarray, shape: tuple[int, ...], num_classes: int | None = None) -> None:
    """Raises ValueError for labels of a batch that are neither class indices of that shape nor rows of probabilities.

    A row may add up to less than 1, such as where public images are mixed in, and to no more than 1 with the rounding
    errors of bfloat16.
    """
    rows = f"({', '.join(map(str, (*shape, 'c' if num_classes is None else num_classes)))})"
    if jnp.shape(labels)[: len(shape)] != shape or jnp.ndim(labels) > len(shape) + 1:
        raise ValueError(f"batch.labels must have shape {shape} or {rows}, got {jnp.shape(labels)}")
    if jnp.ndim(labels) > len(shape):
        if not jnp.issubdtype(labels.dtype, jnp.floating):
            raise ValueError(f"batch.labels of shape {labels.shape} must be probabilities, got {labels.dtype}")
        finite("batch.labels", labels)
        not_negative(**{"batch.labels": labels})
        if num_classes is not None and labels.shape[-1] != num_classes:
            raise ValueError(f"batch.labels must have {num_classes} columns, got {labels.shape[-1]}")
        if is_concrete(labels) and (total := np.asarray(labels, np.float64).sum(-1).max(initial=0)) > 1.02:
            raise ValueError(f"batch.labels must add up to at most 1 in each row, got {total:.7g}")
        return
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"batch.labels of shape {labels.shape} must be integers, got {labels.dtype}")
    if is_concrete(labels) and labels.size:
        indices = np.asarray(labels)  # NumPy also where a trace goes on around concrete labels
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or (num_classes is not None and high >= num_classes):
            bound = "" if num_classes is None else f" and below {num_classes}"
            raise ValueError(f"batch.labels must be at least 0{bound}, got {low if low < 0 else high}")
