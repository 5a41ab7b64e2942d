"""Accounting against published and closed values; the bounds against what attains them and what must not beat them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import integrate, stats

from gia_jax import Batch, clients, defenses, models
from gia_jax.metrics import epsilon, fisher_bound, fisher_information, reconstruction_robustness, van_trees_bound


@pytest.mark.parametrize(("accountant", "value"), [("pld", 1.828), ("rdp", 2.101)])
def test_epsilon_of_a_thousand_sampled_rounds(accountant, value):
    found = epsilon(1.0, delta=1e-5, num_rounds=1000, sampling_rate=0.01, accountant=accountant)
    assert found == pytest.approx(value, abs=6e-4)


def test_epsilon_of_one_release_is_the_closed_form():
    # Balle and Wang, ICML 2018, theorem 8: the exact delta of the Gaussian mechanism.
    found, sigma = epsilon(2.0, delta=1e-5), 2.0
    a, b = 1 / (2 * sigma) - found * sigma, -1 / (2 * sigma) - found * sigma
    delta = stats.norm.cdf(a) - np.exp(found) * stats.norm.cdf(b)
    assert delta == pytest.approx(1e-5, rel=1e-2)


@pytest.mark.parametrize(
    ("rounds", "sigma", "rate", "gamma"),
    [
        (1, 0.5, 1.0, 0.764),
        (1, 1.0, 1.0, 0.389),
        (1, 5.0, 1.0, 0.140),
        (100, 1.0, 0.01, 0.127),
        (1000, 1.0, 0.01, 0.194),
    ],
)
def test_gamma_for_ten_candidates(rounds, sigma, rate, gamma):
    found = reconstruction_robustness(sigma, prior=0.1, num_rounds=rounds, sampling_rate=rate)
    assert found == pytest.approx(gamma, abs=5e-4)


@pytest.mark.parametrize("prior", [0.1, 0.5, 0.9])
def test_gamma_by_convolution_tends_to_the_closed_form(prior):
    by_fft = reconstruction_robustness(1.0, prior=prior, num_rounds=2, sampling_rate=1 - 1e-9)
    assert by_fft == pytest.approx(reconstruction_robustness(1.0, prior=prior, num_rounds=2), abs=1e-4)


def likelihood_ratio_success(gradients, sigma, trials=40_000):
    """How often the candidate nearest to the noisy release is the right one: the best attack on equal priors."""
    rng = np.random.default_rng(0)
    truth = rng.integers(len(gradients), size=trials)
    released = gradients[truth] + sigma * rng.normal(size=(trials, gradients.shape[1]))
    scores = released @ gradients.T - 0.5 * np.sum(gradients**2, 1)
    return np.mean(np.argmax(scores, 1) == truth), 4 * np.sqrt(0.25 / trials)


def test_two_opposite_gradients_attain_gamma():
    success, interval = likelihood_ratio_success(np.array([[1.0], [-1.0]]), 1.0)
    assert success == pytest.approx(stats.norm.cdf(1.0), abs=interval)
    assert success == pytest.approx(reconstruction_robustness(1.0, prior=0.5), abs=interval)


def test_ten_orthogonal_gradients_attain_their_integral_and_stay_below_gamma():
    success, interval = likelihood_ratio_success(np.eye(10), 1.0)
    integral = integrate.quad(lambda t: stats.norm.pdf(t - 1) * stats.norm.cdf(t) ** 9, -8, 9)[0]
    assert success == pytest.approx(integral, abs=interval)
    assert success < reconstruction_robustness(1.0, prior=0.1) - interval


def test_clipped_gradients_never_exceed_gamma():
    # Ten gradients of a linear model, clipped; the release is their clipped value with noise of multiplier 1.
    gradients = np.array(jax.random.normal(jax.random.key(0), (10, 30)))
    clip = defenses.clip(1.0)
    clipped = np.stack([clip.update(jnp.asarray(g), clip.init(jnp.asarray(g)))[0] for g in gradients])
    success, interval = likelihood_ratio_success(clipped, 1.0)
    assert 0.1 < success < reconstruction_robustness(1.0, prior=0.1) + interval


def linear_client(matrix):
    """An update that is linear in the one input: matrix @ x."""
    return lambda params, batch: {"w": matrix @ batch.inputs[0]}


def test_the_bayes_estimate_attains_van_trees_and_beats_the_unbiased_bound():
    with jax.enable_x64(True):
        a, b, c = jax.random.split(jax.random.key(0), 3)
        matrix, root = jax.random.normal(a, (6, 4)), 0.3 * jax.random.normal(b, (4, 4))
        covariance, scale = root @ root.T, 1.5
        batch = Batch(jnp.zeros((2, 4)), jnp.zeros(2, int))
        information = fisher_information(linear_client(matrix), {}, batch, scale, batch_size=3)
        np.testing.assert_allclose(information, matrix.T @ matrix / scale**2, rtol=1e-10)
        truth = jax.random.normal(c, (20_000, 4)) @ root.T
        released = truth @ matrix.T + scale * jax.random.normal(jax.random.fold_in(c, 1), (20_000, 6))
        gain = covariance @ matrix.T @ jnp.linalg.inv(matrix @ covariance @ matrix.T + scale**2 * jnp.eye(6))
        bayes = jnp.mean((released @ gain.T - truth) ** 2)
        bound = van_trees_bound(information, covariance)
        np.testing.assert_allclose(bayes, bound, rtol=0.03)
        # So the bound for unbiased estimators is no ceiling; the unbiased one obeys it.
        unbiased = jnp.mean((released @ jnp.linalg.pinv(matrix).T - truth) ** 2)
        assert bayes < 0.8 * fisher_bound(information)
        assert unbiased > fisher_bound(information)
        assert bound <= jnp.trace(covariance) / 4


def test_van_trees_without_information_is_the_prior_and_takes_a_singular_one():
    covariance = jnp.diag(jnp.array([2.0, 0.0]))
    np.testing.assert_allclose(van_trees_bound(jnp.zeros((2, 2)), covariance), 1.0)
    np.testing.assert_allclose(van_trees_bound(jnp.eye(2), covariance), (1 / (1 + 1 / 2)) / 2, rtol=1e-6)


def test_information_of_a_network_is_that_of_its_jacobian():
    with jax.enable_x64(True):
        apply_fn, params = models.functional(models.MLP((5,), 3, hidden=(4,), rngs=nnx.Rngs(0)))
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
        batch = Batch(jax.random.normal(jax.random.key(0), (3, 5)), jnp.array([0, 1, 2]))
        expected = jnp.zeros((5, 5))
        for i in range(3):
            jacobian = jax.jacfwd(lambda x, i=i: client_fn(params, Batch(x[None], batch.labels[i : i + 1])))(
                batch.inputs[i]
            )
            rows = jnp.concatenate([leaf.reshape(-1, 5) for leaf in jax.tree.leaves(jacobian)])
            expected += rows.T @ rows / 3
        np.testing.assert_allclose(fisher_information(client_fn, params, batch, 1.0), expected, rtol=1e-8)


GOOD = {"noise_multiplier": 1.0, "delta": 1e-5, "num_rounds": 1, "sampling_rate": 1.0, "accountant": "pld"}


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("noise_multiplier", 0.0, "noise_multiplier must be positive, got 0.0"),
        ("num_rounds", 0, "num_rounds must be positive, got 0"),
        ("sampling_rate", 0.0, r"sampling_rate must be in \(0, 1\], got 0.0"),
        ("sampling_rate", 1.5, r"sampling_rate must be in \(0, 1\], got 1.5"),
        ("delta", 1.0, r"delta must be in \(0, 1\), got 1.0"),
        ("accountant", "gdp", "accountant must be one of pld, rdp, got 'gdp'"),
    ],
)
def test_bad_settings_of_epsilon_are_named(argument, value, message):
    with pytest.raises(ValueError, match=message):
        epsilon(**{**GOOD, argument: value})


@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_a_prior_that_is_no_chance_is_named(prior):
    with pytest.raises(ValueError, match=r"prior must be in \(0, 1\), got"):
        reconstruction_robustness(1.0, prior=prior)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"scale must be positive, got 0\.0"):
        fisher_information(linear_client(jnp.eye(2)), {}, Batch(jnp.zeros((1, 2)), jnp.zeros(1, int)), 0.0)
    with pytest.raises(ValueError, match=r"covariance must have the shape \(2, 2\) of information, got \(3, 3\)"):
        van_trees_bound(jnp.eye(2), jnp.eye(3))
