"""LLG and LLG+ on the gradients they are made for, and on those they are not."""

import jax.numpy as jnp
import numpy as np
import pytest
from untrained import CLIENT, HEAD, START, draws_of, mean_overlaps

from gia_jax import Observation, labels


def last_layer(features, probabilities, truth):
    size, classes = probabilities.shape
    kernel = features.T @ (probabilities - np.eye(classes)[truth]) / size
    update = {"head": {"kernel": jnp.asarray(kernel, jnp.float32)}}
    return Observation({}, update, {"inputs_like": jnp.zeros((size, 12))})


@pytest.fixture(scope="module")
def draws():
    return draws_of({"llg": labels.llg(HEAD), "llg_plus": labels.llg_plus(CLIENT, HEAD)})


def test_few_distinct_labels_in_an_untrained_network_are_found(draws):
    generator = np.random.default_rng(0)
    truths = np.stack([generator.permutation(10)[:4] for _ in range(20)])
    assert mean_overlaps(draws, truths) == {"llg": 1, "llg_plus": 1}


def test_more_images_than_classes_need_the_measured_offsets(draws):
    shares = mean_overlaps(draws, np.random.default_rng(1).integers(0, 10, (20, 40)))
    assert shares["llg_plus"] > 0.8
    assert shares["llg"] < shares["llg_plus"] - 0.15


def test_llg_counts_duplicates_of_alike_examples():
    # 5 of 8 examples of class 2: G_2 is five times as negative, and each label given takes one part off.
    truth = np.array([2, 2, 2, 2, 2, 0, 1, 1])
    observation = last_layer(np.ones((8, 3)), np.full((8, 100), 0.01), truth)
    assert sorted(labels.llg(HEAD)(observation).tolist()) == sorted(truth)


def test_llg_fails_where_the_network_is_confident():
    # A class that is predicted for all inputs has a positive sum, although it occurs.
    confident = np.tile([0.9, 0.05, 0.05], (4, 1))
    found = labels.llg(HEAD)(last_layer(np.ones((4, 2)), confident, [0, 0, 0, 1]))
    assert sorted(found.tolist()) != [0, 0, 0, 1]


@pytest.mark.parametrize("rule", [labels.llg(HEAD), labels.llg_plus(CLIENT, HEAD)], ids=["llg", "llg_plus"])
def test_a_missing_batch_size_is_named(rule):
    with pytest.raises(ValueError, match="does not grant 'inputs_like'"):
        rule(Observation(START, START, {}))


def test_llg_plus_refuses_no_dummies():
    with pytest.raises(ValueError, match="num_dummies must be an integer of at least 1, got 0"):
        labels.llg_plus(CLIENT, HEAD, num_dummies=0)
