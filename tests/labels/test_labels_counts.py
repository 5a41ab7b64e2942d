"""Counts from the last bias: exact where the softmax is known, nearly so in an untrained network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from untrained import APPLY, HEAD, draws_of, mean_overlaps, overlap

from gia_jax import Batch, Observation, ThreatModel, clients, labels, observe


def from_probabilities(probabilities, truth):
    """What a client of these predictions shares of its last bias."""
    size, classes = probabilities.shape
    bias = np.mean(probabilities - np.eye(classes)[truth], 0)
    update = {"head": {"kernel": jnp.zeros((2, classes)), "bias": jnp.asarray(bias, jnp.float32)}}
    return Observation({}, update, {"inputs_like": jnp.zeros((size, 2))})


@settings(derandomize=True, max_examples=25, deadline=None)
@given(truth=st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_bias_counts_are_exact_for_uniform_predictions(truth):
    uniform = np.full((len(truth), 5), 0.2)
    found = labels.bias_counts(HEAD)(from_probabilities(uniform, truth))
    assert sorted(found.tolist()) == sorted(truth)


@settings(derandomize=True, max_examples=20, deadline=None)
@given(truth=st.lists(st.integers(0, 4), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_bias_counts_are_exact_where_the_mean_prediction_is_known(truth, seed):
    mean = np.random.default_rng(seed).dirichlet(np.ones(5))
    observation = from_probabilities(np.tile(mean, (len(truth), 1)), truth)
    # A network that predicts the same for every input: the dummies then give the mean prediction itself.
    rule = labels.bias_counts(HEAD, apply_fn=lambda params, x: jnp.tile(jnp.log(mean), (x.shape[0], 1)), num_dummies=3)
    assert sorted(rule(observation).tolist()) == sorted(truth)


def test_bias_counts_are_exact_up_to_an_error_of_one_over_twice_the_batch():
    truth = [0, 0, 1, 2, 2, 2]
    for error, exact in ((0.9, True), (1.4, False)):
        mean = np.full(4, 0.25) + error / (2 * len(truth)) * np.array([1, -1, 1, -1])
        found = labels.bias_counts(HEAD)(from_probabilities(np.tile(mean, (len(truth), 1)), truth))
        assert (sorted(found.tolist()) == truth) == exact


def test_bias_counts_need_the_mean_prediction_of_a_trained_network():
    truth = np.arange(40) % 4
    confident = np.tile([0.85, 0.05, 0.05, 0.05], (40, 1))
    observation = from_probabilities(confident, truth)
    blind = labels.bias_counts(HEAD)(observation)
    logits = jnp.log(jnp.asarray(confident[0]))
    informed = labels.bias_counts(HEAD, apply_fn=lambda params, x: jnp.tile(logits, (x.shape[0], 1)))(observation)
    assert overlap(blind, truth) < 0.8
    assert overlap(informed, truth) == 1


def test_public_inputs_give_the_mean_prediction_where_random_ones_do_not():
    # The network's prediction depends on its input: random ones say nothing of the client's, which are all near 3.
    def apply_fn(params, x):
        return 4 * jnp.stack([x[:, 0], x[:, 1], -x[:, 0], -x[:, 1]], 1) / 3

    client = 3 + 0.1 * np.random.default_rng(0).normal(size=(40, 2))
    public = 3 + 0.1 * np.random.default_rng(1).normal(size=(200, 2))
    logits = np.asarray(apply_fn({}, jnp.asarray(client)))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = np.arange(40) % 4
    observation = from_probabilities(probabilities, truth)
    random = labels.bias_counts(HEAD, apply_fn=apply_fn)(observation)
    informed = labels.bias_counts(HEAD, apply_fn=apply_fn, public_inputs=jnp.asarray(public))(observation)
    assert overlap(random, truth) < 0.8
    assert overlap(informed, truth) > 0.97


@pytest.fixture(scope="module")
def draws():
    return draws_of(
        {
            "bias_counts": labels.bias_counts(HEAD),
            "with dummies": labels.bias_counts(HEAD, apply_fn=APPLY, num_dummies=64),
            "greedy_bias": labels.greedy_bias(HEAD),
        }
    )


def test_distinct_labels_in_an_untrained_network_are_found_by_every_rule(draws):
    generator = np.random.default_rng(0)
    truths = np.stack([generator.permutation(10)[:4] for _ in range(20)])
    assert mean_overlaps(draws, truths) == {"bias_counts": 1, "with dummies": 1, "greedy_bias": 1}


def test_more_images_than_classes(draws):
    shares = mean_overlaps(draws, np.random.default_rng(1).integers(0, 10, (20, 40)))
    assert shares["with dummies"] > 0.97
    assert shares["bias_counts"] > 0.85
    assert shares["greedy_bias"] < shares["bias_counts"] - 0.15  # the baseline does not count duplicates


def test_refusals_by_name():
    with pytest.raises(ValueError, match="num_dummies must be an integer of at least 1, got 0"):
        labels.bias_counts(HEAD, num_dummies=0)
    with pytest.raises(ValueError, match="apply_fn must be given with public_inputs, got None"):
        labels.bias_counts(HEAD, public_inputs=jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="num_public_inputs must be an integer of at least 1, got 0"):
        labels.bias_counts(HEAD, apply_fn=APPLY, public_inputs=jnp.zeros((0, 2)))
    no_bias = Observation({}, {"head": {"kernel": jnp.zeros((2, 3))}}, {"inputs_like": jnp.zeros((1, 2))})
    for name in ("bias_counts", "greedy_bias"):
        with pytest.raises(ValueError, match=f"{name} needs a bias in the last layer, got none"):
            getattr(labels, name)(HEAD)(no_bias)
        unsized = Observation({}, {"head": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}, {})
        with pytest.raises(ValueError, match="does not grant 'inputs_like'"):
            getattr(labels, name)(HEAD)(unsized)


STEPS = {"learning_rate": 0.3, "local_epochs": 6}


def linear(params, inputs):
    return inputs @ params["head"]["kernel"] + params["head"]["bias"]


def trained(inputs, truth, **steps):
    """What a client of a linear model shares after its local steps, from zeros."""
    params = {"head": {"kernel": jnp.zeros((2, 5)), "bias": jnp.zeros(5)}}
    client_fn = jax.jit(clients.federated_averaging(clients.cross_entropy(linear), **steps))
    return observe(jax.random.key(0), ThreatModel(), client_fn, params, Batch(inputs, jnp.asarray(truth)))


@pytest.mark.parametrize("truth", [[0, 0, 0, 1, 2, 2, 4, 4], [3] * 7 + [1]])
def test_interpolated_counts_follow_the_predictions_over_the_steps(truth):
    # All examples are alike, so that the public one is predicted as they are. Before the steps p is 1 / 5.
    inputs = jnp.ones((8, 2))
    observation = trained(inputs, truth, **STEPS)
    setting = {"apply_fn": linear, "learning_rate": 0.3, "num_steps": 6, "public_inputs": inputs[:1]}
    assert sorted(labels.interpolated_counts(HEAD, **setting)(observation).tolist()) == sorted(truth)
    assert sorted(labels.bias_counts(HEAD)(observation).tolist()) != sorted(truth)


def test_interpolated_counts_of_one_step_are_bias_counts():
    truth = [0, 1, 1, 4]
    observation = trained(
        jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32), truth, learning_rate=5.0
    )
    rule = labels.interpolated_counts(HEAD, apply_fn=linear, learning_rate=5.0, num_steps=1)
    plain = labels.bias_counts(HEAD, apply_fn=linear)
    np.testing.assert_array_equal(rule(observation), plain(observation))
    assert sorted(rule(observation).tolist()) == truth


def test_interpolated_counts_refuse_what_they_cannot_use():
    setting = {"apply_fn": linear, "learning_rate": 0.3, "num_steps": 6}
    for wrong, message in (
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"num_dummies": 0}, "num_dummies must be an integer of at least 1, got 0"),
        ({"public_inputs": jnp.zeros((0, 2))}, "num_public_inputs must be an integer of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            labels.interpolated_counts(HEAD, **(setting | wrong))
