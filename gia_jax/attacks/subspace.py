"""The subspace that the gradient of a dense layer spans, and a test of which candidates lie in it.

The gradient of a kernel is G = H^T D, with the layer's inputs as the rows of H. Its columns are combinations of these
rows, and where D has rank enough they span all of them. An attacker who can list the inputs that are possible keeps
those in the span (Petrov et al., DAGER, NeurIPS 2024, for tokens; Drencheva et al., GRAIN, ICLR 2025, for graphs).

Both papers set thresholds by hand. Here they follow from the noise of the gradient. Let G = U S V^T + E with errors E
that are independent, of mean 0 and standard deviation t. To first order the part of a vector v = U a that is outside of
the span of the perturbed G is (I - U U^T) E V S^(-1) a, hence

    |outside(v)|^2 / (t^2 |S^(-1) a|^2)  is chi-squared distributed with d - rank degrees of freedom,

so that the probability to lose a true vector can be chosen. The rank counts the singular values that noise alone
exceeds with no more than the same probability (Davidson and Szarek, 2001): |E| > t (sqrt(d) + sqrt(m) + s) has
a probability of at most exp(-s^2 / 2). Of a direction at random, the squared part outside has a beta distribution.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from gia_jax import _check

# Standard deviation of an entry's error, in units of the spacing of its type, where it was computed in that type: the
# last rounding alone gives 0.29, and the sums before it more. Gradients of graph networks in float32 have 1 to 2.
ROUNDINGS = 4.0


class Subspace(NamedTuple):
    """The column space of a matrix with errors.

    Attributes:
        basis: Orthonormal columns, shape (d, k), those of the largest singular values first. Columns from `rank` on are
            zero, so that shapes do not depend on values.
        values: Singular values, shape (k,). Those from `rank` on are 1 and without a meaning.
        rank: Number of singular values that are not explained by the errors.
        noise: Standard deviation of the errors of the matrix' entries.
    """

    basis: Float[Array, "d k"]
    values: Float[Array, " k"]
    rank: Int[Array, ""]
    noise: Float[Array, ""]


def column_space(matrix: Float[Array, "d m"], *, noise: ArrayLike, miss: float = 1e-3) -> Subspace:
    """Computes the space that the columns of a matrix span, as far as its errors allow to tell.

    Args:
        matrix: The matrix, such as the gradient of a kernel, shape (d, m). For its row space give the transpose.
        noise: Standard deviation of the errors of its entries, which are independent, at least 0. The errors of the
            decomposition itself are added.
        miss: Largest probability with which noise alone counts as a dimension, in (0, 1).

    Returns:
        The subspace, in the type of the matrix.

    Raises:
        ValueError: If the noise is negative or `miss` is not in (0, 1).

    Examples:
        The third column adds an error, and no dimension:

        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks.subspace import column_space
        >>> matrix = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.001]])
        >>> int(column_space(matrix, noise=1e-3).rank), int(column_space(matrix, noise=1e-6).rank)
        (2, 3)
    """
    _check.not_negative(noise=noise)
    _check_probability(miss)
    d, m = matrix.shape
    left, values, _ = jnp.linalg.svd(matrix, full_matrices=False)
    own = ROUNDINGS * jnp.finfo(matrix.dtype).eps * values[0] / jnp.sqrt(d)
    total = jnp.hypot(jnp.asarray(noise, matrix.dtype), own)
    limit = total * (np.sqrt(d) + np.sqrt(m) + np.sqrt(-2 * np.log(miss)))
    is_kept = values > limit
    return Subspace(jnp.where(is_kept, left, 0), jnp.where(is_kept, values, 1), jnp.sum(is_kept), total)


def outside(space: Subspace, vectors: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Computes the parts of vectors of length 1 that are orthogonal to a subspace.

    Args:
        space: The subspace of d dimensions.
        vectors: The vectors, shape (n, d). Their lengths play no part.

    Returns:
        The parts, shape (n, d), each of a length in [0, 1]. It is 0 for a vector of zeros.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks.subspace import column_space, outside
        >>> space = column_space(jnp.array([[1.0], [0.0]]), noise=1e-6)
        >>> outside(space, jnp.array([[5.0, 0.0], [0.0, 2.0]])).tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    unit = _unit(vectors)
    inside = unit @ space.basis
    rest = unit - inside @ space.basis.T
    return rest - (rest @ space.basis) @ space.basis.T  # once more: the first part has lost digits


def residuals(space: Subspace, vectors: Float[Array, "n d"]) -> Float[Array, " n"]:
    """Computes how far vectors are from a subspace, relative to their lengths.

    Args:
        space: The subspace of d dimensions.
        vectors: The vectors, shape (n, d).

    Returns:
        The lengths of their parts outside of it over their own, shape (n,), in [0, 1].

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks.subspace import column_space, residuals
        >>> space = column_space(jnp.array([[1.0], [0.0]]), noise=1e-6)
        >>> residuals(space, jnp.array([[5.0, 0.0], [3.0, 4.0]])).tolist()
        [0.0, 0.800000011920929]
    """
    return jnp.linalg.norm(outside(space, vectors), axis=1)


def statistic(space: Subspace, vectors: Float[Array, "n d"]) -> Float[Array, " n"]:
    """Computes the squared lengths of vectors' parts outside of a subspace, in units of what the noise makes of them.

    The candidates' own rounding counts as noise as well.

    Args:
        space: The subspace of d dimensions.
        vectors: The vectors, shape (n, d).

    Returns:
        The values, shape (n,). For vectors of the true span they are chi-squared distributed with d - rank degrees of
        freedom, to first order in the noise, where the errors are independent and Gaussian.

    Examples:
        The error of the matrix' entries is 0.001, so 0.002 is twice the standard deviation:

        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks.subspace import column_space, statistic
        >>> space = column_space(jnp.array([[1.0], [0.0]]), noise=1e-3)
        >>> [round(value, 2) for value in statistic(space, jnp.array([[1.0, 0.002], [1.0, 0.01]])).tolist()]
        [4.0, 100.0]
    """
    inside = _unit(vectors) @ space.basis
    variance = jnp.square(space.noise) * jnp.sum(jnp.square(inside / space.values), 1)
    own = jnp.square(ROUNDINGS * jnp.finfo(vectors.dtype).eps)  # of every entry of the part outside
    return jnp.sum(jnp.square(outside(space, vectors)), 1) / (variance + own)


def plausibility(space: Subspace, vectors: Float[Array, "n d"]) -> Float[Array, " n"]:
    """Computes the probability that a vector of the true span would be found as far from the observed one.

    Args:
        space: The subspace of d dimensions.
        vectors: The vectors, shape (n, d).

    Returns:
        The probabilities, shape (n,), uniform in [0, 1] for vectors of the true span. They are 1 where the subspace
        has all d dimensions, as nothing can then be told apart.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks.subspace import column_space, plausibility
        >>> space = column_space(jnp.array([[1.0], [0.0]]), noise=1e-3)
        >>> [round(p, 2) for p in plausibility(space, jnp.array([[1.0, 0.002], [1.0, 0.01]])).tolist()]
        [0.05, 0.0]
    """
    freedom = vectors.shape[1] - space.rank
    tail = jax.scipy.special.gammaincc(jnp.maximum(freedom, 1) / 2, statistic(space, vectors) / 2)
    return jnp.where(freedom > 0, tail, 1)


def contains(space: Subspace, vectors: Float[Array, "n d"], *, miss: float = 1e-3) -> Bool[Array, " n"]:
    """Tells which vectors lie in a subspace, as far as the noise allows to tell.

    Args:
        space: The subspace of d dimensions.
        vectors: The vectors, shape (n, d).
        miss: Probability with which a vector of the true span is lost, in (0, 1).

    Returns:
        Whether each is kept, shape (n,).

    Raises:
        ValueError: If `miss` is not in (0, 1).

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks.subspace import column_space, contains
        >>> space = column_space(jnp.array([[1.0], [0.0]]), noise=1e-3)
        >>> contains(space, jnp.array([[1.0, 0.002], [1.0, 0.01]])).tolist()
        [True, False]
    """
    _check_probability(miss)
    return plausibility(space, vectors) >= miss


def false_alarm(residual: float, num_features: int, rank: int) -> float:
    """Computes the probability that a direction at random is as close to a subspace as a residual says.

    The squared residual of a direction that is uniform on the sphere has the beta distribution of the parameters
    (d - rank) / 2 and rank / 2. Times the number of candidates, it bounds how many of them are kept by chance. It is no
    statement about candidates that depend on each other, such as sums of others that are kept.

    Args:
        residual: Length of the part outside of the subspace over the whole length, in [0, 1].
        num_features: Number d of dimensions, at least 1.
        rank: Number of dimensions of the subspace, from 0 to d.

    Returns:
        The probability, in [0, 1].

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> from gia_jax.attacks.subspace import false_alarm
        >>> round(false_alarm(0.1, num_features=2, rank=1), 3), false_alarm(0.1, num_features=2, rank=2)
        (0.064, 1.0)
    """
    _check.integer(num_features=num_features)
    _check.integer(0, num_features, rank=rank)
    if not 0 <= residual <= 1:
        raise ValueError(f"residual must be in [0, 1], got {residual}")
    if rank == num_features:
        return 1.0
    if rank == 0:
        return float(residual == 1)
    from scipy import stats  # takes a third of a second to import

    return float(stats.beta.cdf(residual**2, (num_features - rank) / 2, rank / 2))


def equalized(matrix: Float[Array, "d m"], *, spacing: ArrayLike) -> tuple[Array, Array]:
    """Scales the columns of a matrix to length 1, so that the errors of rounding are of one size.

    The column space stays the same. The error of a rounded entry is proportional to it, and where columns have
    different lengths no single number describes the errors of all.

    Args:
        matrix: A matrix whose entries were computed in a type of little precision, shape (d, m).
        spacing: Relative spacing of that type, such as `jnp.finfo(jnp.float32).eps`.

    Returns:
        The scaled matrix, where columns of zeros are left as they are, and the standard deviation of the errors.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks.subspace import equalized
        >>> scaled, noise = equalized(jnp.array([[3.0, 0.0], [4.0, 0.0]]), spacing=jnp.finfo(jnp.float32).eps)
        >>> [[round(entry, 3) for entry in row] for row in scaled.tolist()], bool(noise < 1e-6)
        ([[0.6, 0.0], [0.8, 0.0]], True)
    """
    lengths = jnp.linalg.norm(matrix, axis=0)
    scaled = matrix / jnp.where(lengths > 0, lengths, 1)
    return scaled, jnp.asarray(ROUNDINGS * spacing / np.sqrt(len(matrix)), matrix.dtype)


def _unit(vectors: Float[Array, "n d"]) -> Float[Array, "n d"]:
    lengths = jnp.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / jnp.where(lengths > 0, lengths, 1)


def _check_probability(miss: float) -> None:
    if not 0 < miss < 1:
        raise ValueError(f"miss must be in (0, 1), got {miss}")
