"""What identifies the records of CAFE: which rounds used which of them, and the gradients of those rounds."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from gia_jax import _check
from gia_jax.base import Params, Updates
from gia_jax.clients.vertical import check_batch_indices
from gia_jax.labels.classifier import Dense


class LayerRounds(NamedTuple):
    """The gradients that a fully connected layer with a bias has in each of t rounds.

    Attributes:
        kernel: Gradients of the kernel, shape (t, d, r).
        bias: Gradients of the bias, shape (t, r).
    """

    kernel: Float[Array, "t d r"]
    bias: Float[Array, "t r"]


LayersFn = Callable[[Updates], Sequence[Dense]]
FeaturesFn = Callable[[Params, Array], Sequence[Array]]


def selection_matrix(batch_indices: Int[Array, "t b"], num_records: int) -> Float[Array, "t n"]:
    """Computes the matrix S that says how often each round used each record.

    Args:
        batch_indices: Indices of the records that each round used, shape (t, b).
        num_records: Number n of records.

    Returns:
        The matrix, shape (t, n).

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks.cafe import selection_matrix
        >>> selection_matrix(jnp.array([[0, 2], [1, 1]]), 3).tolist()
        [[1.0, 0.0, 1.0], [0.0, 2.0, 0.0]]
    """
    return jnp.sum(jax.nn.one_hot(batch_indices, num_records, dtype=jnp.result_type(float)), 1)


def batch_rank(batch_indices: Array | np.ndarray, num_records: int) -> int:
    """Computes the rank of the selection matrix, in float64.

    The records are identified if and only if the rank is their number N. At least T = N rounds are needed. Independent
    random batches reach rank N there, badly conditioned, and do well with 1.5 N rounds. Batches of B records from E
    shuffled epochs need E >= (N - 1) / (N / B - 1), since each epoch sums to the same row. A fixed partition has rank N
    / B, and the batch of all records rank 1, whatever T.

    Args:
        batch_indices: Indices of the records that each round used, shape (t, b).
        num_records: Number N of records.

    Returns:
        The rank.

    Raises:
        ValueError: If the indices are not a matrix of integers, or are out of range.

    Examples:
        Three pairs of three records identify them, and one pair with the rest does not:

        >>> import numpy as np
        >>> from gia_jax.attacks.cafe import batch_rank
        >>> batch_rank(np.array([[0, 1], [1, 2], [2, 0]]), 3), batch_rank(np.array([[0, 1], [1, 0], [2, 2]]), 3)
        (3, 2)
    """
    return int(np.linalg.matrix_rank(_exact_selection(batch_indices, num_records)))


def batch_condition(batch_indices: Array | np.ndarray, num_records: int) -> float:
    """Computes the condition number of the selection matrix, in float64.

    Rounding errors of the updates may grow by this factor.

    Args:
        batch_indices: Indices of the records that each round used, shape (t, b).
        num_records: Number of records.

    Returns:
        The condition number, at least 1.

    Raises:
        ValueError: If the indices are not a matrix of integers, or are out of range.

    Examples:
        Rounds of one record add no error, and these pairs may double it:

        >>> import numpy as np
        >>> from gia_jax.attacks.cafe import batch_condition
        >>> print(f"{batch_condition(np.array([[0], [1], [2]]), 3):.2f}")
        1.00
        >>> print(f"{batch_condition(np.array([[0, 1], [1, 2], [2, 0]]), 3):.2f}")
        2.00
    """
    return float(np.linalg.cond(_exact_selection(batch_indices, num_records)))


def _exact_selection(batch_indices: Array | np.ndarray, num_records: int) -> np.ndarray:
    """Returns the selection matrix in float64, for indices that are checked first."""
    check_batch_indices(batch_indices, num_records)
    selection = np.zeros((len(batch_indices), num_records))
    np.add.at(selection, (np.arange(len(batch_indices))[:, None], np.asarray(batch_indices)), 1)
    return selection


def check_identifiable(batch_indices: Array | np.ndarray, num_records: int) -> None:
    """Raises ValueError for wrong indices, and where concrete batches cannot identify the records.

    Args:
        batch_indices: Indices of the records that each round used, shape (t, b).
        num_records: Number of records.

    Raises:
        ValueError: If the indices are not a matrix of integers, are out of range, or have too small a `batch_rank`.
    """
    check_batch_indices(batch_indices, num_records)
    if _check.is_concrete(batch_indices):
        rank = batch_rank(batch_indices, num_records)
        if rank < num_records:
            raise ValueError(
                f"batch_indices cannot identify the records: the {len(batch_indices)} batches must have rank "
                f"{num_records}, got {rank}"
            )


def rounds_of(layer: Dense, num_rounds: int) -> LayerRounds:
    """Checks that a layer's gradients are those of the rounds, and returns them.

    Args:
        layer: Gradients of a layer, as `layers_fn` picks them from the update.
        num_rounds: Number t of rounds.

    Returns:
        The gradients, of shapes (t, d, r) and (t, r).

    Raises:
        ValueError: If the layer has no bias, or its gradients have other shapes.
    """
    if layer.bias is None:
        raise ValueError("cafe needs a bias in the layers, got none")
    if layer.kernel.ndim != 3 or layer.bias.ndim != 2 or {len(layer.kernel), len(layer.bias)} != {num_rounds}:
        raise ValueError(
            f"the layers' gradients must have shapes ({num_rounds}, d, r) and ({num_rounds}, r), got "
            f"{layer.kernel.shape} and {layer.bias.shape}"
        )
    return LayerRounds(layer.kernel, layer.bias)


def pseudo_inverse(selection: Float[Array, "t n"]) -> tuple[Float[Array, "n t"], Int[Array, ""]]:
    """Computes S^+ and the rank of S, by the singular values above the usual max(t, n) eps of the largest.

    Args:
        selection: Selection matrix S, shape (t, n).

    Returns:
        The pseudo-inverse, shape (n, t), and the rank.
    """
    u, s, vt = jnp.linalg.svd(selection, full_matrices=False)
    kept = s > max(selection.shape) * jnp.finfo(s.dtype).eps * s[0]
    scaled = vt.T * jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
    return jnp.matmul(scaled, u.T, precision="highest"), jnp.sum(kept)


def unexplained(
    selection: Float[Array, "t n"], layers: Sequence[LayerRounds], features: Sequence[Array], gradients: Sequence[Array]
) -> Float[Array, ""]:
    """Computes the share of the kernels' gradients, in L2 norm, that the features H and gradients V do not explain.

    Args:
        selection: Selection matrix S, shape (t, n).
        layers: Gradients of the first fully connected layer of every worker.
        features: H of every worker, shape (n, d) each.
        gradients: V of every worker, shape (n, r) each.

    Returns:
        The share, a scalar of at least 0.
    """
    missed = [
        layer.kernel - jnp.einsum("tn,nd,nr->tdr", selection, h, v, precision="highest")
        for layer, h, v in zip(layers, features, gradients, strict=True)
    ]
    return optax.tree.norm(missed) / optax.tree.norm([layer.kernel for layer in layers])
