"""iLRG: its linear system in closed form, and how well posed it is."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gia_jax import Observation, labels

HEAD = labels.dense("head")


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def observed(features, truth, kernel, bias):
    """What a client with these features shares of its last layer."""
    errors = (softmax(features @ kernel + bias) - np.eye(len(bias))[truth]) / len(truth)
    update = {"head": {"kernel": jnp.asarray(features.T @ errors), "bias": jnp.asarray(errors.sum(0))}}
    params = {"head": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}
    return Observation(params, update, {"inputs_like": jnp.zeros((len(truth), 2))})


def layer(seed, scale, classes=10, width=6):
    generator = np.random.default_rng(seed)
    return scale * generator.normal(size=(width, classes)), scale * generator.normal(size=classes), generator


@pytest.mark.parametrize("size", [1, 8, 40, 200])
@pytest.mark.parametrize("scale", [0.05, 0.5])
def test_exact_where_all_features_are_alike(x64, size, scale):
    kernel, bias, generator = layer(size, scale)
    truth = generator.integers(0, 10, size)
    features = np.tile(np.abs(generator.normal(size=6)), (size, 1))
    observation = observed(features, truth, kernel, bias)
    counts, _ = labels.ilrg_system(HEAD, observation)
    np.testing.assert_allclose(counts, np.bincount(truth, minlength=10), atol=1e-6)
    assert sorted(labels.ilrg(HEAD)(observation).tolist()) == sorted(truth.tolist())


def test_features_alike_within_a_class_are_not_enough(x64):
    kernel, bias, generator = layer(0, 0.3)
    truth = generator.integers(0, 10, 40)
    features = np.abs(generator.normal(size=(10, 6)))[truth]
    counts, _ = labels.ilrg_system(HEAD, observed(features, truth, kernel, bias))
    assert np.abs(np.asarray(counts) - np.bincount(truth, minlength=10)).max() > 0.5


def test_few_labels_in_an_untrained_network_are_found(x64):
    for seed in range(20):
        kernel, bias, generator = layer(seed, 0.02, classes=20)
        truth = generator.integers(0, 20, 6)
        features = np.abs(generator.normal(size=(6, 6)))
        found = labels.ilrg(HEAD)(observed(features, truth, kernel, bias))
        assert sorted(found.tolist()) == sorted(truth.tolist())


@settings(derandomize=True, max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_counts_always_sum_to_the_batch(seed):
    kernel, bias, generator = layer(seed, 0.5, classes=6)
    truth = generator.integers(0, 6, 12)
    observation = observed(np.abs(generator.normal(size=(12, 6))), truth, kernel, bias)
    assert labels.ilrg(HEAD)(observation).shape == (12,)


def test_the_condition_grows_with_the_networks_confidence(x64):
    conditions, truth = [], np.array([0, 0, 0, 1, 1, 2])
    for scale in (0.1, 1.0, 10.0):
        # Class c has a feature and a weight of its own: a network that has learned, more and more.
        observation = observed(np.eye(6)[truth], truth, scale * np.eye(6), np.zeros(6))
        _, condition = labels.ilrg_system(HEAD, observation)
        conditions.append(float(condition))
    assert conditions[0] < conditions[1] < conditions[2]
    assert conditions[2] > 1e3
    assert conditions[0] < 10


def test_vanishing_bias_gradients_do_no_harm(x64):
    # Class 2 has a bias gradient of exactly zero: its feature is 0 / 0.
    kernel, bias = np.zeros((2, 4)), np.zeros(4)
    truth = np.array([0, 0, 1, 2])
    observation = observed(np.ones((4, 2)), truth, kernel, bias)
    np.testing.assert_allclose(observation.update["head"]["bias"][2], 0, atol=1e-15)
    assert sorted(labels.ilrg(HEAD)(observation).tolist()) == truth.tolist()


def test_a_layer_without_bias_is_refused():
    params = {"head": {"kernel": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match="ilrg needs a bias in the last layer, got none"):
        labels.ilrg(HEAD)(Observation(params, params, {"inputs_like": jnp.zeros((1, 2))}))
