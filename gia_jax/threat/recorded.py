"""Observations of a recorded update, such as one from the log of a server."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Shaped

from gia_jax import _check
from gia_jax.base import Observation, Params
from gia_jax.threat.entries import beside, first_round, known_parts


def observed(
    params: PyTree[ArrayLike],
    update: PyTree[ArrayLike],
    *,
    inputs_like: PyTree[Shaped[Array | np.ndarray, "b ..."] | jax.ShapeDtypeStruct] | None = None,
    labels: PyTree[ArrayLike] | None = None,
    apply_fn: Callable[[Params, Any], PyTree[Array]] | None = None,
    num_classes: int | None = None,
    statistics: PyTree[Array] | None = None,
    batch_indices: Int[Array | np.ndarray, "t b"] | None = None,
    draws: PRNGKeyArray | None = None,
    inputs: Mapping[str, ArrayLike] | None = None,
) -> Observation:
    """Makes an observation from a recorded update, such as one from the log of a server.

    No client is run and no true data are needed. What is not given is not known to the attack. The update must have the
    sign and scale of a gradient: `interop.pseudo_gradient` makes it from the parameters before and after local
    training, and `interop.from_torch` brings both from PyTorch or Flower. Values and shapes are checked before anything
    is compiled. What no shape tells, such as two tensors of one shape that were swapped, shows afterwards in a low
    share of `metrics.explained`.

    Args:
        params: Parameters that the server sent, a tree of arrays of JAX or NumPy.
        update: The client's update, a tree like `params`. It is cast to the types of the parameters. With
            `batch_indices` every leaf has a leading axis of rounds.
        inputs_like: An array, or its shape and type, like the client's batch as the model sees it, shape (b, *d), or a
            tree of these where the model takes a tree. Its values are not used. None if the attacker knows neither the
            number of examples nor their shape.
        labels: The labels of the batch where the attacker knows them, in any order; the first axis is that of the
            examples.
        apply_fn: The model, `(params, inputs) -> logits`. With it, the shapes of the inputs and the range of the labels
            are compared with what the model takes.
        num_classes: Number of classes, where labels are classes. None reads it from the logits of `apply_fn`, if these
            are one array of shape (b, c) with c > 1, and else checks no range.
        statistics: Batch-normalisation statistics of the client's forward pass, where the attacker knows them.
        batch_indices: Positions of the examples of each of t rounds, shape (t, b), where the update is of several
            rounds.
        draws: Random key that the client drew from, where the attacker knows it.
        inputs: Parts of the inputs that the attacker knows, a dict of arrays, where the inputs are a dict: such as the
            "mask" of graphs, which says how many nodes they have. They need `inputs_like`, whose shapes they have.

    Returns:
        The observation, which every attack takes.

    Raises:
        ValueError: If the update does not fit the parameters, holds counters instead of numbers, is not finite or is
            zero everywhere; if the model does not take such inputs, with the reason where it is a missing batch
            axis or another order of the axes; if labels are not those of such a batch; or if `inputs` are no parts of
            `inputs_like`, have other shapes or are not finite.

    Examples:
        A linear model's update gives its image away:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import attacks, labels, observed
        >>> params = {"head": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
        >>> image, error = jnp.array([0.5, -1.0, 2.0]), jnp.array([-0.5, 0.5])
        >>> update = {"head": {"kernel": jnp.outer(image, error), "bias": error}}
        >>> seen = observed(params, update, inputs_like=jnp.zeros((1, 3)))
        >>> head = labels.dense("head")
        >>> attacks.linear_inversion(head, label_fn=labels.idlg(head))(jax.random.key(0), seen).batch.inputs.tolist()
        [[0.5, -1.0, 2.0]]
    """
    for name, tree in (("params", params), ("update", update)):
        _check.arrays(name, tree, ": interop.from_torch brings tensors of PyTorch")
    _check.finite("params", params)
    for name, tree, other, like in (("update", update, "params", params), ("params", params, "update", update)):
        if isinstance(tree, list | tuple) and isinstance(like, dict):
            kind = type(tree).__name__
            fit = f"interop.from_torch({name}, {other}) makes one of arrays in PyTorch's order"
            raise ValueError(f"{name} must be a dict as {other} is, got a {kind}: {fit}")
    for path, leaf in jax.tree.leaves_with_path(update):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            place = f"update{jax.tree_util.keystr(path)}"
            raise ValueError(f"{place} must be of a floating type, got {jnp.result_type(leaf)}: leave out counters")
    one_round = update if batch_indices is None else first_round(update, len(batch_indices))
    _check.same_structure("update", one_round, "params", params)
    _check.finite("update", update)
    leaves = jax.tree.leaves(update)
    if _check.is_concrete(leaves) and not any(np.any(np.asarray(leaf)) for leaf in leaves):
        raise ValueError("update must not be zero everywhere: nothing moved")
    if jax.tree.structure(update) != jax.tree.structure(params):
        got, want = jax.tree.structure(update), jax.tree.structure(params)
        raise ValueError(f"update must be nested like params, {want}, got {got}")
    cast = jax.tree.map(lambda leaf, like: jnp.asarray(leaf).astype(jnp.result_type(like)), update, params)
    extra: dict[str, Any] = {}
    is_logits = False
    if inputs_like is not None:
        extra["inputs_like"], outputs = _inputs_like(inputs_like, params, apply_fn)
        is_logits = isinstance(outputs, jax.ShapeDtypeStruct) and len(outputs.shape) == 2 and outputs.shape[1] > 1
        num_classes = outputs.shape[-1] if num_classes is None and is_logits else num_classes
    if labels is not None:
        _check.arrays("labels", labels)
        is_row = isinstance(labels, tuple) and all(isinstance(label, float | int) for label in labels)
        is_tree = isinstance(labels, dict | tuple) and not is_row
        labels = jax.tree.map(jnp.asarray, labels) if is_tree else jnp.asarray(labels)
        sizes = extra["inputs_like"] if inputs_like is not None else jnp.zeros((len(jax.tree.leaves(labels)[0]), 1))
        _check.batch(sizes, labels, num_classes)
        if is_logits:
            _check.classes(labels, labels.shape[:1], num_classes)  # one class an example, as there are logits
        extra["labels"] = labels
    if inputs is not None and not isinstance(inputs, Mapping):
        raise ValueError(f"inputs must be a dict of arrays by the names of parts, got {_check.brief(inputs)}")
    if inputs:
        if inputs_like is None:
            raise ValueError(f"inputs must be given with inputs_like, whose parts they are, got only {sorted(inputs)}")
        extra["inputs"] = _known_inputs(inputs, extra.get("inputs_like"))
    extra |= beside(statistics, batch_indices, draws)
    return Observation(jax.tree.map(jnp.asarray, params), cast, extra)


def _known_inputs(inputs: Mapping[str, ArrayLike], like: Any) -> dict[str, Array]:
    """Returns the known parts of the inputs in the types of the model's, or raises ValueError for other shapes."""
    wanted = known_parts(like, tuple(inputs), name="inputs")
    for name, part in inputs.items():
        if isinstance(part, list | tuple):
            raise ValueError(f"inputs[{name!r}] must be an array, got a {type(part).__name__}: jnp.asarray makes one")
        _check.arrays(f"inputs[{name!r}]", part if jax.tree.leaves(part) else (part,))
        _check.finite(f"inputs[{name!r}]", part)
        if jnp.issubdtype(jnp.result_type(part), jnp.complexfloating):
            raise ValueError(f"inputs[{name!r}] must be real, got {jnp.result_type(part)}")
        if jnp.shape(part) != wanted[name].shape:
            raise ValueError(f"inputs[{name!r}] must have shape {wanted[name].shape}, got {jnp.shape(part)}")
    return {name: jnp.asarray(part, wanted[name].dtype) for name, part in inputs.items()}


def _inputs_like(
    like: PyTree[Any], params: Params, apply_fn: Callable[[Params, Any], Any] | None
) -> tuple[PyTree[Array], Any]:
    """Zeros of the shape of the inputs, and the shapes of what the model makes of them."""
    for leaf in jax.tree.leaves(like):
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise ValueError(
                f"inputs_like must be an array or a jax.ShapeDtypeStruct, or a tree of them, got {_check.brief(like)}: "
                "pass jnp.zeros(shape) for a shape"
            )
        if leaf.dtype == jnp.uint8:
            raise ValueError(
                "inputs_like must be what the model sees, got uint8 pixels: divide them by 255 and normalise them"
            )
    _check.examples(like, name="inputs_like", hint=": is the batch axis missing?")
    for leaf in jax.tree.leaves(like):
        _check.fits(math.prod(leaf.shape), inputs_like=leaf.shape)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)), like)
    if apply_fn is None:
        return zeros, None

    def outputs_of(wanted: PyTree[Any]) -> Any:
        try:
            return jax.eval_shape(apply_fn, params, wanted)
        except Exception as error:  # whatever a user's model raises
            return error

    outputs = outputs_of(zeros)
    if isinstance(outputs, Exception):
        if str(outputs).startswith("params "):  # of `models.functional`: no inputs would do
            raise ValueError(str(outputs))
        if not hasattr(like, "shape"):
            shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), like)
            reason = " ".join(str(outputs).split())[:200]
            raise ValueError(f"inputs_like must be inputs of apply_fn, got the shapes {shapes}: {reason}")
        shape = tuple(like.shape)
        moved = {"the batch axis is missing": (1, *shape)}
        if len(shape) == 4:
            moved |= {
                "the channels are first (NCHW)": (shape[0], *shape[2:], shape[1]),
                "the channels are last (NHWC)": (shape[0], shape[3], *shape[1:3]),
            }
        if len(shape) == 3:
            moved["the batch axis is missing and the channels are first (CHW)"] = (1, *shape[1:], shape[0])

        def fits(other: tuple[int, ...]) -> bool:
            return not isinstance(outputs_of(jax.ShapeDtypeStruct(other, like.dtype)), Exception)

        fitting = [f": {why}, and the model takes {other}" for why, other in moved.items() if fits(other)]
        why = fitting[0] if fitting else f": {' '.join(str(outputs).split())[:200]}"
        raise ValueError(f"inputs_like must be inputs of apply_fn, got shape {shape}{why}")
    return zeros, outputs
