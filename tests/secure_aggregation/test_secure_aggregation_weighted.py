"""Weighted means through every protocol: exact, within the bound, and without the weights in the clear."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanges import protocols
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from gia_jax import Batch, clients, models
from gia_jax import secure_aggregation as sa
from gia_jax.secure_aggregation.quantization import RING

KEY, BITS = jax.random.key(0), 12
WEIGHTS = [1, 40, 7, 100, 13, 2]
UPDATES = {"a": jax.random.normal(KEY, (6, 2, 3)) / 2, "b": jax.random.normal(jax.random.key(1), (6, 1)) / 2}


def signed(protocol, updates):
    """Every client's integers, in Python's arithmetic."""
    modulus = protocol.quantizer.modulus
    residues, _ = sa.quantized(KEY, protocol, updates)
    return [[int(r) - modulus * (int(r) > modulus // 2) for r in row] for row in residues]


@pytest.mark.parametrize("kind", [*protocols(6)])
def test_the_sum_is_that_of_integers_times_weights(kind):
    protocol = protocols(6, bits=BITS)[kind]
    dropouts = {} if kind in ("plain_sum", "secagg neighbours") else {3: 1 if kind in ("fft", "packed_shamir") else 2}
    found = sa.weighted_mean(KEY, protocol, UPDATES, WEIGHTS, max_weight=100, dropouts=dropouts)
    left = [client for client in range(6) if client not in dropouts]
    assert found.total == sum(WEIGHTS[client] for client in left)
    integers = signed(protocol, UPDATES)
    sums = [sum(WEIGHTS[client] * integers[client][i] for client in left) for i in range(7)]
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found.mean)])
    np.testing.assert_allclose(flat, np.array(sums) / protocol.quantizer.scale / found.total, rtol=1e-6)
    for name, leaf in UPDATES.items():
        exact = np.average(np.clip(leaf, -1, 1)[jnp.array(left)], axis=0, weights=[WEIGHTS[client] for client in left])
        np.testing.assert_allclose(found.mean[name], exact, atol=1 / protocol.quantizer.scale)


@settings(deadline=None, max_examples=20)
@given(
    weights=st.lists(st.integers(1, 2**19), min_size=4, max_size=4),
    entries=st.lists(st.sampled_from([-1.0, 1.0, 0.0, 0.3]), min_size=4, max_size=4),
)
def test_the_sum_does_not_wrap_up_to_the_bound(weights, entries):
    # 4 clients of weight 2^19 and 11 bits: 2^21 (2^10 - 1) < 2^31.
    protocol = sa.plain_sum(4, clip=1.0, bits=11)
    updates = {"w": jnp.array(entries)[:, None]}
    found = sa.weighted_mean(KEY, protocol, updates, weights, max_weight=2**19)
    total = sum(weight * row[0] for weight, row in zip(weights, signed(protocol, updates), strict=True))
    assert found.total == sum(weights)
    np.testing.assert_allclose(found.mean["w"], [total / 1023 / sum(weights)], rtol=1e-6)


def test_the_bound_is_on_all_clients_of_the_largest_weight():
    protocol = sa.plain_sum(4, clip=1.0, bits=12)
    updates = {"w": jnp.zeros((4, 1))}
    largest = (RING - 1) // (2 * 4 * 2047)
    sa.weighted_mean(KEY, protocol, updates, [1, 1, 1, largest], max_weight=largest)
    with pytest.raises(ValueError, match="bits must be small enough for a sum of"):
        sa.weighted_mean(KEY, protocol, updates, [1] * 4, max_weight=largest + 1)


def test_weights_are_under_the_mask_and_equal_ones_are_the_plain_sum():
    protocol = sa.secagg(6, threshold=4, clip=1.0, bits=BITS)
    found = sa.weighted_mean(KEY, protocol, UPDATES, WEIGHTS, max_weight=100)
    # Masked, an entry is below any weight with probability 101 / 2^32.
    assert all(upload[0] > 100 for upload in found.view.uploads.values())
    clear = sa.weighted_mean(KEY, sa.plain_sum(6, clip=1.0, bits=BITS), UPDATES, WEIGHTS, max_weight=100)
    assert [int(upload[0]) for upload in clear.view.uploads.values()] == WEIGHTS
    same = sa.weighted_mean(KEY, protocol, UPDATES, [1] * 6, max_weight=1)
    total = sa.aggregate(KEY, protocol, UPDATES)
    assert same.total == 6
    for leaf, exact in zip(jax.tree.leaves(same.mean), jax.tree.leaves(total.aggregate), strict=True):
        np.testing.assert_allclose(leaf, exact / 6, rtol=1e-6)


def test_gradients_weighted_by_examples_are_the_gradient_of_all_examples():
    apply_fn, params = models.functional(models.MLP((4, 4, 1), num_classes=3, hidden=(5,), rngs=nnx.Rngs(0)))
    client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
    sizes = [1, 3, 3]
    inputs = jax.random.uniform(KEY, (7, 4, 4, 1))
    whole = Batch(inputs, jnp.arange(7) % 3)
    stops = np.cumsum([0, *sizes])
    parts = [jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], whole) for a, b in itertools.pairwise(stops)]
    updates = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[client_fn(params, part) for part in parts])
    protocol = sa.lightsecagg(3, privacy=1, survivors=2, clip=1.0, bits=24)
    found = sa.weighted_mean(KEY, protocol, updates, sizes, max_weight=8)
    assert found.total == 7
    for leaf, exact in zip(jax.tree.leaves(found.mean), jax.tree.leaves(client_fn(params, whole)), strict=True):
        np.testing.assert_allclose(leaf, exact, atol=1 / protocol.quantizer.scale + 1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2, 3], "weights must be 4, one for each client, got 3"),
        ([1, 2, 3, 0], r"weights must be integers from 1 to max_weight=9, got 0"),
        ([1, 2, 3, -1], r"got -1"),
        ([1, 2, 3, 10], r"got 10"),
        ([1, 2, 3, True], r"got True"),
    ],
)
def test_bad_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        sa.weighted_mean(KEY, sa.plain_sum(4, clip=1.0), {"w": jnp.zeros((4, 1))}, weights, max_weight=9)


def test_a_bad_bound_on_weights_is_named():
    with pytest.raises(ValueError, match="max_weight must be an integer of at least 1, got 0"):
        sa.weighted_mean(KEY, sa.plain_sum(2, clip=1.0), {"w": jnp.zeros((2, 1))}, [1, 1], max_weight=0)


def test_a_sum_that_the_server_does_not_learn_has_no_mean():
    protocol = sa.homomorphic(2, "paillier", clip=1.0, key_bits=1024, publish=False)
    with pytest.raises(ValueError, match="protocol must give the server the sum, got homomorphic paillier without"):
        sa.weighted_mean(KEY, protocol, {"w": jnp.zeros((2, 1))}, [1, 1], max_weight=2)
