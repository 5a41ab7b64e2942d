"""Files of recorded updates, and the models that they are of: the library's by name, or a function of the user's."""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

from gia_jax import interop, labels, models
from gia_jax.base import Params, Updates
from gia_jax.cli.names import FIRST_LAYER
from gia_jax.interop.tensors import leaves_by_name, natural
from gia_jax.labels import ClassifierFn, Dense
from gia_jax.models.functional import ApplyFn, has_batch_norm

Tensors = Mapping[str, np.ndarray]


class Model(NamedTuple):
    """A model, its parameters and an update of them.

    Attributes:
        apply_fn: Model `(params, inputs) -> logits`.
        params: Parameters that the server sent.
        update: Update of the client, a tree like the parameters.
        classifier_fn: Function that picks the last layer.
        first_layer_fn: Function that picks a dense layer that sees the example. None where there is none.
        module: Module of the model. None for a function of the user's.
        has_statistics: Whether the file of the parameters holds running statistics.
        notes: Lines for whoever reads the results.
    """

    apply_fn: ApplyFn
    params: Params
    update: Updates
    classifier_fn: ClassifierFn
    first_layer_fn: ClassifierFn | None = None
    module: nnx.Module | None = None
    has_statistics: bool = False
    notes: tuple[str, ...] = ()


def registered_model(args: argparse.Namespace) -> Model:
    """Reads the files of a model that the library has by name, in its own layout or in PyTorch's.

    Args:
        args: Options of the command line, checked.

    Returns:
        The model in evaluation or training mode, as `--batch-norm` says.

    Raises:
        ValueError: If a file cannot be read or does not fit the model, or running statistics are missing.
    """
    sent, returned = interop.load_tensors(args.params), interop.load_tensors(args.update)
    module = _module(args, sent)
    params_like, every = _like(module, nnx.Param), _like(module, nnx.Any(nnx.Param, nnx.BatchStat))
    has_statistics = has_batch_norm(module) and _has_statistics(sent, every, params_like)
    if has_batch_norm(module) and not has_statistics and args.batch_norm == "evaluation":
        raise ValueError(
            f"--params must hold the running statistics of {args.model}'s batch normalisation, got none in "
            f"'{args.params}'; --batch-norm training is for a client that normalised by its own batch"
        )
    flatten = _flatten(args)
    filled = _brought("--params", args.params, sent, every if has_statistics else params_like, flatten)
    module = _filled(module, filled)
    apply_fn, params = models.functional(module, batch_norm=args.batch_norm)
    update = _brought("--update", args.update, returned, params_like, flatten)
    first = FIRST_LAYER.get(args.model)
    first_layer_fn = None if first is None else labels.dense(first)
    return Model(apply_fn, params, update, labels.dense("head"), first_layer_fn, module, has_statistics)


def _shapes(args: argparse.Namespace, num_classes: int) -> nnx.Module:
    """Returns the module with shapes in place of weights."""
    try:
        return nnx.eval_shape(lambda: models.MODELS[args.model](args.input_shape, num_classes, rngs=nnx.Rngs(0)))
    except Exception as error:  # whatever a model makes of a shape that is not its own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--input-shape must be one that {args.model} takes, got {args.input_shape}: {reason}"
        ) from None


def _module(args: argparse.Namespace, sent: Tensors) -> nnx.Module:
    """Returns the module whose last layer has as many classes as the file says, with shapes in place of weights."""
    if args.classes is not None:
        return _shapes(args, args.classes)
    own = [sent[name].shape[-1] for name in ("head.bias", "head.kernel") if name in sent and sent[name].ndim]
    # PyTorch's dense layers have the outputs first, and the last layer has the classes.
    others = [array.shape[0] for array in reversed(list(sent.values())) if array.ndim == 2]
    candidates = own[:1] or [size for size in dict.fromkeys(others) if size > 0]
    fitting = []
    for size in candidates:
        module = _shapes(args, size)
        try:
            _brought("--params", args.params, sent, _like(module, nnx.Param), _flatten(args))
        except ValueError:
            continue
        fitting.append(module)
    if len(fitting) == 1:
        return fitting[0]
    if candidates and not fitting:
        return _shapes(args, candidates[0])  # what does not fit is said of the most likely one
    raise ValueError(f"--classes must be given, as the last layer in '{args.params}' does not tell it, got none")


def _like(module: nnx.Module, kind: Any) -> PyTree[jax.ShapeDtypeStruct]:
    """Returns the shapes of a module's variables of a kind, in the precision of the run."""
    shapes = nnx.to_pure_dict(nnx.state(module, kind))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.result_type(float)), shapes)


def _flatten(args: argparse.Namespace) -> Any:
    """Returns what PyTorch flattens right before a dense layer that sees the image, which no file tells."""
    first, shape = FIRST_LAYER.get(args.model), args.input_shape
    return "auto" if first is None or len(shape) < 2 else {first: (shape[-1], *shape[:-1])}


def _has_statistics(sent: Tensors, every: PyTree, params_like: PyTree) -> bool:
    """Tells whether a file holds running statistics, by PyTorch's names or by the module's own."""
    own = _names(every) - _names(params_like)
    return own <= set(sent) or any(name.endswith("running_mean") for name in sent)


def _names(tree: PyTree) -> set[str]:
    """Returns the names that `interop.save_tensors` gives the leaves."""
    return {name for name, _ in leaves_by_name(tree)}


def _brought(option: str, file: str, tensors: Tensors, like: PyTree, flatten: Any) -> PyTree[Array]:
    """Returns the tensors of a file in the tree of the model's own, by its own names, by PyTorch's, or by order."""
    names = _names(like)
    try:
        if names <= set(tensors):
            own = {name: array for name, array in tensors.items() if name in names or not _is_statistic(name)}
            return interop.unflatten(own, like)
        if all(re.fullmatch(r"arr_\d+", name) for name in tensors):  # what `np.savez` calls a list of arrays
            return interop.from_torch([tensors[name] for name in sorted(tensors, key=natural)], like, flatten=flatten)
        return interop.from_torch(tensors, like, flatten=flatten)
    except ValueError as error:
        raise ValueError(f"{option} {file}: {error}") from None


def _is_statistic(name: str) -> bool:
    """Tells whether a leaf of this name is a running statistic of a module of the library."""
    return name.rpartition(".")[2] in ("mean", "var")


def _filled(module: nnx.Module, values: PyTree[Array]) -> nnx.Module:
    """Returns the module with these weights, and with new running statistics where none are among them."""
    state = nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))
    new = {"mean": np.zeros, "var": np.ones}

    def leaf_of(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> Any:
        node: Any = values
        for key in path:
            node = node.get(key.key) if isinstance(node, Mapping) else None
        return jnp.asarray(new[path[-1].key](like.shape), like.dtype) if node is None else node

    made = jax.tree.map_with_path(leaf_of, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, made)
    nnx.update(module, state)
    return module


def function_model(args: argparse.Namespace) -> Model:
    """Reads the files of a model that is a function of the user's, with the names and layouts that they have.

    Args:
        args: Options of the command line, checked.

    Returns:
        The model. Tensors of `--params` of which `--update` has none, such as running statistics or frozen layers, are
        no parameters: the function gets them as they are.

    Raises:
        ValueError: If a file cannot be read, the two do not fit, or there is no such function.
    """
    function = _imported(args.model)
    sent, returned = interop.load_tensors(args.params), interop.load_tensors(args.update)
    floating = {name: array for name, array in returned.items() if jnp.issubdtype(array.dtype, np.floating)}
    unknown = [name for name in floating if name not in sent]
    if unknown or not floating:
        lacking = f"{unknown[0]!r}, which --params has not" if unknown else "none of a floating type"
        raise ValueError(f"--update {args.update} must hold tensors of --params, got {lacking}")
    held = {name: array for name, array in sent.items() if name not in floating}
    try:
        params = interop.unflatten({name: sent[name] for name in floating})
        update, fixed, _ = interop.unflatten(floating), interop.unflatten(held) if held else {}, interop.unflatten(sent)
    except ValueError as error:
        raise ValueError(f"--params {args.params}: {error}") from None

    def apply_fn(params: Params, inputs: Array) -> Any:
        return function(_merged(params, fixed), inputs)

    names = ", ".join(list(held)[:5]) + (f" and {len(held) - 5} more" if len(held) > 5 else "")
    notes = (f"held as they are, because --update has none of them: {names}",) if held else ()
    return Model(apply_fn, params, update, _head(args.head), notes=notes)


def _merged(one: Any, other: Mapping[str, Any]) -> Any:
    """Returns the entries of two nested dicts, which have no leaf in common."""
    if not other:
        return one
    return {
        key: _merged(one[key], other[key]) if key in one and key in other else one[key] if key in one else other[key]
        for key in (*one, *(key for key in other if key not in one))
    }


def _head(path: str) -> ClassifierFn:
    """Returns what picks the last layer, as `labels.dense` does."""
    keys = path.split(".")

    def classifier_fn(tree: PyTree[Array]) -> Dense:
        layer = tree
        for key in keys:
            if not isinstance(layer, Mapping) or key not in layer:
                known = ", ".join(map(str, layer)) if isinstance(layer, Mapping) else "no layers"
                raise ValueError(f"--head must lead to the last layer, got {path!r}: there is no {key!r} among {known}")
            layer = layer[key]
        if not isinstance(layer, Mapping):
            raise ValueError(f"--head must lead to a layer of several arrays, got {path!r}, which is one array")
        return labels.dense(*keys)(tree)

    return classifier_fn


def _imported(name: str) -> Callable[..., Any]:
    """Returns the function MODULE:FUNCTION, or raises ValueError where there is none."""
    module_name, _, function_name = name.partition(":")
    with _current_directory_first():
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # whatever a user's module raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(
                f"--model must name a module that can be imported, got {module_name!r}: {reason}"
            ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--model must name a function of {module_name}, got {function_name!r}")
    return function


@contextmanager
def _current_directory_first() -> Generator[None]:
    """Modules are found in the current directory first while it lasts."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
