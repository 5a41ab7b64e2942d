"""Accounting against published and closed values; the bounds against what attains them and what must not beat them."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax_privacy import accounting
from scipy import integrate, stats

from gia_jax import Batch, clients, data, defenses, models
from gia_jax.metrics import epsilon, fisher_bound, fisher_information, reconstruction_robustness, van_trees_bound
from gia_jax.metrics.privacy import privacy_lines


@pytest.mark.parametrize(("accountant", "value"), [("pld", 1.828), ("rdp", 2.101)])
def test_epsilon_of_a_thousand_sampled_rounds(accountant, value):
    found = epsilon(1.0, delta=1e-5, num_rounds=1000, sampling_rate=0.01, accountant=accountant)
    assert found == pytest.approx(value, abs=6e-4)


def test_epsilon_is_jax_privacy_s():
    accountant = accounting.DpsgdTrainingAccountant(dp_accountant_config=accounting.PldAccountantConfig())
    settings = accounting.DpParams(noise_multipliers=1.0, num_samples=60_000, delta=1e-5, batch_size=600)
    theirs = accountant.compute_epsilon(num_updates=1_000, dp_params=settings)
    assert epsilon(1.0, delta=1e-5, num_rounds=1_000, sampling_rate=0.01) == pytest.approx(theirs, rel=1e-6)


def test_epsilon_of_one_release_is_the_closed_form():
    # Balle and Wang, ICML 2018, theorem 8: the exact delta of the Gaussian mechanism.
    for sigma in (2.0, 0.05):
        found = epsilon(sigma, delta=1e-5)
        a, b = 1 / (2 * sigma) - found * sigma, -1 / (2 * sigma) - found * sigma
        delta = stats.norm.cdf(a) - np.exp(found + stats.norm.logcdf(b))
        assert delta == pytest.approx(1e-5, rel=1e-6)


def test_epsilon_of_hardly_any_noise_fits_into_memory():
    rate, sigma = 0.01, 0.01
    found = epsilon(sigma, delta=1e-5, sampling_rate=rate)
    edge = 0.5 + sigma**2 * (found - np.log(rate))  # where the mixture's density is exp(epsilon) times the noise's
    delta = rate * stats.norm.sf((edge - 1) / sigma) - np.exp(found + stats.norm.logsf(edge / sigma))
    assert 0.9e-5 < delta <= 1e-5  # the accountant's grid errs on the safe side
    assert 0.9 < reconstruction_robustness(sigma, prior=0.1, num_rounds=1_000, sampling_rate=rate) <= 1


@pytest.mark.parametrize(("relation", "value"), [("add_or_remove", 4.377), ("replace_one", 9.997)])
def test_epsilon_depends_on_the_relation(relation, value):
    assert epsilon(1.0, delta=1e-5, relation=relation) == pytest.approx(value, abs=5e-4)


def test_replacing_is_the_addition_of_twice_the_norm_for_either_accountant():
    for accountant in ("pld", "rdp"):
        replaced = epsilon(2.0, delta=1e-5, num_rounds=3, relation="replace_one", accountant=accountant)
        assert replaced == pytest.approx(epsilon(1.0, delta=1e-5, num_rounds=3, accountant=accountant), rel=1e-6)


def test_epsilon_of_replacing_a_sampled_example_is_that_of_its_densities():
    rate, sigma = 0.1, 1.0
    found = epsilon(sigma, delta=1e-5, sampling_rate=rate, relation="replace_one")
    grid = np.linspace(-15, 15, 200_001)
    one, other = (
        rate * stats.norm.pdf(grid, at, sigma) + (1 - rate) * stats.norm.pdf(grid, 0, sigma) for at in (1, -1)
    )
    delta = np.trapezoid(np.maximum(one - np.exp(found) * other, 0), grid)
    assert delta == pytest.approx(1e-5, rel=1e-3)


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


@pytest.mark.parametrize(
    ("sigma", "rate", "prior", "gamma"), [(0.5, 0.5, 0.5, 0.7386), (1.0, 0.5, 0.9, 0.9444), (1.0, 0.5, 0.5, 0.6707)]
)
def test_gamma_of_one_sampled_release_is_the_closed_form(sigma, rate, prior, gamma):
    # The likelihood ratio of the mixture to the noise grows with the release: the best events are half lines.
    exact = (1 - rate) * prior + rate * stats.norm.cdf(stats.norm.ppf(prior) + 1 / sigma)
    assert exact == pytest.approx(gamma, abs=5e-5)
    found = reconstruction_robustness(sigma, prior=prior, sampling_rate=rate)
    assert exact - 1e-12 <= found <= exact + 1e-6


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


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_gradients_of_a_network_never_exceed_gamma(sigma):
    # One digit of each class; clipped to the norm of the smallest, so that all ten have the full norm.
    digits = data.digits()
    places = [int(np.argmax(digits.labels == label)) for label in range(10)]
    batch = Batch(jnp.asarray(digits.normalize(digits.images[places])), jnp.asarray(digits.labels[places]))
    apply_fn, params = models.functional(models.LeNet((8, 8, 1), 10, rngs=nnx.Rngs(0)))
    per_example = clients.per_example(clients.cross_entropy(apply_fn))(params, batch)
    gradients = np.concatenate([leaf.reshape(10, -1) for leaf in jax.tree.leaves(per_example)], 1, dtype=np.float64)
    norm = np.linalg.norm(gradients, axis=1).min()
    clip = defenses.clip(norm)
    clipped = np.stack([clip.update(jnp.asarray(g), clip.init(jnp.asarray(g)))[0] for g in gradients]) / norm
    np.testing.assert_allclose(np.linalg.norm(clipped, axis=1), 1, rtol=1e-5)
    # Noise across their span says nothing: ten coordinates are enough.
    success, interval = likelihood_ratio_success(np.linalg.qr(clipped.T)[1].T, sigma)
    assert 0.1 + interval < success < reconstruction_robustness(sigma, prior=0.1) + interval


def test_clipped_vectors_never_exceed_gamma():
    # Ten random directions, clipped; the release is their clipped value with noise of multiplier 1.
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


def test_van_trees_holds_for_little_noise_on_smooth_inputs():
    """Eight decades of variances and information far above them all: each adds its c / (1 + c f)."""
    variances, information = np.logspace(-8, 0, 60), 1e6
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(60, 60)))[0]
    covariance = jnp.asarray((rotation * variances) @ rotation.T, jnp.float32)
    expected = np.mean(variances / (1 + information * variances))
    bound = van_trees_bound(information * jnp.eye(60, dtype=jnp.float32), covariance)
    np.testing.assert_allclose(bound, expected, rtol=0.05)


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


def test_the_lines_beside_epsilon():
    covariance = jnp.diag(jnp.array([2.0, 0.0]))
    lines = privacy_lines(
        1.0, relation="replace_one", accountant="rdp", prior=0.1, information=jnp.eye(2), covariance=covariance
    )
    assert lines == [
        "epsilon 10.73 at delta 1e-05 (replace_one, rdp; 1 release, sampling rate 1)",
        "gamma 0.3891: the largest chance of a reconstruction, 0.1 without the release",
        "mean squared error >= 0.3333 (van Trees, every estimator; 1 without the release)",
        "mean squared error >= 1 (Fisher, unbiased estimators only)",
    ]
    # Only what there is: nothing is said of a prior or of an information that is not given.
    sampled = privacy_lines(1.0, num_rounds=1000, sampling_rate=0.01, accountant="rdp")
    assert sampled == ["epsilon 2.101 at delta 1e-05 (add_or_remove, rdp; 1000 releases, sampling rate 0.01)"]


def test_without_clipping_or_noise_there_is_no_epsilon_and_no_gamma():
    lines = privacy_lines(None, prior=0.1, information=jnp.eye(2))
    assert lines == [
        "no epsilon: the sensitivity is unbounded",
        "mean squared error >= 1 (Fisher, unbiased estimators only)",
    ]
    assert privacy_lines(0.0, prior=0.1) == ["no epsilon: there is no noise"]


GOOD = {"noise_multiplier": 1.0, "delta": 1e-5, "num_rounds": 1, "sampling_rate": 1.0, "accountant": "pld"}


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("noise_multiplier", 0.0, "noise_multiplier must be positive, got 0.0"),
        ("noise_multiplier", float("nan"), "noise_multiplier must be positive, got nan"),
        ("noise_multiplier", float("inf"), "noise_multiplier must be finite, got inf"),
        ("noise_multiplier", 1e-200, r"noise_multiplier must be from 1e-50 to 1e\+50, got 1e-200"),
        ("num_rounds", 0, "num_rounds must be an integer from 1 to 1000000000, got 0"),
        ("num_rounds", 1.5, "num_rounds must be an integer from 1 to 1000000000, got 1.5"),
        ("num_rounds", 10**10, "num_rounds must be an integer from 1 to 1000000000, got 10000000000"),
        ("delta", float("nan"), r"delta must be in \(0, 1\), got nan"),
        ("sampling_rate", 0.0, r"sampling_rate must be in \(0, 1\], got 0.0"),
        ("sampling_rate", 1.5, r"sampling_rate must be in \(0, 1\], got 1.5"),
        ("delta", 1.0, r"delta must be in \(0, 1\), got 1.0"),
        ("accountant", "gdp", "accountant must be one of pld, rdp, got 'gdp'"),
        ("relation", "zero_out", "relation must be one of add_or_remove, replace_one, got 'zero_out'"),
    ],
)
def test_bad_settings_of_epsilon_are_named(argument, value, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(epsilon)(**{**GOOD, argument: value})
    # They are refused also where they would not be used.
    if argument != "noise_multiplier":
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(privacy_lines)(**{**GOOD, argument: value, "noise_multiplier": None})


def test_replacing_sampled_examples_needs_the_tight_accountant():
    with pytest.raises(
        ValueError, match="accountant must be 'pld' for relation 'replace_one' with sampling, got 'rdp'"
    ):
        epsilon(1.0, delta=1e-5, sampling_rate=0.5, relation="replace_one", accountant="rdp")


@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_a_prior_that_is_no_chance_is_named(prior):
    with pytest.raises(ValueError, match=r"prior must be in \(0, 1\), got"):
        reconstruction_robustness(1.0, prior=prior)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"scale must be positive, got 0\.0"):
        fisher_information(linear_client(jnp.eye(2)), {}, Batch(jnp.zeros((1, 2)), jnp.zeros(1, int)), 0.0)
    with pytest.raises(ValueError, match=r"covariance must have the shape \(2, 2\) of information, got \(3, 3\)"):
        van_trees_bound(jnp.eye(2), jnp.eye(3))
    with pytest.raises(ValueError, match="information must be given with covariance, got None"):
        privacy_lines(None, covariance=jnp.eye(2))


def test_what_the_accountant_cannot_resolve_is_named():
    sampled = {"delta": 1e-5, "sampling_rate": 0.01}
    other = "for accountant 'pld' with sampling, got {}: accountant 'rdp' has no such limit"
    with pytest.raises(ValueError, match="delta must be larger " + other.format(1e-15)):
        epsilon(1.0, **(sampled | {"delta": 1e-15}))
    with pytest.raises(ValueError, match="num_rounds must be smaller " + other.format(10**9)):
        epsilon(1.0, num_rounds=10**9, **sampled)
    with pytest.raises(ValueError, match="noise_multiplier must be nearer to 1 " + other.format(1e-6)):
        epsilon(1e-6, **sampled)
    with pytest.raises(ValueError, match=r"delta must be larger for accountant 'pld' with sampling, got 1e-15$"):
        epsilon(1.0, **(sampled | {"delta": 1e-15, "relation": "replace_one"}))
    # The other accountant resolves all of these, and the first one many rounds where there is little to compose.
    rounds = {"num_rounds": 10**9, "sampling_rate": 1e-9, "delta": 1e-5}
    tight, loose = (epsilon(1.0, accountant=accountant, **rounds) for accountant in ("pld", "rdp"))
    assert 0 < tight < loose < 0.2
    assert 3 < epsilon(1.0, accountant="rdp", **(sampled | {"delta": 1e-15})) < 4
    assert 5e11 < epsilon(1e-6, accountant="rdp", **sampled) < 6e11
    assert epsilon(1.0, delta=1e-15) == pytest.approx(8.1656, abs=1e-3)


@pytest.mark.parametrize(
    ("sigma", "rounds", "rate", "prior"),
    [
        *((1e-6, 1000, rate, prior) for rate in (1e-9, 1.0) for prior in (1e-300, 0.1, 1 - 1e-12)),
        (1.0, 10**9, 1.0, 0.1),
        (1.0, 10**9, 0.01, 1e-300),
        *((1e6, 10**9, 1e-9, prior) for prior in (1e-300, 0.1, 1 - 1e-12)),
    ],
)
def test_gamma_of_extremes_is_a_chance_above_the_prior(prior, sigma, rounds, rate):
    gamma = reconstruction_robustness(sigma, prior=prior, num_rounds=rounds, sampling_rate=rate)
    sampled = -np.expm1(rounds * np.log1p(-rate)) if rate < 1 else 1.0
    assert prior <= gamma <= prior + sampled * (1 - prior) + 1e-12
    assert gamma <= max(prior, stats.norm.cdf(stats.norm.ppf(prior) + rounds**0.5 / sigma))
    if sigma == 1e-6:  # an example that is sampled is reconstructed for sure
        assert gamma == pytest.approx(prior + sampled * (1 - prior), rel=1e-9)


NO_MATRIX = [
    ([[1, 0], [0, jnp.nan]], "must be finite, got nan"),
    ([[1, 0], [0, -1e-3]], "must be positive semi-definite, got the eigenvalue -0.001"),
    ([[0, 1], [1, 0]], "must be positive semi-definite, got the eigenvalue -1"),
    ([[1, 1], [0, 1]], "must be symmetric, got entries that differ from those across by 1"),
]


@pytest.mark.parametrize(("matrix", "message"), NO_MATRIX)
def test_what_is_no_information_and_no_covariance_is_named(matrix, message):
    matrix, right = jnp.array(matrix, jnp.float32), jnp.eye(2)
    with pytest.raises(ValueError, match=f"information {message}"):
        van_trees_bound(matrix, right)
    with pytest.raises(ValueError, match=f"covariance {message}"):
        van_trees_bound(right, matrix)
    with pytest.raises(ValueError, match=f"information {message}"):
        fisher_bound(matrix)
    found = jax.jit(fisher_bound)(matrix)
    assert not jnp.isfinite(found)


def test_no_information_bounds_nothing_that_is_unbiased():
    assert jnp.isposinf(fisher_bound(jnp.zeros((3, 3))))
    assert jnp.isposinf(jax.jit(fisher_bound)(jnp.zeros((3, 3))))
    many = 300 * jnp.eye(300, dtype=jnp.float16)  # their sum is beyond float16
    assert float(fisher_bound(many)) == pytest.approx(1 / 300)
    assert van_trees_bound(many, jnp.eye(300)) == pytest.approx(1 / 301, rel=1e-6)
    with pytest.raises(ValueError, match=r"information must have shape \(d, d\) with d > 0, got \(0, 0\)"):
        fisher_bound(jnp.zeros((0, 0)))


def test_van_trees_takes_information_of_any_size():
    """A direction that is known exactly adds nothing to the bound; one of which nothing is known adds its variance."""
    for strength in (1e3, 1e20, 1e200):
        information = np.diag([strength, 0.0])
        covariance = np.array([[1.0, 0.5], [0.5, 2.0]])
        assert van_trees_bound(information, covariance) == pytest.approx((2 - 0.25) / 2, abs=1 / strength + 1e-9)
        # Beside it, a direction of little information still adds what it adds alone.
        beside = van_trees_bound(np.diag([strength, 1.0]), np.eye(2))
        assert beside == pytest.approx((1 / (1 + strength) + 0.5) / 2, rel=1e-9)


def test_information_in_half_precision_is_that_of_its_values():
    matrix = jnp.asarray(np.random.default_rng(0).integers(-4, 5, (600, 3)), jnp.float32)
    batch = Batch(jnp.ones((2, 3), jnp.bfloat16), jnp.zeros(2, int))
    found = fisher_information(linear_client(matrix.astype(jnp.bfloat16)), {}, batch, 0.5)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 4 * matrix.T @ matrix, rtol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scale": jnp.nan}, "scale must be positive, got nan"),
        ({"scale": jnp.inf}, "scale must be finite, got inf"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be an integer of at least 1, got 1.5"),
        ({"inputs": jnp.ones((1, 2), int)}, "batch.inputs must be of a floating type, got int32"),
        ({"inputs": jnp.full((1, 2), jnp.nan)}, "batch.inputs must be finite, got nan"),
        ({"inputs": jnp.ones((0, 2))}, r"batch.inputs must have shape \(b, \*d\) with b > 0"),
        ({"inputs": jnp.ones((2, 2))}, r"batch.labels must be 2, got the shape \(1,\)"),
        ({"inputs": jax.ShapeDtypeStruct((1, 10**7), jnp.float32)}, "batch.inputs must fit into memory"),
    ],
)
def test_arguments_of_the_information_are_named(changed, message):
    given = {"scale": 1.0, "inputs": jnp.ones((1, 2))} | changed

    def found(inputs):
        batch = Batch(inputs, jnp.zeros(1, int))
        options = {"batch_size": given["batch_size"]} if "batch_size" in given else {}
        return inspect.unwrap(fisher_information)(linear_client(jnp.eye(2)), {}, batch, given["scale"], **options)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(found, given["inputs"]) if isinstance(given["inputs"], jax.ShapeDtypeStruct) else found(
            given["inputs"]
        )
