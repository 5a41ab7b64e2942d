"""The analytic inversion of a first layer that flattens its images in another order than their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax import Batch, Observation, attacks, clients, labels

SHAPE, FLATTEN = (4, 5, 3), (3, 4, 5)
IMAGES = jax.random.normal(jax.random.key(0), (1, *SHAPE))
KNOWN = {"inputs_like": jnp.zeros_like(IMAGES), "labels": jnp.array([1])}


def pytorchs(params, images):
    """A dense layer with PyTorch's weight, on images that are flattened with their channels first."""
    flat = jnp.moveaxis(images, -1, 1).reshape(len(images), -1)
    return flat @ params["fc"]["weight"].T + params["fc"]["bias"]


@pytest.fixture(scope="module")
def seen():
    params = {"fc": {"weight": jax.random.normal(jax.random.key(1), (6, 60)), "bias": jnp.zeros(6)}}
    update = clients.federated_sgd(clients.cross_entropy(pytorchs))(params, Batch(IMAGES, KNOWN["labels"]))
    return Observation(params, update, KNOWN)


def test_channels_that_are_flattened_first_come_back_last(seen):
    head = labels.dense("fc")
    found = attacks.linear_inversion(head, flatten=FLATTEN)(jax.random.key(0), seen)
    np.testing.assert_allclose(found.batch.inputs, IMAGES, atol=1e-4)
    scrambled = attacks.linear_inversion(head)(jax.random.key(0), seen)
    assert float(jnp.abs(scrambled.batch.inputs - IMAGES).max()) > 0.5


def test_the_order_must_be_that_of_the_example(seen):
    with pytest.raises(ValueError, match=r"flatten must be .* channels first, \(3, 4, 5\), got \(4, 5, 3\)"):
        attacks.linear_inversion(labels.dense("fc"), flatten=SHAPE)(jax.random.key(0), seen)
    with pytest.raises(ValueError, match="flatten must be an integer of at least 1, got 0"):
        attacks.linear_inversion(labels.dense("fc"), flatten=(0, 4, 5))
