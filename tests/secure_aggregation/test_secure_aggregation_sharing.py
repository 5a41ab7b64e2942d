"""Which coalitions learn something, decided by linear algebra over the field and by enumeration, not by formulas."""

import collections
import importlib
import itertools
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gia_jax import secure_aggregation as sa
from gia_jax.secure_aggregation import finite_field

fastsecagg = importlib.import_module("gia_jax.secure_aggregation.fastsecagg")  # the function has the same name


def rank(matrix, prime):
    """The rank modulo a prime, by elimination in Python integers."""
    rows, found = [[int(x) for x in row] for row in matrix], 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((r for r in range(found, len(rows)) if rows[r][column] % prime), None)
        if pivot is None:
            continue
        rows[found], rows[pivot] = rows[pivot], rows[found]
        inverse = pow(rows[found][column], -1, prime)
        for r in range(found + 1, len(rows)):
            factor = rows[r][column] * inverse % prime
            rows[r] = [(x - factor * y) % prime for x, y in zip(rows[r], rows[found])]
        found += 1
    return found


def element(values, prime):
    """The random bytes that `uniform` reads as these elements."""
    return (np.array(values, "<u4") << np.uint32(32 - prime.bit_length())).tobytes()


def generator(sharing, places):
    """The shares as a linear map of (secrets, random values), read from the code that shares.

    `places` says where the random values stand among those that it draws, so many in all.
    """
    positions, drawn = places
    columns = []
    for k in range(sharing.num_secrets + len(positions)):
        secrets = np.zeros((sharing.num_secrets, 1), np.uint32)
        values = np.zeros(drawn, int)
        if k < sharing.num_secrets:
            secrets[k] = 1
        else:
            values[positions[k - sharing.num_secrets]] = 1
        columns.append(sharing.share(lambda count, v=values: element(v, sharing.prime), secrets)[:, 0])
    return np.stack(columns, 1)


def learns(shares_map, num_secrets, coalition, prime):
    """Whether a coalition's shares depend on the secrets: their rank is above that of their random part."""
    held = shares_map[list(coalition)]
    return rank(held, prime) > rank(held[:, num_secrets:], prime)


@pytest.mark.parametrize(("n", "secrets", "privacy"), [(5, 2, 2), (6, 1, 4), (7, 3, 3), (7, 2, 1)])
def test_packed_shamir_hides_from_its_privacy_and_from_no_more(n, secrets, privacy):
    sharing = sa.packed_shamir(n, num_secrets=secrets, privacy=privacy)
    shares_map = generator(sharing, (range(privacy), privacy))
    for coalition in itertools.combinations(range(n), privacy):
        assert not learns(shares_map, secrets, coalition, sharing.prime)
        assert rank(shares_map[list(coalition)][:, secrets:], sharing.prime) == privacy
    assert all(learns(shares_map, secrets, c, sharing.prime) for c in itertools.combinations(range(n), privacy + 1))


@pytest.mark.parametrize(
    ("grid", "zeros", "secrets"),
    [
        ((3, 4), (1, 1), (1, 1)),
        ((3, 4), (0, 1), (2, 2)),
        ((3, 4), (1, 1), (1, 2)),
        ((3, 5), (1, 2), (1, 2)),
        ((4, 5), (1, 2), (2, 2)),
    ],
)
def test_the_smallest_coalition_that_learns_from_the_transform(grid, zeros, secrets):
    sharing = sa.fft_sharing(grid, zeros=zeros, secrets=secrets)
    (rows, columns), (a, b) = [n - d for n, d in zip(grid, zeros)], secrets
    random = [i * columns + j for i in range(rows) for j in range(columns) if i >= a or j >= b]
    shares_map = generator(sharing, (random, rows * columns))
    smallest = (rows - a + 1) * (columns - b + 1)
    assert sharing.privacy == smallest - 1

    def coalitions(size):
        return (
            learns(shares_map, a * b, c, sharing.prime) for c in itertools.combinations(range(len(shares_map)), size)
        )

    assert not any(coalitions(smallest - 1))
    assert any(coalitions(smallest))


def test_few_clients_and_a_small_field_every_random_value():
    # GF(13), 3 clients, 1 secret, 1 random value: a share alone is uniform for every secret.
    sharing = sa.packed_shamir(3, num_secrets=1, privacy=1, prime=13)
    seen = collections.defaultdict(collections.Counter)
    for secret, value in itertools.product(range(13), repeat=2):
        random = element([value], 13)
        shares = sharing.share(lambda count, random=random: random, np.array([[secret]], np.uint32))[:, 0]
        for client in range(3):
            seen[client, secret][int(shares[client])] += 1
        for pair in itertools.combinations(range(3), 2):
            assert sharing.recover({client: shares[client : client + 1] for client in pair})[0, 0] == secret
    assert all(counter == dict.fromkeys(range(13), 1) for counter in seen.values())


def test_the_transform_corrects_every_pattern_below_its_bound():
    sharing = sa.fft_sharing((3, 4), zeros=(1, 1), secrets=(1, 2))
    secrets = np.array([[5, 0, 7], [1, sharing.prime - 1, 2]], np.uint32)
    shares = dict(enumerate(sharing.share(os.urandom, secrets)))
    for missing in itertools.chain.from_iterable(itertools.combinations(range(12), k) for k in range(4)):
        held = {client: share for client, share in shares.items() if client not in missing}
        np.testing.assert_array_equal(sharing.recover(held), secrets)
    with pytest.raises(sa.UnluckyDropouts):
        sharing.recover({client: share for client, share in shares.items() if client not in (0, 1, 4, 5)})


def test_the_transform_is_a_discrete_fourier_transform():
    sharing = sa.fft_sharing((2, 3), zeros=(0, 0), secrets=(2, 3))
    secrets = np.array([[3], [1], [4], [1], [5], [9]], np.uint32)
    shares = sharing.share(os.urandom, secrets)[:, 0]
    prime = sharing.prime
    w0, w1 = finite_field.root_of_unity(2, prime), finite_field.root_of_unity(3, prime)
    for x, y in itertools.product(range(2), range(3)):
        expected = sum(
            int(secrets[3 * i + j, 0]) * pow(w0, x * i, prime) * pow(w1, y * j, prime)
            for i in range(2)
            for j in range(3)
        )
        assert shares[3 * x + y] == expected % prime
    # By the Chinese remainder theorem it is a transform of length 6: w0 w1 has that order.
    assert len({pow(w0 * w1, k, prime) for k in range(6)}) == 6


@pytest.mark.parametrize("mutant", ["one value too few in a line", "share changed"])
def test_the_other_scheme_is_an_oracle_that_notices_mutants(mutant, monkeypatch):
    schemes = [sa.fft_sharing((3, 4), zeros=(1, 1), secrets=(1, 2)), sa.packed_shamir(12, num_secrets=2, privacy=3)]
    secrets = np.arange(6, dtype=np.uint32).reshape(2, 3)
    shares = [scheme.share(os.urandom, secrets) for scheme in schemes]
    held = [dict(enumerate(one)) for one in shares]
    if mutant == "share changed":
        held[0][1] = (held[0][1] + 1) % schemes[0].prime
        del held[0][0], held[0][11]
    else:
        original = fastsecagg._correct
        monkeypatch.setattr(fastsecagg, "_correct", lambda v, k, points, size, p: original(v, k, points, size - 1, p))
        del held[0][0], held[0][1], held[0][4]
    recovered = [scheme.recover(one) for scheme, one in zip(schemes, held)]
    np.testing.assert_array_equal(recovered[1], secrets)
    assert not np.array_equal(recovered[0], recovered[1])


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 5), st.integers(1, 40), st.integers(1, 6),
    st.sampled_from([2**31 - 1, finite_field.prime_above_multiples(60)]), st.integers(0, 99),
)  # fmt: skip
def test_products_are_exact(a, b, c, prime, seed):
    rng = np.random.default_rng(seed)
    left, right = rng.integers(0, prime, (a, b), np.uint32), rng.integers(0, prime, (b, c), np.uint32)
    exact = left.astype(object) @ right.astype(object) % prime
    np.testing.assert_array_equal(finite_field.matmul(left, right, prime), exact.astype(np.uint32))


def test_the_largest_product_is_exact_and_a_longer_one_is_refused():
    prime = 2**31 - 1
    left, right = np.full((1, 2048), prime - 1, np.uint32), np.full((2048, 1), prime - 1, np.uint32)
    assert finite_field.matmul(left, right, prime)[0, 0] == 2048  # each product is (-1)^2
    with pytest.raises(ValueError, match="left must have at most 2048 columns, got 2049"):
        finite_field.matmul(np.zeros((1, 2049), np.uint32), np.zeros((2049, 1), np.uint32), prime)


@pytest.mark.parametrize("order", [6, 10, 15, 50, 63, 400])
def test_fields_have_the_roots_that_a_grid_needs(order):
    prime = finite_field.prime_above_multiples(order)
    assert prime < 2**31
    assert prime % order == 1
    assert all(prime % factor for factor in range(2, math.isqrt(prime) + 1))
    larger = range(prime + order, 2**31, order)
    assert all(any(p % factor == 0 for factor in range(2, math.isqrt(p) + 1)) for p in larger)
    root = finite_field.root_of_unity(order, prime)
    assert [k for k in range(1, order + 1) if pow(root, k, prime) == 1] == [order]
