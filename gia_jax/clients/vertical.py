"""Vertical federated learning: the workers hold different features of the same records.

Jin et al., CAFE: Catastrophic Data Leakage in Vertical Federated Learning, NeurIPS 2021, section 2.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Shaped

from gia_jax import _check
from gia_jax.base import Batch, ClientFn, LossFn, Params, Updates
from gia_jax.clients.gradient import check_data, parameter_gradient
from gia_jax.lowering import Lowering
from gia_jax.precision import cast_like, widened_tree

SplitFn = Callable[[Any], Sequence[Any]]


def quadrants(images: Shaped[Array | np.ndarray, "b h w c"]) -> list[Shaped[Array | np.ndarray, "b i j c"]]:
    """Splits images into the quarters that four workers hold: top left, top right, bottom left, bottom right.

    Args:
        images: Images of even height and width, shape (b, h, w, c).

    Returns:
        Four arrays of shape (b, h / 2, w / 2, c).

    Raises:
        ValueError: If the height or the width is odd.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import clients
        >>> images = jnp.array([[1, 2], [3, 4]]).reshape(1, 2, 2, 1)
        >>> [part.item() for part in clients.quadrants(images)]
        [1, 2, 3, 4]
    """
    height, width = images.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"images must have an even height and width, got {height} x {width}")
    rows, columns = (
        (slice(0, height // 2), slice(height // 2, height)),
        (slice(0, width // 2), slice(width // 2, width)),
    )
    return [images[:, row, column] for row in rows for column in columns]


def vertical_model(
    split_fn: SplitFn,
    worker_fn: Callable[[Params, Array], Float[Array, "b e"]],
    server_fn: Callable[[Params, Float[Array, "b f"]], Float[Array, "b c"]],
) -> Callable[[Params, Float[Array, "b *d"]], Float[Array, "b c"]]:
    """Builds the joint model of M workers and a server: logits = server(worker_1(x_1), ..., worker_M(x_M)).

    Args:
        split_fn: Function `(inputs) -> slices` that splits inputs (b, *d) into the M slices, each feature in one of
            them, such as `quadrants`.
        worker_fn: Function that maps the parameters of a worker and its slice to its output, shape (b, e).
        server_fn: Function that maps the parameters of the server and the workers' outputs side by side, shape (b, f),
            to logits, shape (b, c).

    Returns:
        A function `(params, inputs) -> logits`, where params is {"workers": the M workers' parameters in a list,
        "server": the server's}. It raises ValueError if the number of workers is not M.

    Examples:
        Two workers hold a feature each, and the server adds their outputs:

        >>> import jax.numpy as jnp
        >>> from gia_jax import clients
        >>> apply_fn = clients.vertical_model(
        ...     split_fn=lambda inputs: [inputs[:, :1], inputs[:, 1:]],
        ...     worker_fn=lambda worker, part: worker * part,
        ...     server_fn=lambda server, outputs: outputs @ server,
        ... )
        >>> params = {"workers": [jnp.array(10.0), jnp.array(100.0)], "server": jnp.ones((2, 1))}
        >>> apply_fn(params, jnp.array([[1.0, 2.0]])).tolist()
        [[210.0]]
    """

    def apply_fn(params: Params, inputs: Float[Array, "b *d"]) -> Float[Array, "b c"]:
        slices = split_fn(inputs)
        if len(params["workers"]) != len(slices):
            raise ValueError(f"params['workers'] must have {len(slices)} entries, got {len(params['workers'])}")
        outputs = [worker_fn(worker, part) for worker, part in zip(params["workers"], slices, strict=True)]
        return server_fn(params["server"], jnp.concatenate(outputs, -1))

    return apply_fn


def vertical_sgd(
    loss_fn: LossFn,
    batch_indices: Array | np.ndarray,
    *,
    learning_rate: float = 0.0,
    transformation: optax.GradientTransformation | None = None,
    lowering: Lowering = "auto",
) -> ClientFn:
    """Builds the client of T rounds of vertical SGD.

    Each round is on the records that its public indices select, the same at every worker.

    Args:
        loss_fn: Function `(params, batch) -> loss`, a scalar, such as `cross_entropy(vertical_model(...))`.
        batch_indices: Indices of the records of each round, integers of at least 0, shape (t, b).
        learning_rate: Learning rate of the step between two rounds, at least 0 and finite. With 0 the model is frozen.
        transformation: Defense of the update. What is shared, and trained with, is its output, and its state passes
            from round to round. None shares the gradient.
        lowering: How convolutions are computed: "matmul" as matrix products, "native" as they are, "auto" chooses the
            first on CPU and the second elsewhere.

    Returns:
        The client, a function `(params, records) -> update`, where records is a batch of all N records and every leaf
        of the update is the T rounds' gradients, shape (t, *shape). It is to be observed with `observe(...,
        batch_indices=batch_indices)`.

    Raises:
        ValueError: If the indices are no matrix of integers or out of range, or the learning rate is negative or not
            finite.

    Examples:
        The gradient of each round is the mean of the records that it selects:

        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, clients
        >>> loss_fn = lambda params, batch: jnp.mean(batch.inputs @ params)
        >>> client_fn = clients.vertical_sgd(loss_fn, jnp.array([[0, 1], [2, 0]]))
        >>> records = Batch(jnp.array([[1.0], [3.0], [5.0]]), jnp.array([0, 1, 0]))
        >>> client_fn(jnp.zeros(1), records).tolist()
        [[2.0], [3.0]]
    """
    check_batch_indices(batch_indices)
    _check.scalar(learning_rate=learning_rate)
    _check.not_negative(learning_rate=learning_rate)
    _check.finite("learning_rate", learning_rate)
    gradient_fn = parameter_gradient(loss_fn, lowering=lowering)
    defense = optax.identity() if transformation is None else transformation

    def client_fn(params: Params, records: Batch) -> Updates:
        check_batch_indices(batch_indices, _check.examples(records.inputs, name="records.inputs"))
        check_data(loss_fn, params, records)

        def one_round(state: tuple[Params, optax.OptState], chosen: Int[Array, " b"]) -> tuple[tuple, Updates]:
            # Trained in float32 or wider, because half precision loses a small step.
            trained, memory = state
            current = cast_like(trained, params)
            gradient = gradient_fn(current, jax.tree.map(lambda leaf: leaf[chosen], records))
            shared, memory = defense.update(gradient, memory, current)
            return (optax.tree.add_scale(trained, -learning_rate, widened_tree(shared)), memory), shared

        return jax.lax.scan(one_round, (widened_tree(params), defense.init(params)), jnp.asarray(batch_indices))[1]

    return client_fn


def check_batch_indices(batch_indices: Array | np.ndarray, num_records: int | None = None) -> None:
    """Checks the records of each round.

    Args:
        batch_indices: Indices of the records of each round, shape (t, b).
        num_records: Number of records that there are, or None where it is not known.

    Raises:
        ValueError: If the indices are no matrix of integers or, where they are concrete, name no record.
    """
    if jnp.ndim(batch_indices) != 2 or 0 in batch_indices.shape or not jnp.issubdtype(batch_indices.dtype, jnp.integer):
        raise ValueError(
            f"batch_indices must be integers of shape (t, b), got {batch_indices.dtype} {jnp.shape(batch_indices)}"
        )
    if _check.is_concrete(batch_indices):
        records = np.asarray(batch_indices)  # NumPy also where a trace goes on around concrete indices
        low, high = int(records.min()), int(records.max())
        if low < 0 or (num_records is not None and high >= num_records):
            bound = "" if num_records is None else f" and below {num_records}"
            raise ValueError(f"batch_indices must be at least 0{bound}, got {low if low < 0 else high}")
