"""From the parameters before and after local training to an update with the sign and scale of a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gia_jax import _check
from gia_jax.interop.tensors import Tensor, as_numpy, leaves_by_name, must_fit
from gia_jax.precision import is_floating


def pseudo_gradient(
    before: PyTree[Tensor],
    after: PyTree[Tensor],
    learning_rate: float | None = None,
    local_steps: int | None = None,
) -> PyTree[Array]:
    """Computes the pseudo-gradient of a client from the parameters before and after its local training.

    It is (before - after) / (local_steps * learning_rate), the one sign convention of the library and what
    `clients.federated_averaging` returns: for plain SGD the mean of the local gradients, and for one step the gradient.

    Without a learning rate it is before - after, which is known up to a positive factor only. Then take what does not
    depend on the scale, as for an update that was clipped: cosine objectives such as that of Inverting Gradients, any
    other one in `matching.adaptive.rescaled`, and the label rules `idlg`, `column_minimum`, `greedy_bias` and `llg`. A
    client with momentum, weight decay or Adam sends no mean of gradients: simulate it by a client of your own.

    A client that sends the change after - before instead of its parameters is read with zeros as `before`.

    Args:
        before: Parameters that the server sent: a tree of arrays, a state dict of PyTorch, or a list of arrays as
            Flower sends them.
        after: Parameters that the client returned, a tree of the same structure and shapes.
        learning_rate: Learning rate of the client's SGD, > 0 and finite. None if it is not known.
        local_steps: Number of the client's local steps, at least 1. None stands for one step; it must be None where
            the learning rate is.

    Returns:
        A tree like `before`, in float32 or wider. An integer leaf, such as the `num_batches_tracked` of PyTorch, is no
        parameter: it is what `after` has there, and `from_torch` leaves it out.

    Raises:
        ValueError: If the trees do not fit each other, nothing moved, a value is not finite, or the learning rate or
            the number of steps is out of range.

    Examples:
        One step of learning rate 0.1 along a gradient of 2:

        >>> import jax.numpy as jnp
        >>> from gia_jax import interop
        >>> update = interop.pseudo_gradient({"w": jnp.array([1.0])}, {"w": jnp.array([0.8])}, learning_rate=0.1)
        >>> update["w"].round(4).tolist()
        [2.0]
    """
    total = _total(learning_rate, local_steps)
    start, end = _by_name("before", before), _by_name("after", after)
    must_fit("after", end, "before", start)
    floating = [name for name, array in start.items() if is_floating(array)]
    if not floating:
        raise ValueError("before must hold arrays of floating-point numbers, got none")
    changes = {name: _change(name, array, end[name]) for name, array in start.items()}
    if not any(np.any(changes[name]) for name in floating):
        raise ValueError("after must differ from before, got equal parameters: the client did not move")
    for name in floating:
        changes[name] = (changes[name] / total).astype(np.promote_types(start[name].dtype, np.float32))
    update = jax.tree.unflatten(jax.tree.structure(before), [jnp.asarray(change) for change in changes.values()])
    # Trees sort the keys of a dict; a state dict's own order tells which layer follows which.
    return {name: update[name] for name in before} if type(before) is dict else update


def _total(learning_rate: float | None, local_steps: int | None) -> float:
    """Returns what the change is divided by."""
    if local_steps is not None:
        _check.integer(local_steps=local_steps)
    if learning_rate is None:
        if local_steps is not None:
            raise ValueError(f"local_steps must be None where learning_rate is not known, got {local_steps}")
        return 1.0
    _check.scalar(learning_rate=learning_rate)
    _check.positive(learning_rate=learning_rate)
    _check.finite("learning_rate", learning_rate)
    return float(learning_rate) * (local_steps or 1)


def _by_name(argument: str, tree: PyTree[Tensor]) -> dict[str, np.ndarray]:
    """Returns the leaves of a tree by name, in their order. Two trees are compared by names, not by places."""
    return {name: as_numpy(f"{argument}[{name!r}]", leaf) for name, leaf in leaves_by_name(tree)}


def _change(name: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Returns old - new in float64, or `new` itself where it is no parameter."""
    if is_floating(old) != is_floating(new):
        raise ValueError(f"after does not fit before: {name!r} is of type {new.dtype}, expected {old.dtype}")
    if not is_floating(old):
        return new
    for argument, array in (("before", old), ("after", new)):
        _check.finite(f"{argument}[{name!r}]", array)
    return old.astype(np.float64) - new.astype(np.float64)
