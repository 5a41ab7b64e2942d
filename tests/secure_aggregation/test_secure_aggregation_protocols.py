"""What every protocol promises: the exact sum, over every subset of clients it is made for, or no sum at all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanges import fft, lenet_gradients, modular, parties, protocols, random_residues, runs_to
from hypothesis import given, settings
from hypothesis import strategies as st

from gia_jax import secure_aggregation as sa
from gia_jax.cli.names import make_protocol

KINDS = [*protocols(6)]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_the_sum_is_the_integer_sum(kind, data):
    n = data.draw(st.sampled_from([6, 10, 12] if kind == "fft" else [3, 4, 6, 9]))
    protocol = protocols(n)[kind]
    top = protocol.quantizer.modulus - 1
    length = data.draw(st.sampled_from([1, 2, 3, 7, 16, 101]))
    entries = st.sampled_from([0, 1, top // 2, top // 2 + 1, top]) | st.integers(0, top)
    drawn = data.draw(
        st.lists(entries, min_size=n * length, max_size=n * length) | entries.map(lambda e: [e] * n * length)
    )
    runs_to(protocol, np.array(drawn, np.uint32).reshape(n, length), {}, range(n))


@pytest.mark.parametrize("kind", KINDS)
def test_floats_come_back_as_their_sum(kind):
    protocol = protocols(6)[kind]
    updates = {
        "a": jax.random.normal(jax.random.key(0), (6, 2, 3)),
        "b": jax.random.normal(jax.random.key(1), (6, 1)) / 9,
    }
    clipped = jax.tree.map(lambda leaf: jnp.clip(leaf, -1, 1), updates)
    view = sa.aggregate(jax.random.key(2), protocol, updates)
    for found, leaf in zip(jax.tree.leaves(view.aggregate), jax.tree.leaves(clipped), strict=True):
        assert found.shape == leaf.shape[1:]
        np.testing.assert_allclose(found, leaf.sum(0), atol=6 / protocol.quantizer.scale + 1e-6)
    residues, _ = sa.quantized(jax.random.key(2), protocol, updates)
    np.testing.assert_array_equal(view.total, modular(residues, protocol.quantizer.modulus))


def test_protocols_agree_on_the_gradients_of_a_lenet():
    gradients = lenet_gradients()
    views = {name: sa.aggregate(jax.random.key(1), p, gradients) for name, p in protocols(10).items()}
    sums = {name: view.quantizer.decode(jnp.asarray(view.total)) for name, view in views.items()}
    assert len(sums["plain_sum"]) == 15_826
    # The same integers: the decoded sums are equal bit for bit, whatever the modulus.
    for name, found in sums.items():
        np.testing.assert_array_equal(found, sums["plain_sum"], err_msg=name)
    for leaf, exact in zip(jax.tree.leaves(views["secagg"].aggregate), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(leaf, jnp.clip(exact, -1, 1).sum(0), atol=1e-5)


def test_the_transform_sums_over_all_that_shared_and_names_unlucky_patterns():
    protocol = fft(12)  # 3 x 4, one row and one column of zeros: 6 unknowns, any 3 missing are corrected
    residues = random_residues(np.random.default_rng(0), protocol, 4)
    runs_to(protocol, residues, {0: 1, 7: 1, 5: 2}, set(range(12)) - {0, 7})
    with pytest.raises(sa.UnluckyDropouts, match="8 of 12 clients answered, but not in a pattern that decodes"):
        sa.aggregate_residues(protocol, residues, dropouts={0: 2, 1: 2, 4: 2, 5: 2})
    with pytest.raises(sa.AggregationAborted, match="only 5 clients answered with their sum of shares, threshold 6"):
        sa.aggregate_residues(protocol, residues, dropouts=dict.fromkeys(range(7), 2))


def test_neighbours_are_enough_for_the_sum_and_each_needs_its_own():
    protocol = sa.secagg(20, threshold=3, neighbours=6, clip=1.0)
    residues = random_residues(np.random.default_rng(0), protocol, 9)
    for seed in range(3):
        view = sa.aggregate_residues(protocol, residues, dropouts={3: 2, 4: 2, 5: 3}, insecure_seed=seed)
        np.testing.assert_array_equal(view.total, modular(residues[[*range(3), *range(5, 20)]], 2**32))
    boxes = [m for m in view.transcript if m.kind == "send_boxes"]
    assert max(len(m.payload) for m in boxes) < 6 * 120  # six boxes, not nineteen
    with pytest.raises(sa.AggregationAborted, match="threshold 3"):
        sa.aggregate_residues(protocol, residues, dropouts=dict.fromkeys(range(15), 2), insecure_seed=0)


def test_secrets_come_from_the_system_unless_a_seed_is_asked_for():
    protocol = sa.secagg(3, threshold=2, clip=1.0)
    residues = random_residues(np.random.default_rng(0), protocol, 8)
    run = functools.partial(sa.aggregate_residues, protocol, residues)
    assert run(insecure_seed=1).transcript == run(insecure_seed=1).transcript
    for other in (run(insecure_seed=2), run(), run()):
        assert not np.array_equal(run(insecure_seed=1).uploads[0], other.uploads[0])
    assert not np.array_equal(run().uploads[0], run().uploads[0])


@pytest.mark.parametrize("kind", [*protocols(6)])
def test_the_server_shares_no_object_with_a_client(kind):
    protocol = protocols(6)[kind]
    made, server = parties(protocol, random_residues(np.random.default_rng(0), protocol, 5))
    held = reachable(server)
    for client in made:
        assert not held & reachable(client)
    server.leak = [made[0]]  # the test notices one that does
    assert reachable(server) & reachable(made[0])


def reachable(party):
    """Ids of everything that can change, or is secret, and can be reached through attributes and containers."""
    found, left = set(), [party]
    while left:
        value = left.pop()
        if id(value) in found or isinstance(value, int | str | float | bytes | type | None):
            continue
        if callable(value) or isinstance(value, sa.Sharing):  # public settings, and methods
            continue
        found.add(id(value))
        left += value.values() if isinstance(value, dict) else []
        left += value if isinstance(value, list | tuple | set) else []
        left += list(vars(value).values()) if hasattr(value, "__dict__") else []
    return found


@pytest.mark.parametrize("name", ["plain", "secagg", "lightsecagg", "fastsecagg"])
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_protocols_by_name_bear_the_dropouts_they_promise(name, n):
    protocol = make_protocol(name, n, clip=1.0)
    residues = random_residues(np.random.default_rng(n), protocol, 4)
    runs_to(protocol, residues, {}, range(n))
    # In the round of the upload.
    number = {"plain": 0, "fastsecagg": 1}.get(name, 2)
    runs_to(protocol, residues, dict.fromkeys(range(n // 4), number), range(n // 4, n))


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"name must be one of plain, secagg, .* got 'sum'"):
        make_protocol("sum", 3, clip=1.0)


def test_bytes_are_those_of_the_formula():
    n, p = 5, 33
    transcript = sa.aggregate_residues(
        sa.secagg(n, threshold=3, clip=1.0), np.zeros((n, p), np.uint32), dropouts={4: 2}
    ).transcript
    sent = {(m.round, m.kind): len(m.payload) for m in transcript}
    box = 4 + 4 + 12 + 2 * 33 + 16  # receiver, length, nonce, two shares, tag
    keys = 4 + 32 + 4 + 32 + 4
    assert sent == {
        (0, "advertise_keys"): keys,
        (0, "send_keys"): 4 + n * (8 + keys),
        (1, "share_keys"): 4 + (n - 1) * box + 4 + 32,
        (1, "send_boxes"): 4 + (n - 1) * box,
        (2, "mask_input"): 4 * p,
        (2, "send_survivors"): 4 + 4 * 4 + 4 + 4 + 4,
        (3, "unmask"): 4 + 4 * (8 + 33) + 4 + (8 + 33),
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sa.secagg(5, threshold=6, clip=1.0), "threshold must be from 2 to 5, got 6"),
        (lambda: sa.secagg(5, threshold=1, clip=1.0), "threshold must be from 2 to 5, got 1"),
        (lambda: sa.secagg(5, threshold=2, neighbours=3, clip=1.0), "neighbours must be even"),
        (lambda: sa.secagg(5, threshold=4, neighbours=2, clip=1.0), "threshold must be from 2 to 3, got 4"),
        (lambda: sa.secagg(5, threshold=2, neighbours=2, consistency=True, clip=1.0), "consistency=True needs"),
        (lambda: sa.secagg(5, threshold=3, clip=1.0, bits=31), "bits must be small enough"),
        (lambda: sa.lightsecagg(5, privacy=3, survivors=3, clip=1.0), "got 3 and 3"),
        (lambda: sa.lightsecagg(5, privacy=3, survivors=6, clip=1.0), "got 3 and 6"),
        (lambda: sa.packed_shamir(5, num_secrets=3, privacy=3), r"got 3 \+ 3"),
        (
            lambda: sa.fft_sharing((2, 4), zeros=(0, 1), secrets=(1, 1)),
            r"grid must be two coprime numbers, got \(2, 4\)",
        ),
        (lambda: sa.fft_sharing((3, 4), zeros=(3, 0), secrets=(1, 1)), "zeros must be from"),
        (lambda: sa.fft_sharing((3, 4), zeros=(1, 1), secrets=(3, 1)), "secrets must be from"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_updates_are_named():
    protocol, key = sa.plain_sum(3, clip=1.0), jax.random.key(0)
    with pytest.raises(ValueError, match="leading axis of 3 clients, got float32"):
        sa.aggregate(key, protocol, {"w": jnp.zeros((4, 2))})
    with pytest.raises(ValueError, match="leading axis of 3 clients, got int32"):
        sa.aggregate(key, protocol, {"w": jnp.zeros((3, 2), int)})
    with pytest.raises(ValueError, match="at least one parameter"):
        sa.aggregate(key, protocol, {"w": jnp.zeros((3, 0))})
    for bad in (jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match="updates must be finite"):
            sa.aggregate(key, protocol, {"w": jnp.full((3, 2), bad)})
    with pytest.raises(ValueError, match="dropouts must name clients from 0 to 2, got 7"):
        sa.aggregate(key, protocol, {"w": jnp.zeros((3, 2))}, dropouts={7: 0})
    light = sa.lightsecagg(3, privacy=1, survivors=2, clip=1.0)
    with pytest.raises(ValueError, match="residues must be below 2147483647"):
        sa.aggregate_residues(light, np.full((3, 2), 2**31 - 1, np.uint32))
