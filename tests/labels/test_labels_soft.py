"""Soft labels: exact with a bias, and without one for labels of few peaks; then the attack that uses them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax import Batch, Observation, ThreatModel, attacks, clients, defenses, labels, observe, run

HEAD = labels.dense("head")
CLASSES = 10


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def smoothed(generator, amount=0.1):
    return np.full(CLASSES, amount / CLASSES) + (1 - amount) * np.eye(CLASSES)[generator.integers(CLASSES)]


def mixed(generator):
    first, second = generator.choice(CLASSES, 2, replace=False)
    share = generator.uniform(0.1, 0.9)
    return share * np.eye(CLASSES)[first] + (1 - share) * np.eye(CLASSES)[second]


KINDS = {
    "hard": lambda generator: smoothed(generator, 0.0),
    "smoothed": smoothed,
    "mixed": mixed,
    "mixed, then smoothed": lambda generator: 0.9 * mixed(generator) + 0.1 / CLASSES,
}


def teacher(generator):
    return generator.dirichlet(np.ones(CLASSES))


def case(seed, kind, *, bias, positive=False, scale=0.2, dtype=float):
    """An observation of the last layer alone, and the label."""
    generator = np.random.default_rng(seed)
    features, truth = generator.normal(size=64), kind(generator)
    features = np.maximum(features, 0) if positive else features
    layer = {"kernel": scale * generator.normal(size=(64, CLASSES)), "bias": generator.normal(size=CLASSES)}
    error = softmax(features @ layer["kernel"] + (layer["bias"] if bias else 0)) - truth
    update = {"kernel": np.outer(features, error), "bias": error}
    names = ("kernel", "bias") if bias else ("kernel",)
    params, update = ({"head": {name: jnp.asarray(tree[name], dtype) for name in names}} for tree in (layer, update))
    return Observation(params, update, {"inputs_like": jnp.zeros((1, 3))}), truth


@functools.cache
def rule(num_peaks=2):
    return jax.jit(labels.soft_labels(HEAD, num_peaks=num_peaks))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-13), (jnp.float32, 1e-5)])
@pytest.mark.parametrize("positive", [False, True])
def test_with_a_bias_any_label_is_exact(x64, dtype, tolerance, positive):
    for seed in range(20):
        observation, truth = case(seed, teacher, bias=True, positive=positive, dtype=dtype)
        found = rule()(observation)
        assert found.shape == (1, CLASSES)
        assert found.dtype == dtype
        np.testing.assert_allclose(found[0], truth, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-12), (jnp.float32, 1e-4)])
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_bias_labels_of_two_peaks_are_exact_whatever_the_sign_of_the_features(x64, dtype, tolerance, kind):
    for seed in range(20):
        observation, truth = case(seed, KINDS[kind], bias=False, dtype=dtype)
        np.testing.assert_allclose(rule()(observation)[0], truth, atol=tolerance)


def test_one_peak_is_enough_for_smoothed_labels_and_too_few_for_mixed_ones(x64):
    for seed in range(10):
        observation, truth = case(seed, smoothed, bias=False)
        np.testing.assert_allclose(rule(1)(observation)[0], truth, atol=1e-12)
        observation, truth = case(seed, mixed, bias=False)
        assert np.isnan(rule(1)(observation)).all()  # it says so, and does not guess


def test_without_a_bias_no_label_is_returned_for_a_teachers(x64):
    found = [rule()(case(seed, teacher, bias=False)[0])[0] for seed in range(20)]
    assert np.mean(np.isnan(found)) > 0.9


def test_without_a_bias_a_network_that_is_sure_hides_the_scale_and_no_wrong_label_is_returned(x64):
    """Sure of the right class, by chance one in ten, or of any where the class that it is sure of may be a peak too."""
    hidden = {}
    for num_peaks in (1, 2):
        cases = [case(seed, smoothed, bias=False, scale=20.0) for seed in range(60)]
        found = np.stack([rule(num_peaks)(observation)[0] for observation, _ in cases])
        hidden[num_peaks] = np.isnan(found).any(1)
        told = ~hidden[num_peaks]
        np.testing.assert_allclose(found[told], np.stack([truth for _, truth in cases])[told], atol=1e-3)
    assert 2 <= hidden[1].sum() <= 20
    assert hidden[2].sum() > 30


def test_without_a_bias_a_little_noise_costs_a_little(x64):
    errors = []
    for seed in range(20):
        observation, truth = case(seed, mixed, bias=False)
        kernel = observation.update["head"]["kernel"]
        noise = 1e-3 * jnp.std(kernel) * jax.random.normal(jax.random.key(seed), kernel.shape)
        found = rule()(observation._replace(update={"head": {"kernel": kernel + noise}}))[0]
        errors.append(np.abs(found - truth).max())
    assert np.max(errors) < 0.02


def test_a_label_of_the_library_is_found_through_a_network_and_its_client(x64):
    """MixUp's own encoding, in front of a network whose head has features of both signs."""

    def apply_fn(params, inputs):
        return jnp.tanh(inputs @ params["body"]) @ params["head"]["kernel"]

    keys = jax.random.split(jax.random.key(0), 4)
    params = {"body": jax.random.normal(keys[0], (8, 16)), "head": {"kernel": jax.random.normal(keys[1], (16, 6))}}
    pair = Batch(jax.random.normal(keys[2], (2, 8)), jnp.array([1, 4]))
    encoded = jax.tree.map(lambda leaf: leaf[:1], defenses.mixup(6, k=2)(keys[3], pair))
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    seen = observe(jax.random.key(1), ThreatModel(), client_fn, params, encoded)
    found = rule()(seen)
    assert set(np.flatnonzero(found[0] > 0.1)) == {1, 4}
    np.testing.assert_allclose(found, encoded.labels, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_a_gradient_that_is_zero_or_not_finite_tells_nothing(bias):
    observation, _ = case(0, smoothed, bias=bias, dtype=jnp.float32)
    zero = observation._replace(update=jax.tree.map(jnp.zeros_like, observation.update))
    broken = observation._replace(update=jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), observation.update))
    lanes = jax.tree.map(lambda *leaves: jnp.stack(leaves), observation, zero, broken)
    found = jax.jit(jax.vmap(labels.soft_labels(HEAD)))(lanes)
    assert np.isnan(found[1:]).all()
    np.testing.assert_allclose(found[0], rule()(observation), atol=1e-5)
    assert np.isfinite(found[0]).all()


def test_half_precision_is_read_in_float32():
    observation, truth = case(0, smoothed, bias=True, dtype=jnp.bfloat16)
    found = rule()(observation)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[0], truth, atol=0.05)


def test_bad_inputs_are_named():
    observation, _ = case(0, smoothed, bias=True, dtype=jnp.float32)
    with pytest.raises(ValueError, match="soft_labels finds one label, got a batch of 2: use bias_counts"):
        labels.soft_labels(HEAD)(observation._replace(extra={"inputs_like": jnp.zeros((2, 3))}))
    with pytest.raises(ValueError, match="the threat model does not grant 'inputs_like'"):
        labels.soft_labels(HEAD)(observation._replace(extra={}))
    longer = observation._replace(update=jax.tree.map(lambda leaf: 9 * leaf, observation.update))
    with pytest.raises(ValueError, match="soft_labels needs the gradient of a mean loss"):
        labels.soft_labels(HEAD)(longer)
    assert np.isnan(rule()(longer)).all()
    without, _ = case(0, smoothed, bias=False, dtype=jnp.float32)
    with pytest.raises(ValueError, match="num_peaks must be at most the number of classes less 3, 7, got 8"):
        labels.soft_labels(HEAD, num_peaks=8)(without)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_peaks": 0}, "num_peaks must be an integer of at least 1, got 0"),
        ({"least_error": 0.0}, r"least_error must be in \(0, 1\), got 0.0"),
        ({"least_error": 1.0}, r"least_error must be in \(0, 1\), got 1.0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        labels.soft_labels(HEAD, **settings)


def test_an_attack_with_the_labels_found_is_that_with_the_true_ones_and_hard_labels_are_worse():
    def apply_fn(params, inputs):
        hidden = jax.nn.sigmoid(inputs.reshape(len(inputs), -1) @ params["body"])
        return hidden @ params["head"]["kernel"] + params["head"]["bias"]

    keys = jax.random.split(jax.random.key(0), 3)
    head = {"kernel": jax.random.normal(keys[1], (24, CLASSES)), "bias": jnp.zeros(CLASSES)}
    params = {"body": jax.random.normal(keys[0], (16, 24)), "head": head}
    truth = Batch(jax.random.uniform(keys[2], (1, 4, 4, 1)), jnp.asarray(mixed(np.random.default_rng(1)))[None])
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    seen = observe(jax.random.key(3), ThreatModel(labels=True), client_fn, params, truth)
    blind = seen._replace(extra={"inputs_like": seen.extra["inputs_like"]})

    def error(label_fn, observation):
        attack = attacks.inverting_gradients(
            client_fn, bounds=(0.0, 1.0), num_steps=400, total_variation_weight=0.0, label_fn=label_fn
        )
        found = jax.jit(lambda key, seen: run(attack, key, seen)[0])(jax.random.key(4), observation)
        return float(jnp.sqrt(jnp.mean(jnp.square(found.batch.inputs - truth.inputs))))

    known = error(lambda observation: observation.extra["labels"], seen)
    soft = error(labels.soft_labels(HEAD), blind)
    hard = error(lambda observation: jnp.argmax(labels.soft_labels(HEAD)(observation), 1), blind)
    assert known < 0.02
    assert soft == pytest.approx(known, abs=2e-3)
    assert hard > 5 * soft
