"""What noise promises: epsilon, the largest chance of a reconstruction, and the least error of one.

Accounting is host work in NumPy. Every number is of the Gaussian mechanism on a sum of clipped gradients, with noise of
`noise_multiplier` times the clipping norm (`defenses.dp_sgd`); noise without clipping has none of them, but the error
bounds, which are of one known gradient function.
"""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import stats

from gia_jax import _check
from gia_jax.base import Batch, ClientFn, Params

ACCOUNTANTS = ("pld", "rdp")
RELATIONS = ("add_or_remove", "replace_one")


def epsilon(
    noise_multiplier: float,
    *,
    delta: float,
    num_rounds: int = 1,
    sampling_rate: float = 1.0,
    relation: str = "add_or_remove",
    accountant: str = "pld",
) -> float:
    """The epsilon of `num_rounds` releases, for data sets that differ in one example.

    Args:
        noise_multiplier: Standard deviation of the noise on the sum over the clipping norm, > 0.
        delta: In (0, 1).
        num_rounds: Releases, each with noise of its own.
        sampling_rate: The chance of each example to take part in a round, in (0, 1]. Below 1 it must be real Poisson
            sampling that the adversary does not see; a server that chose the cohort saw it.
        relation: How the data sets differ: "add_or_remove", one has an example more, or "replace_one", an example has
            another value, which moves the sum twice as far. The second is that of a batch whose size is known.
        accountant: "pld", privacy loss distributions (tight; without sampling their closed form, Balle and Wang,
            Improving the Gaussian Mechanism for Differential Privacy, ICML 2018), or "rdp", Renyi (an upper bound).

    Returns:
        Epsilon, as computed by the library dp-accounting.

    Raises:
        ValueError: If an argument is outside its range, or "replace_one" meets "rdp" and sampling.
        ImportError: If the extra `privacy` is not installed.

    Formal Guarantees:
        The releases together are (epsilon, delta)-differentially private under `relation`, if every round adds
        N(0, (noise_multiplier * norm)^2) to a sum of gradients clipped to `norm`.
    """
    _check_mechanism(noise_multiplier, num_rounds, sampling_rate)
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant must be one of {', '.join(ACCOUNTANTS)}, got {accountant!r}")
    if relation not in RELATIONS:
        raise ValueError(f"relation must be one of {', '.join(RELATIONS)}, got {relation!r}")
    replaces = relation == "replace_one"
    if replaces and accountant == "rdp" and sampling_rate < 1:
        raise ValueError(f"accountant must be 'pld' for relation 'replace_one' with sampling, got {accountant!r}")
    dp_accounting = _dp_accounting()
    if accountant == "pld" and sampling_rate == 1:
        shift = (2 if replaces else 1) * np.sqrt(num_rounds) / noise_multiplier
        return float(dp_accounting.get_epsilon_gaussian(1 / shift, delta))
    if accountant == "pld":
        relations = dp_accounting.NeighboringRelation
        relation_of = relations.REPLACE_ONE if replaces else relations.ADD_OR_REMOVE_ONE
        ledger = dp_accounting.pld.PLDAccountant(relation_of, _spacing(noise_multiplier))
    else:
        # This accountant takes any relation without sampling, and disregards it.
        noise_multiplier = noise_multiplier / 2 if replaces else noise_multiplier
        ledger = dp_accounting.rdp.RdpAccountant()
    release = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sampling_rate < 1:
        release = dp_accounting.PoissonSampledDpEvent(sampling_rate, release)
    return float(ledger.compose(dp_accounting.SelfComposedDpEvent(release, num_rounds)).get_epsilon(delta))


def reconstruction_robustness(
    noise_multiplier: float, *, prior: float, num_rounds: int = 1, sampling_rate: float = 1.0
) -> float:
    """The largest probability gamma that any attack, knowing every other example, reconstructs the one it is after.

    Hayes, Mahloujifar and Balle, Bounding Training Data Reconstruction in DP-SGD, NeurIPS 2023, theorem 2: gamma is the
    largest mu(E) of events E with nu(E) <= prior, nu the noise alone and mu the noise with the example. Without
    sampling it is Phi(Phi^-1(prior) + sqrt(num_rounds) / noise_multiplier). With sampling it is the minimum over e of
    prior exp(e) + delta(e), by duality (Neyman-Pearson), delta the hockey-stick divergence of mu from nu (not of nu
    from mu, which may be larger), composed over the rounds by FFT.

    Args:
        noise_multiplier: As for `epsilon`.
        prior: kappa in (0, 1), the chance of success without the release: 1 / n for n equally likely candidates.
        num_rounds: As for `epsilon`.
        sampling_rate: As for `epsilon`.

    Returns:
        Gamma in [prior, 1]. With sampling delta(e) is interpolated from above, between losses 1e-4 apart (farther below
        a `noise_multiplier` of 0.3): gamma is not below the exact value; for one round and 0.3 or more it was above by
        less than 1e-6.
        Without sampling, two candidates whose gradients are opposite and of full norm attain it; more do not.

    Raises:
        ValueError: If an argument is outside its range.
        ImportError: If the extra `privacy` is not installed, and `sampling_rate` is below 1.
    """
    _check_mechanism(noise_multiplier, num_rounds, sampling_rate)
    if not 0 < prior < 1:
        raise ValueError(f"prior must be in (0, 1), got {prior}")
    if sampling_rate == 1:
        return float(stats.norm.cdf(stats.norm.ppf(prior) + np.sqrt(num_rounds) / noise_multiplier))
    distribution = _dp_accounting().pld.privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sampling_rate, value_discretization_interval=_spacing(noise_multiplier)
    )
    # The distribution takes the larger of both directions; gamma is about the removal, mu against nu, alone.
    composed = type(distribution)(distribution._pmf_remove).self_compose(num_rounds)

    def least(low: float, high: float) -> tuple[float, float]:
        grid = np.linspace(low, high, 2_001)
        values = prior * np.exp(grid) + np.asarray(composed.get_delta_for_epsilon(grid))
        return float(grid[np.argmin(values)]), float(values.min())

    # The minimum is where exp(e) is a likelihood ratio; prior exp(e) <= 1 bounds it from above.
    highest = -float(np.log(prior))
    coarse, _ = least(-20.0, highest)
    width = (20 + highest) / 2_000
    return min(1.0, least(coarse - width, coarse + width)[1])


def fisher_information(
    client_fn: ClientFn, params: Params, batch: Batch, scale: float, *, batch_size: int | None = None
) -> Float[Array, "d d"]:
    """What an update with Gaussian noise says of its inputs: J^T J / scale^2, the mean over the examples of `batch`.

    Hannun, Guo and van der Maaten, Measuring Data Leakage in Machine-Learning Models with Fisher Information, UAI 2021,
    equation 3. J is the derivative of the update of a client that holds one example.

    Args:
        client_fn: `(params, batch) -> update` before the noise, with its clipping. It is called with one example.
        params: Parameters.
        batch: Examples, of d numbers each.
        scale: Standard deviation of the noise on the update, > 0.
        batch_size: Columns of J computed at once, of d; None: all.

    Returns:
        The matrix, in the units of the inputs to the power -2.

    Raises:
        ValueError: If `scale` is not positive.
    """
    _check.positive(scale=scale)
    shape = batch.inputs.shape[1:]
    directions = jnp.eye(int(np.prod(shape)), dtype=batch.inputs.dtype)

    def one(example: Batch) -> Float[Array, "d d"]:
        def update_of(inputs: Float[Array, "d"]) -> Float[Array, "p"]:
            update = client_fn(params, Batch(inputs.reshape(1, *shape), example.labels[None]))
            return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(update)])

        _, push = jax.linearize(update_of, example.inputs.ravel())
        columns = jax.lax.map(push, directions, batch_size=batch_size or len(directions))
        return columns @ columns.T / scale**2

    return jnp.mean(jax.lax.map(one, batch), 0)


def fisher_bound(information: Float[Array, "d d"]) -> Float[Array, ""]:
    """The least mean squared error per entry of UNBIASED estimators: d / trace(information).

    Hannun et al. 2021 (as above), 1 / eta^2. No ceiling for an attack with a prior, which is biased and may do better:
    see `van_trees_bound`.
    """
    return len(information) / jnp.trace(information)


def van_trees_bound(information: Float[Array, "d d"], covariance: Float[Array, "e e"]) -> float:
    """The least mean squared error per entry of EVERY estimator, for inputs drawn from a Gaussian of this covariance.

    Van Trees, Detection, Estimation, and Modulation Theory, 1968, section 2.4.3: trace((E[F] + covariance^-1)^-1) / d,
    here as trace((1 + covariance F)^-1 covariance) / d, which needs no inverse of a singular covariance. It is attained
    where the update is linear in the inputs. In float64: with little noise the matrix is too ill-conditioned for less.

    Args:
        information: E[F], the Fisher information averaged over the prior (`fisher_information` of many examples).
        covariance: Of the prior.

    Returns:
        The bound, in the units of the inputs squared.

    Raises:
        ValueError: If the shapes differ.
    """
    if information.shape != covariance.shape:
        raise ValueError(f"covariance must have the shape {information.shape} of information, got {covariance.shape}")
    known, prior = np.asarray(information, np.float64), np.asarray(covariance, np.float64)
    return float(np.trace(np.linalg.solve(np.eye(len(prior)) + prior @ known, prior)) / len(prior))


def privacy_lines(
    noise_multiplier: float | None,
    *,
    delta: float = 1e-5,
    num_rounds: int = 1,
    sampling_rate: float = 1.0,
    relation: str = "add_or_remove",
    accountant: str = "pld",
    prior: float | None = None,
    information: Float[Array, "d d"] | None = None,
    covariance: Float[Array, "e e"] | None = None,
) -> list[str]:
    """What belongs beside every epsilon, a line each: epsilon, gamma, and the bounds on the error of a reconstruction.

    Args:
        noise_multiplier: As for `epsilon`; 0 is clipping without noise, None is noise without clipping: neither has an
            epsilon or a gamma.
        delta: As for `epsilon`.
        num_rounds: As for `epsilon`.
        sampling_rate: As for `epsilon`.
        relation: As for `epsilon`.
        accountant: As for `epsilon`.
        prior: As for `reconstruction_robustness`; None leaves its line out.
        information: As for `van_trees_bound`, of all that is released together; None leaves out both bounds.
        covariance: As for `van_trees_bound`; None leaves out that bound.

    Returns:
        The lines. Errors are in the units of the inputs squared.

    Raises:
        ValueError: If an argument is outside its range, or there is a `covariance` without `information`.
        ImportError: If the extra `privacy` is not installed.
    """
    if covariance is not None and information is None:
        raise ValueError("information must be given with covariance, got None")
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


def _check_mechanism(noise_multiplier: float, num_rounds: int, sampling_rate: float) -> None:
    _check.positive(noise_multiplier=noise_multiplier, num_rounds=num_rounds)
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"sampling_rate must be in (0, 1], got {sampling_rate}")


def _spacing(noise_multiplier: float) -> float:
    """Between privacy losses, which grow as the noise to the power -2: a grid of the same spacing would fill memory."""
    return 1e-4 * max(1.0, (0.3 / noise_multiplier) ** 2)


def _dp_accounting() -> ModuleType:
    try:
        import dp_accounting
        import dp_accounting.pld.privacy_loss_distribution
        import dp_accounting.rdp
    except ImportError as error:
        raise ImportError("accounting needs the extra 'privacy': pip install 'gia-jax[privacy]'") from error
    return dp_accounting
