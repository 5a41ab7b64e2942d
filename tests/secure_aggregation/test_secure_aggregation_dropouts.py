"""Who may drop out, and when: every subset of up to six clients in every round gives the exact sum, or none at all."""

import importlib
import itertools
import re

import numpy as np
import pytest
from exchanges import modular, random_residues, runs_to

from gia_jax import secure_aggregation as sa
from gia_jax.secure_aggregation.primitives import keystream

secagg = importlib.import_module("gia_jax.secure_aggregation.secagg")  # the function has the same name

LENGTH = 3
# By protocol: from the number of clients to the protocol; the round that decides who is in the sum; the last round.
MADE = {
    "secagg": (lambda n: sa.secagg(n, threshold=need(n), clip=1.0), 2, 3),
    "secagg consistency": (lambda n: sa.secagg(n, threshold=need(n), clip=1.0, consistency=True), 2, 4),
    "lightsecagg": (lambda n: sa.lightsecagg(n, privacy=need(n) - 1, survivors=need(n), clip=1.0), 2, 3),
    "packed_shamir": (
        lambda n: sa.fastsecagg(sa.packed_shamir(n, num_secrets=1, privacy=need(n) - 1), clip=1.0),
        1,
        2,
    ),
    "fft": (
        lambda n: sa.fastsecagg(sa.fft_sharing((1, n), zeros=(0, n - need(n)), secrets=(1, 1)), clip=1.0),
        1,
        2,
    ),
}


def need(n):
    return n // 2 + 1


def subsets(n):
    return itertools.chain.from_iterable(itertools.combinations(range(n), k) for k in range(n + 1))


# The consistency round is one more of the same kind: up to four clients, for the time it takes.
@pytest.mark.parametrize(
    ("kind", "n"), [(kind, n) for kind in MADE for n in range(2, 5 if kind == "secagg consistency" else 7)]
)
def test_every_subset_in_every_round(kind, n):
    make, _, last = MADE[kind]
    schedules = [dict.fromkeys(dropped, number) for number in range(last + 1) for dropped in subsets(n) if dropped]
    # Some before and some after it is decided who is in the sum.
    schedules += [{client: last - 1 + client % 2 for client in dropped} for dropped in subsets(n)]
    check(kind, make(n), schedules)


@pytest.mark.parametrize("kind", MADE)
def test_every_round_of_every_client(kind):
    make, _, last = MADE[kind]
    check(kind, make(3), [dict(enumerate(rounds)) for rounds in itertools.product(range(last + 2), repeat=3)])


def check(kind, protocol, schedules):
    """The outcome of every schedule, from the protocol's definition: half of the clients and one must answer."""
    n = protocol.quantizer.num_clients
    residues = random_residues(np.random.default_rng(n), protocol, LENGTH)
    sums = partial_sums(residues, protocol.quantizer.modulus)
    _, decided, last = MADE[kind]
    worked = 0
    for dropouts in schedules:
        alive = [[client for client in range(n) if dropouts.get(client, last + 1) > r] for r in range(last + 1)]
        if len(alive[last]) >= need(n):
            runs_to(protocol, residues, dropouts, alive[decided])
            worked += 1
        else:
            stops(protocol, residues, dropouts, sums)
    assert 0 < worked < len(schedules)


def stops(protocol, residues, dropouts, sums, error=r"only \d+ clients answered [a-z ]+, threshold \d+"):
    """The run ends with an error that says why and nothing else, and the server holds no sum."""
    with pytest.raises(sa.AggregationAborted) as caught:
        sa.aggregate_residues(protocol, residues, dropouts=dropouts)
    assert re.fullmatch(error, str(caught.value))
    assert caught.value.view.total is None
    assert caught.value.view.aggregate is None
    assert_no_sum_in(caught.value.view, sums)
    return caught.value


def partial_sums(vectors, modulus):
    """The sums over every subset of vectors, as they would travel."""
    return {
        modular(vectors[list(chosen)], modulus).astype("<u4").tobytes() for chosen in subsets(len(vectors)) if chosen
    }


def assert_no_sum_in(view, sums):
    """No sum over any clients travelled, nor is one the sum of what any clients sent in place of their updates."""
    travelled = b"".join(message.payload for message in view.transcript)
    assert not any(one in travelled for one in sums)
    uploads = [upload for upload in view.uploads.values() if isinstance(upload, np.ndarray)]
    if uploads:
        assert not sums & partial_sums(np.stack(uploads), view.quantizer.modulus)


def test_a_sum_that_travelled_or_is_that_of_the_uploads_is_noticed(monkeypatch):
    n = 4
    residues = random_residues(np.random.default_rng(0), sa.plain_sum(n, clip=1.0), LENGTH)
    sums = partial_sums(residues, 2**32)
    with pytest.raises(AssertionError):
        assert_no_sum_in(sa.aggregate_residues(sa.plain_sum(n, clip=1.0), residues), sums)
    # Without its own mask in every upload, the sum is there before anybody unmasks it.
    make, _, last = MADE["secagg"]
    dropouts = dict.fromkeys(range(2), last)
    stops(make(n), residues, dropouts, sums)
    calls = itertools.count()
    monkeypatch.setattr(secagg, "keystream", lambda key, count: keystream(key, count) * np.uint32(next(calls) % n > 0))
    with pytest.raises(AssertionError):
        stops(make(n), residues, dropouts, sums)


def test_at_the_threshold_it_works_and_one_below_it_stops():
    protocol = sa.secagg(12, threshold=7, clip=1.0)
    residues = random_residues(np.random.default_rng(0), protocol, 50)
    dropouts = {0: 2, 1: 2, 2: 3, 3: 3, 4: 3}
    runs_to(protocol, residues, dropouts, range(2, 12))
    error = "only 6 clients answered unmasking, threshold 7"
    stops(protocol, residues, dropouts | {5: 3}, partial_sums(residues, 2**32), error)


def test_every_subset_of_a_grid_of_two_rows_and_three_columns():
    """One column of zeros and no row: a row of shares with two of its three gives the third, and none helps another."""
    protocol = sa.fastsecagg(sa.fft_sharing((2, 3), zeros=(0, 1), secrets=(1, 1)), clip=1.0)
    residues = random_residues(np.random.default_rng(0), protocol, LENGTH)
    sums = partial_sums(residues, protocol.quantizer.modulus)
    for dropped in subsets(6):
        rows = [sum(client not in dropped for client in row) for row in (range(3), range(3, 6))]
        dropouts = dict.fromkeys(dropped, 2)
        if min(rows) >= 2:
            runs_to(protocol, residues, dropouts, range(6))
        elif sum(rows) >= 4:
            error = stops(
                protocol, residues, dropouts, sums, "4 of 6 clients answered, but not in a pattern that decodes"
            )
            assert isinstance(error, sa.UnluckyDropouts)
        else:
            stops(protocol, residues, dropouts, sums)
