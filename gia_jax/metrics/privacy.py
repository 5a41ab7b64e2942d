"""What noise promises: epsilon, the largest chance of a reconstruction, and the least error of one.

Accounting is host work in NumPy. Every number is of the Gaussian mechanism on a sum of clipped gradients, with noise of
`noise_multiplier` times the clipping norm (`defenses.dp_sgd`). Noise without clipping has none of them, except the
error bounds, which are of one known gradient function.
"""

import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

from gia_jax import _check
from gia_jax.base import Batch, ClientFn, Params
from gia_jax.precision import widened

ACCOUNTANTS = ("pld", "rdp")
RELATIONS = ("add_or_remove", "replace_one")
MAX_ROUNDS = 10**9  # up to which the rounding errors of all rounds together are small
MAX_LOSSES = 2**24  # losses in a composed distribution, which take a GiB and some ten seconds
TAIL = 1e-15  # the probability that a composed distribution counts as that of an infinite loss


def epsilon(
    noise_multiplier: float,
    *,
    delta: float,
    num_rounds: int = 1,
    sampling_rate: float = 1.0,
    relation: str = "add_or_remove",
    accountant: str = "pld",
) -> float:
    """Computes the epsilon of `num_rounds` releases, for data sets that differ in one example.

    Args:
        noise_multiplier: Standard deviation of the noise on the sum, divided by the clipping norm, from 1e-50 to 1e50.
        delta: Probability in (0, 1) with which epsilon need not hold.
        num_rounds: Number of releases, each with noise of its own, from 1 to 10^9.
        sampling_rate: Chance of each example to take part in a round, in (0, 1]. Below 1 it must be real Poisson
            sampling that the adversary does not see; a server that chose the cohort saw it.
        relation: How the data sets differ: "add_or_remove", one has an example more, or "replace_one", an example has
            another value, which moves the sum twice as far. The second is that of a batch whose size is known.
        accountant: How epsilon is computed: "pld", privacy loss distributions (tight; without sampling their closed
            form, Balle and Wang, Improving the Gaussian Mechanism for Differential Privacy, ICML 2018), or "rdp", Renyi
            differential privacy (an upper bound).

    Returns:
        Epsilon, as computed by the library dp-accounting.

    Raises:
        ValueError: If an argument is outside its range, "replace_one" meets "rdp" and sampling, or "pld" with sampling
            cannot resolve so small a delta or noise, or so many rounds.
        ImportError: If the extra `privacy` is not installed.

    Formal Guarantees:
        The releases together are (epsilon, delta)-differentially private under `relation`, if every round adds
        N(0, (noise_multiplier * norm)^2) to a sum of gradients clipped to `norm`.

    Examples:
        Four releases with twice the noise cost as much as one:

        >>> from gia_jax import metrics
        >>> print(f"{metrics.epsilon(1.0, delta=1e-5):.2f}")
        4.38
        >>> print(f"{metrics.epsilon(2.0, delta=1e-5, num_rounds=4):.2f}")
        4.38
    """
    _check_mechanism(noise_multiplier, num_rounds, sampling_rate)
    _check_accounting(delta, sampling_rate, relation, accountant)
    replaces = relation == "replace_one"
    dp_accounting = _dp_accounting()
    if accountant == "pld" and sampling_rate == 1:
        shift = (2 if replaces else 1) * math.sqrt(num_rounds) / noise_multiplier
        return float(dp_accounting.get_epsilon_gaussian(1 / shift, delta))
    if accountant == "pld":
        relations = dp_accounting.NeighboringRelation
        relation_of = relations.REPLACE_ONE if replaces else relations.ADD_OR_REMOVE_ONE
        losses = _losses(noise_multiplier, sampling_rate, relation_of)
        if losses is None:
            raise ValueError(_unresolved("noise_multiplier", noise_multiplier, "nearer to 1", relation))
        if not _composable(losses, num_rounds):
            raise ValueError(_unresolved("num_rounds", num_rounds, "smaller", relation))
        found = float(losses.self_compose(num_rounds).get_epsilon_for_delta(delta))
        if math.isinf(found):
            raise ValueError(_unresolved("delta", delta, "larger", relation))
        return found
    # This accountant takes any relation without sampling, and disregards it.
    ledger = dp_accounting.rdp.RdpAccountant()
    release = dp_accounting.GaussianDpEvent(noise_multiplier / 2 if replaces else noise_multiplier)
    if sampling_rate < 1:
        release = dp_accounting.PoissonSampledDpEvent(sampling_rate, release)
    return float(ledger.compose(dp_accounting.SelfComposedDpEvent(release, num_rounds)).get_epsilon(delta))


def reconstruction_robustness(
    noise_multiplier: float, *, prior: float, num_rounds: int = 1, sampling_rate: float = 1.0
) -> float:
    """Computes the largest probability gamma that any attack reconstructs the example that it is after.

    The attack may know every other example. Hayes, Mahloujifar and Balle, Bounding Training Data Reconstruction in
    DP-SGD, NeurIPS 2023, theorem 2: gamma is the largest mu(E) of events E with nu(E) <= prior, nu the noise alone and
    mu the noise with the example. Without sampling it is Phi(Phi^-1(prior) + sqrt(num_rounds) / noise_multiplier). With
    sampling it is the minimum over e of prior exp(e) + delta(e), by duality (Neyman-Pearson), delta the hockey-stick
    divergence of mu from nu (not of nu from mu, which may be larger), composed over the rounds by FFT.

    Args:
        noise_multiplier: Standard deviation of the noise on the sum, divided by the clipping norm, from 1e-50 to 1e50.
        prior: Chance kappa of success without the release, in (0, 1): 1 / n for n equally likely candidates.
        num_rounds: Number of releases, each with noise of its own, from 1 to 10^9.
        sampling_rate: Chance of each example to take part in a round, in (0, 1]. Below 1 it must be real Poisson
            sampling that the adversary does not see.

    Returns:
        Gamma, in [prior, 1]. With sampling delta(e) is interpolated from above, between losses 1e-4 apart (farther
        below a `noise_multiplier` of 0.3): gamma is not below the exact value; for one round and 0.3 or more it was
        above by less than 1e-6. Where that distribution would not fit into memory, or the noise is so little that its
        losses have no numbers, gamma is the lesser of two bounds that need none: gamma without sampling, and 1 - (1 -
        sampling_rate)^num_rounds (1 - prior), as if a sampled example were reconstructed for sure. Without sampling,
        two candidates whose gradients are opposite and of full norm attain it; more do not.

    Raises:
        ValueError: If an argument is outside its range.
        ImportError: If the extra `privacy` is not installed, and `sampling_rate` is below 1.

    Examples:
        One of ten candidates is guessed with a chance of 0.1. Noise as large as the clipping norm raises it to 0.39 at
        most:

        >>> from gia_jax import metrics
        >>> print(f"{metrics.reconstruction_robustness(1.0, prior=0.1):.2f}")
        0.39
    """
    _check_mechanism(noise_multiplier, num_rounds, sampling_rate)
    _check_prior(prior)
    from scipy import stats  # takes a third of a second to import

    unsampled = float(stats.norm.cdf(stats.norm.ppf(prior) + math.sqrt(num_rounds) / noise_multiplier))
    if sampling_rate == 1:
        return max(prior, unsampled)
    # An example that is never sampled is reconstructed with the prior's chance.
    bound = min(unsampled, prior - math.expm1(num_rounds * math.log1p(-sampling_rate)) * (1 - prior))
    losses = _losses(noise_multiplier, sampling_rate, _dp_accounting().NeighboringRelation.ADD_OR_REMOVE_ONE)
    if losses is None or not _composable(losses, num_rounds):
        return max(prior, bound)
    # The distribution takes the larger of both directions; gamma is about the removal, mu against nu, alone.
    composed = type(losses)(losses._pmf_remove).self_compose(num_rounds)._pmf_remove

    def least(low: float, high: float) -> tuple[float, float]:
        grid = np.linspace(low, high, 2_001)
        values = prior * np.exp(grid) + _divergences(composed, grid)
        return float(grid[np.argmin(values)]), float(values.min())

    # The minimum is where exp(e) is a likelihood ratio; prior exp(e) <= 1 bounds it from above.
    highest = -float(np.log(prior))
    coarse, _ = least(-20.0, highest)
    width = (20 + highest) / 2_000
    return max(prior, min(bound, least(coarse - width, coarse + width)[1]))


def fisher_information(
    client_fn: ClientFn, params: Params, batch: Batch, scale: float, *, batch_size: int | None = None
) -> Float[Array, "d d"]:
    """Computes the Fisher information that an update with Gaussian noise has about its inputs.

    It is J^T J / scale^2, the mean over the examples of `batch`.

    Hannun, Guo and van der Maaten, Measuring Data Leakage in Machine-Learning Models with Fisher Information, UAI 2021,
    equation 3. J is the derivative of the update of a client that holds one example.

    Args:
        client_fn: Function `(params, batch) -> update`, the client before the noise, with its clipping. It is called
            with one example.
        params: Parameters that the server sent.
        batch: Examples, of d numbers each.
        scale: Standard deviation of the noise on the update, above 0 and finite.
        batch_size: Number of the d columns of J computed at once, at least 1. None computes all at once.

    Returns:
        The matrix, shape (d, d), in the units of the inputs to the power -2, in float32 or wider. It is NaN where a
        traced `scale` is not positive.

    Raises:
        ValueError: If `scale` is not positive and finite, `batch_size` is no positive integer, the batch is empty, of
            integers, not finite or with another number of labels, or the derivatives do not fit into memory.

    Examples:
        The update is twice the inputs, and the noise has a standard deviation of 0.5:

        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, metrics
        >>> client_fn = lambda params, batch: {"weight": 2 * batch.inputs[0]}
        >>> batch = Batch(jnp.ones((3, 2)), jnp.zeros(3, jnp.int32))
        >>> metrics.fisher_information(client_fn, {"weight": jnp.zeros(2)}, batch, 0.5).tolist()
        [[16.0, 0.0], [0.0, 16.0]]
    """
    _check.scalar(scale=scale)
    _check.positive(scale=scale)
    _check.finite("scale", scale)
    if batch_size is not None:
        _check.integer(batch_size=batch_size)
    _check.one_array("batch.inputs", batch.inputs)
    _check.examples(batch.inputs)
    if not jnp.issubdtype(batch.inputs.dtype, jnp.floating):
        raise ValueError(f"batch.inputs must be of a floating type, got {batch.inputs.dtype}")
    _check.finite("batch.inputs", batch.inputs)
    for leaf in jax.tree.leaves(batch.labels):
        if leaf.shape[:1] != batch.inputs.shape[:1]:
            raise ValueError(f"batch.labels must be {batch.inputs.shape[0]}, got the shape {leaf.shape}")
    shape = batch.inputs.shape[1:]
    number = math.prod(shape)
    _check.fits(number**2, **{"batch.inputs": batch.inputs.shape})
    directions = jnp.eye(number, dtype=batch.inputs.dtype)
    deviation = jnp.where(jnp.asarray(scale) > 0, scale, jnp.nan)

    def one(example: Batch) -> Float[Array, "d d"]:
        def update_of(inputs: Float[Array, "d"]) -> Float[Array, "p"]:
            labels = jax.tree.map(lambda leaf: leaf[None], example.labels)
            update = client_fn(params, Batch(inputs.reshape(1, *shape), labels))
            return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(update)])

        update, push = jax.linearize(update_of, example.inputs.ravel())
        _check.fits(number * update.size, **{"batch.inputs": batch.inputs.shape})
        columns = widened(jax.lax.map(push, directions, batch_size=batch_size or number)) / deviation
        return jnp.matmul(columns, columns.T, precision="highest")

    return jnp.mean(jax.lax.map(one, batch), 0)


def fisher_bound(information: Float[Array | np.ndarray, "d d"]) -> Float[Array, ""]:
    """Computes the least mean squared error per entry of UNBIASED estimators: d / trace(information).

    Hannun, Guo and van der Maaten, UAI 2021 (see `fisher_information`), 1 / eta^2. It is no limit for an attack with a
    prior, which is biased and may do better: see `van_trees_bound`.

    Args:
        information: Fisher information of the inputs, shape (d, d), as from `fisher_information`.

    Returns:
        The bound, in the units of the inputs squared. It is infinite where `information` is all 0, and NaN where a
        traced one is seen not to be symmetric or to have a negative diagonal.

    Raises:
        ValueError: If a concrete `information` is not finite, symmetric and positive semi-definite, or has no entries.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import metrics
        >>> float(metrics.fisher_bound(4 * jnp.eye(2)))
        0.25
    """
    if _check.is_concrete(information):
        _semidefinite("information", information)
    matrix, diagonal = widened(jnp.asarray(information)), widened(jnp.diagonal(jnp.asarray(information)))
    slack = _slack(matrix.dtype) * jnp.max(jnp.abs(matrix))
    known = jnp.all(jnp.abs(matrix - matrix.T) <= slack) & jnp.all(diagonal >= 0)
    return jnp.where(known, len(diagonal) / jnp.sum(jnp.abs(diagonal)), jnp.nan)


def van_trees_bound(
    information: Float[Array | np.ndarray, "d d"], covariance: Float[Array | np.ndarray, "e e"]
) -> float:
    """Computes the least mean squared error per entry of EVERY estimator, for inputs drawn from a Gaussian.

    Van Trees, Detection, Estimation, and Modulation Theory, 1968, section 2.4.3: trace((E[F] + covariance^-1)^-1) / d,
    here as trace(L (1 + L' E[F] L)^-1 L') / d with covariance = L L', which needs no inverse of a singular covariance.
    It is attained where the update is linear in the inputs. In float64: with little noise the matrix is too
    ill-conditioned for less. What is below the rounding of the matrices' entries as given counts as 0.

    Args:
        information: E[F], the Fisher information averaged over the prior (`fisher_information` of many examples), shape
            (d, d).
        covariance: Covariance of the Gaussian prior of the inputs, shape (d, d).

    Returns:
        The bound, in the units of the inputs squared.

    Raises:
        ValueError: If the shapes differ, or a matrix is not finite, symmetric and positive semi-definite, or has no
            entries.

    Examples:
        The prior alone leaves an error of 1, and the release lowers it to 1 / (4 + 1):

        >>> import jax.numpy as jnp
        >>> from gia_jax import metrics
        >>> print(f"{metrics.van_trees_bound(4 * jnp.eye(2), jnp.eye(2)):.2f}")
        0.20
    """
    if information.shape != covariance.shape:
        raise ValueError(f"covariance must have the shape {information.shape} of information, got {covariance.shape}")
    known, prior = _semidefinite("information", information), _semidefinite("covariance", covariance)
    coupled = prior.T @ known
    ones, square = np.eye(len(coupled)), coupled @ coupled.T
    if np.trace(square) < 1e8:
        triangle = scipy.linalg.cholesky(ones + square)
    else:  # slower, but without the square, in whose rounding the ones would be lost
        triangle = np.linalg.qr(np.vstack([coupled.T, ones]), mode="r")
    return float(np.sum(np.square(scipy.linalg.solve_triangular(triangle, prior.T, trans="T"))) / len(prior))


def _semidefinite(name: str, matrix: Float[Array | np.ndarray, "d e"]) -> Float[np.ndarray, "d r"]:
    """Returns the float64 factor L of a matrix L L', up to the rounding of its own type.

    It is found by a pivoted Cholesky decomposition.

    Raises:
        ValueError: If the matrix is not finite, symmetric and positive semi-definite, or has no entries.
    """
    if jnp.ndim(matrix) != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"{name} must have shape (d, d) with d > 0, got {jnp.shape(matrix)}")
    _check.finite(name, matrix)
    values = np.asarray(matrix, np.float64)
    slack = _slack(matrix.dtype) * np.abs(values).max()
    if (gap := float(np.abs(values - values.T).max())) > slack:
        raise ValueError(f"{name} must be symmetric, got entries that differ from those across by {gap:.3g}")
    values = (values + values.T) / 2
    least = float(np.diagonal(values).min())
    raised = values + math.sqrt(len(values)) * slack * np.eye(len(values))
    decompose, decompose_pivoted = scipy.linalg.get_lapack_funcs(("potrf", "pstrf"), (values,))
    if least < -slack or (slack > 0 and decompose(raised)[1]):
        least = float(np.linalg.eigvalsh(values)[0])
        raise ValueError(f"{name} must be positive semi-definite, got the eigenvalue {least:.3g}")
    # In units in which the diagonal is 1: beside large entries small ones are no rounding.
    units = np.sqrt(np.maximum(np.diagonal(values), 0))
    inverse = np.divide(1, units, out=np.zeros_like(units), where=units > 0)
    correlations = values * inverse[:, None] * inverse
    factor, order, rank, _ = decompose_pivoted(correlations, tol=_slack(matrix.dtype) / 100, lower=1)
    rows = np.zeros((len(values), rank))
    rows[order - 1] = np.tril(factor)[:, :rank]
    return rows * units[:, None]


def _slack(dtype: jax.typing.DTypeLike) -> float:
    """Returns what rounding may do to the entries of a matrix of this type, relative to the largest."""
    return 100 * float(jnp.finfo(dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32).eps)


def privacy_lines(
    noise_multiplier: float | None,
    *,
    delta: float = 1e-5,
    num_rounds: int = 1,
    sampling_rate: float = 1.0,
    relation: str = "add_or_remove",
    accountant: str = "pld",
    prior: float | None = None,
    information: Float[Array | np.ndarray, "d d"] | None = None,
    covariance: Float[Array | np.ndarray, "e e"] | None = None,
) -> list[str]:
    """Writes what belongs beside an epsilon, a line each: epsilon, gamma, and the bounds on a reconstruction's error.

    Args:
        noise_multiplier: Standard deviation of the noise on the sum, divided by the clipping norm, from 1e-50 to 1e50.
            0 is clipping without noise, and None is noise without clipping: neither has an epsilon or a gamma.
        delta: Probability in (0, 1) with which epsilon need not hold.
        num_rounds: Number of releases, each with noise of its own, from 1 to 10^9.
        sampling_rate: Chance of each example to take part in a round, in (0, 1]. Below 1 it must be real Poisson
            sampling that the adversary does not see.
        relation: How the data sets differ: "add_or_remove", by an example more, or "replace_one", by an example's
            value.
        accountant: How epsilon is computed: "pld", privacy loss distributions, or "rdp", Renyi differential privacy.
        prior: Chance of success without the release, in (0, 1). None leaves out the line of gamma.
        information: Fisher information of all that is released together, averaged over the prior, shape (d, d). None
            leaves out both bounds.
        covariance: Covariance of the Gaussian prior of the inputs, shape (d, d). None leaves out the bound of van
            Trees.

    Returns:
        The lines. Errors are in the units of the inputs squared.

    Raises:
        ValueError: If an argument is outside its range, or there is a `covariance` without `information`.
        ImportError: If there is an epsilon to compute and the extra `privacy` is not installed.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import metrics
        >>> for line in metrics.privacy_lines(None, information=4 * jnp.eye(2)):
        ...     print(line)
        no epsilon: the sensitivity is unbounded
        mean squared error >= 0.25 (Fisher, unbiased estimators only)
        >>> for line in metrics.privacy_lines(1.0, prior=0.1):
        ...     print(line)
        epsilon 4.377 at delta 1e-05 (add_or_remove, pld; 1 release, sampling rate 1)
        gamma 0.3891: the largest chance of a reconstruction, 0.1 without the release
    """
    if covariance is not None and information is None:
        raise ValueError("information must be given with covariance, got None")
    # Arguments are checked also where they are not used.
    _check_mechanism(noise_multiplier or 1.0, num_rounds, sampling_rate)
    _check_accounting(delta, sampling_rate, relation, accountant)
    if prior is not None:
        _check_prior(prior)
    lines = []
    if noise_multiplier is None:
        lines += ["no epsilon: the sensitivity is unbounded"]
    elif noise_multiplier == 0:
        lines += ["no epsilon: there is no noise"]
    else:
        rounds = {"num_rounds": num_rounds, "sampling_rate": sampling_rate}
        found = epsilon(noise_multiplier, delta=delta, relation=relation, accountant=accountant, **rounds)
        releases = f"{num_rounds} release{'s' if num_rounds > 1 else ''}, sampling rate {sampling_rate:g}"
        lines += [f"epsilon {found:.4g} at delta {delta:g} ({relation}, {accountant}; {releases})"]
        if prior is not None:
            gamma = reconstruction_robustness(noise_multiplier, prior=prior, **rounds)
            lines += [f"gamma {gamma:.4g}: the largest chance of a reconstruction, {prior:g} without the release"]
    if information is not None and covariance is not None:
        bound, alone = van_trees_bound(information, covariance), jnp.trace(covariance) / len(covariance)
        lines += [f"mean squared error >= {bound:.4g} (van Trees, every estimator; {alone:.4g} without the release)"]
    if information is not None:
        lines += [f"mean squared error >= {fisher_bound(information):.4g} (Fisher, unbiased estimators only)"]
    return lines


def _check_mechanism(noise_multiplier: float, num_rounds: int | float, sampling_rate: float) -> None:
    """Raises ValueError for a noise, a number of rounds or a sampling rate out of range."""
    _check.scalar(noise_multiplier=noise_multiplier)
    _check.positive(noise_multiplier=noise_multiplier)
    _check.finite("noise_multiplier", noise_multiplier)
    if not 1e-50 <= noise_multiplier <= 1e50:
        raise ValueError(f"noise_multiplier must be from 1e-50 to 1e+50, got {noise_multiplier}")
    _check.integer(1, MAX_ROUNDS, num_rounds=num_rounds)
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"sampling_rate must be in (0, 1], got {sampling_rate}")


def _check_accounting(delta: float, sampling_rate: float, relation: str, accountant: str) -> None:
    """Raises ValueError for settings that no accountant can work with."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant must be one of {', '.join(ACCOUNTANTS)}, got {accountant!r}")
    if relation not in RELATIONS:
        raise ValueError(f"relation must be one of {', '.join(RELATIONS)}, got {relation!r}")
    if relation == "replace_one" and accountant == "rdp" and sampling_rate < 1:
        raise ValueError(f"accountant must be 'pld' for relation 'replace_one' with sampling, got {accountant!r}")


def _check_prior(prior: float) -> None:
    """Raises ValueError for a chance that is not in (0, 1)."""
    if not 0 < prior < 1:
        raise ValueError(f"prior must be in (0, 1), got {prior}")


def _losses(noise_multiplier: float, sampling_rate: float, relation: Any) -> Any | None:
    """Returns the privacy loss distribution of one sampled release.

    It is None where its losses are no floating-point numbers. Losses grow as the noise to the power -2, and so does the
    spacing of their grid, which would otherwise fill memory.
    """
    try:
        found = _dp_accounting().pld.privacy_loss_distribution.from_gaussian_mechanism(
            noise_multiplier,
            sampling_prob=sampling_rate,
            value_discretization_interval=1e-4 * max(1.0, (0.3 / noise_multiplier) ** 2),
            neighboring_relation=relation,
        )
    except (OverflowError, ZeroDivisionError):
        return None
    # A sparse distribution would compute the size of its composition, an integer of as many digits as there are rounds.
    add = () if found._symmetric else (found._pmf_add.to_dense_pmf(),)
    return type(found)(found._pmf_remove.to_dense_pmf(), *add)


def _composable(losses: Any, num_rounds: int) -> bool:
    """Tells whether the distribution of that many releases is small enough to compute, by the bound of its tails."""
    from dp_accounting.pld import common

    sides = {id(side): side for side in (losses._pmf_remove, losses._pmf_add)}.values()
    bounds = (common.compute_self_convolve_bounds(side._probs, num_rounds, TAIL) for side in sides)
    return num_rounds == 1 or all(high - low <= MAX_LOSSES for low, high in bounds)


def _divergences(losses: Any, epsilons: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Computes the hockey-stick divergence at each of ascending epsilons.

    It is the accountant's own sum over the losses above epsilon, (1 - exp(epsilon - loss)) of each probability, without
    its Python loop over a million losses.
    """
    values = (np.arange(losses.size) + losses._lower_loss) * losses._discretization
    above = values > epsilons[0]
    values, probabilities = values[above], losses._probs[above]
    # Of the k largest losses, for each k: the probability of the release, and that of the noise alone.
    release = np.cumsum(np.append(losses._infinity_mass, probabilities[::-1]))
    noise = np.cumsum(np.append(0.0, (probabilities * np.exp(-values))[::-1]))
    count = len(values) - np.searchsorted(values, epsilons, side="right")
    return release[count] - np.exp(epsilons) * noise[count]


def _unresolved(name: str, value: int | float, what: str, relation: str) -> str:
    """Returns the error message for a value that the accountant "pld" cannot resolve with sampling."""
    other = ": accountant 'rdp' has no such limit" if relation == "add_or_remove" else ""
    return f"{name} must be {what} for accountant 'pld' with sampling, got {value}{other}"


def _dp_accounting() -> ModuleType:
    """Imports dp-accounting, or raises ImportError that names the extra to install."""
    try:
        import dp_accounting
        import dp_accounting.pld.privacy_loss_distribution
        import dp_accounting.rdp
    except ImportError as error:
        raise ImportError("accounting needs the extra 'privacy': pip install 'gia-jax[privacy]'") from error
    return dp_accounting
