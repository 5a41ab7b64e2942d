"""What parties refuse, that uploads are uniform, and that the tests notice a protocol that is broken."""

import dataclasses
import functools
import importlib
import itertools
import os
from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from exchanges import drive, modular, parties, random_residues
from scipy import stats

from gia_jax import secure_aggregation as sa
from gia_jax.secure_aggregation import shamir
from gia_jax.secure_aggregation.primitives import agree, insecure_random, keystream
from gia_jax.secure_aggregation.protocol import SERVER, to_bytes
from gia_jax.secure_aggregation.wire import ByClient

secagg = importlib.import_module("gia_jax.secure_aggregation.secagg")  # the functions have the same names
N, T, P = 5, 3, 64


def started(until=3):
    protocol = sa.secagg(N, threshold=T, clip=1.0)
    residues = random_residues(np.random.default_rng(0), protocol, P)
    clients, server = parties(protocol, residues)
    return clients, server, drive(clients, server, {4: 2}, until=until), residues


def request(**changes):
    return dataclasses.replace(secagg.UnmaskRequest((0, 1, 2, 3), (4,), {}), **changes).to_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropped": (3, 4)}, "client 3 is named as a survivor and as dropped"),
        ({"dropped": (0, 1, 2, 3, 4)}, "client 0 is named as a survivor and as dropped"),
        ({"survivors": (0, 1, 2, 3, 7)}, "client 7 shared no keys with client 0"),
        ({"survivors": (0, 1), "dropped": (2, 3, 4)}, "survivors must be 3 clients and the asked, got 2"),
        ({"survivors": (1, 2, 3), "dropped": (4,)}, "survivors must be 3 clients and the asked, got 3"),
        ({"survivors": (1, 2, 3), "dropped": (0, 4)}, "survivors must be 3 clients and the asked, got 3"),
    ],
)
def test_a_client_does_not_unmask_another(changes, message):
    clients, *_ = started()
    with pytest.raises(sa.AggregationAborted, match=message):
        clients[0].unmask(request(**changes))
    # After that it does not answer the honest question either; another client does.
    with pytest.raises(sa.AggregationAborted, match="client 0 answers each round once and in order: got unmask"):
        clients[0].unmask(request())
    answer = secagg.UnmaskAnswer.from_bytes(clients[1].unmask(request()))
    assert (set(answer.seeds), set(answer.keys)) == ({0, 1, 2, 3}, {4})


def late_upload(clients, server, pending):
    """The upload of client 4, which the server had declared dead, less the pair masks that it has recovered."""
    requests = server.send_survivors({client: clients[client].mask_input(pending[client]) for client in range(4)})
    answers = [secagg.UnmaskAnswer.from_bytes(clients[client].unmask(requests[client])) for client in range(4)]
    assert all(4 not in answer.seeds for answer in answers)
    secret = shamir.recombine({holder: answer.keys[4] for holder, answer in enumerate(answers)}, T)
    mask_key = X25519PrivateKey.from_private_bytes(secret)
    opened = np.frombuffer(clients[4].mask_input(pending[4]), "<u4")
    for peer in range(4):
        opened = opened + keystream(agree(mask_key, server._keys[peer].mask, b"mask"), P)
    return opened


def test_a_late_upload_stays_under_its_self_mask(monkeypatch):
    clients, server, pending, residues = started(until=2)
    opened = late_upload(clients, server, pending)
    assert not np.any(opened[:8] == residues[4, :8])
    np.testing.assert_array_equal(opened - keystream(clients[4]._seed, P), residues[4])
    # The mutant without self masks: its sum is right, and the late upload is open.
    clients, server, pending, residues = started(until=2)
    seeds = [client._seed for client in clients]
    monkeypatch.setattr(secagg, "keystream", lambda key, n: keystream(key, n) * np.uint32(key not in seeds))
    np.testing.assert_array_equal(late_upload(clients, server, pending), residues[4])


def test_keys_that_are_not_ones_own_or_repeated_are_refused():
    for change, message in [
        (lambda keys: {**keys, 0: keys[1]}, "keys that are not its own, or not distinct"),
        (lambda keys: {**keys, 2: keys[1]}, "keys that are not its own, or not distinct"),
        (lambda keys: {c: k for c, k in keys.items() if c < 2}, "client 0 got 2 keys, threshold 3"),
        (lambda keys: {c: k for c, k in keys.items() if c > 0}, "keys that are not its own"),
    ]:
        clients, _, pending, _ = started(until=1)
        keys = ByClient.from_bytes(pending[0]).contents
        with pytest.raises(sa.AggregationAborted, match=message):
            clients[0].share_keys(ByClient(change(dict(keys))).to_bytes())


def abort_of(alter, consistency=False, make=None, dropouts=None):
    protocol = sa.secagg(N, threshold=T, clip=1.0, consistency=consistency) if make is None else make()
    residues = random_residues(np.random.default_rng(1), protocol, P)
    clients, server = parties(protocol, residues)
    try:
        drive(clients, server, {4: 2} if dropouts is None else dropouts, alter=alter)
    except (sa.AggregationAborted, ValueError) as error:
        assert server.total is None
        return str(error)
    contributors = residues[list(server.contributors)]
    if np.array_equal(server.total, modular(contributors, protocol.quantizer.modulus)):
        return "the sum is right"
    return "the sum is wrong"


def honest(number, sender, receiver, payload):
    return payload


def test_the_honest_run_is_right():
    assert abort_of(honest) == abort_of(honest, consistency=True) == "the sum is right"


def flip(payload, place):
    return payload[:place] + bytes([payload[place] ^ 1]) + payload[place + 1 :]


@pytest.mark.parametrize(
    ("field", "message"),
    [("seeds", "the shares of client 0's seed do not fit"), ("keys", "the shares of client 4's mask key do not fit")],
)
def test_one_bit_of_a_share_stops_the_run(field, message):
    def alter(number, sender, receiver, payload):
        if (number, sender) != (3, 1):
            return payload
        answer = secagg.UnmaskAnswer.from_bytes(payload)
        held = {client: flip(share, 1) for client, share in getattr(answer, field).items()}
        return dataclasses.replace(answer, **{field: held}).to_bytes()

    assert message in abort_of(alter)


def test_a_flipped_bit_in_a_box_and_a_replayed_box_stop_the_run():
    def flipped(number, sender, receiver, payload):
        return flip(payload, 40) if (number, sender, receiver) == (1, SERVER, 2) else payload

    def replayed(number, sender, receiver, payload):
        if (number, sender, receiver) != (1, SERVER, 2):
            return payload
        boxes = dict(ByClient.from_bytes(payload).contents)
        return ByClient({**boxes, 0: boxes[1]}).to_bytes()

    assert "the box from client 0 to client 2 is not what was sealed" in abort_of(flipped)
    assert "the box from client 0 to client 2 is not what was sealed" in abort_of(replayed)


def test_boxes_of_another_run_stop_the_run():
    old = {}

    def record(number, sender, receiver, payload):
        if (number, sender) == (1, SERVER):
            old[receiver] = payload
        return payload

    assert abort_of(record) == "the sum is right"
    replay = lambda number, s, r, payload: old[r] if (number, s) == (1, SERVER) else payload  # noqa: E731
    assert "is not what was sealed" in abort_of(replay)
    for make in (
        lambda: sa.lightsecagg(N, privacy=2, survivors=3, clip=1.0),
        lambda: sa.fastsecagg(sa.packed_shamir(N, num_secrets=1, privacy=2), clip=1.0),
    ):
        assert abort_of(record, make=make) == "the sum is right"
        assert "is not what was sealed" in abort_of(replay, make=make)


@pytest.mark.parametrize("field", ["mask", "channel", "signature"])
def test_a_key_of_a_peer_that_the_server_changed_stops_both_before_they_mask(field):
    """This holds without signatures too: a mask of another key would not cancel, and the sum would be wrong."""
    protocol = sa.secagg(N, threshold=T, clip=1.0)
    clients, server = parties(protocol, random_residues(np.random.default_rng(0), protocol, P))
    pending = drive(clients, server, until=1)
    keys = dict(ByClient.from_bytes(pending[0]).contents)
    theirs = secagg.Keys.from_bytes(keys[1])
    keys[1] = dataclasses.replace(theirs, **{field: flip(getattr(theirs, field) or b"0", 0)}).to_bytes()
    pending[0] = ByClient(keys).to_bytes()
    boxes = server.send_boxes({client: clients[client].share_keys(pending[client]) for client in range(N)})
    with pytest.raises(sa.MalformedMessage, match="the box from client 1 to client 0 is not what was sealed"):
        clients[0].mask_input(boxes[0])
    with pytest.raises(sa.MalformedMessage, match="the box from client 0 to client 1 is not what was sealed"):
        clients[1].mask_input(boxes[1])


def test_boxes_that_are_missing_or_of_strangers_are_refused():
    for change, message in [
        (lambda boxes: {c: box for c, box in boxes.items() if c < 2}, "client 0 got 1 boxes, threshold 3"),
        (lambda boxes: {**boxes, 9: boxes[1]}, "client 0 has no channel to client 9, and got a box from it"),
        (lambda boxes: {**boxes, 1: b""}, "the box from client 1 to client 0 is not what was sealed"),
    ]:
        clients, _, pending, _ = started(until=2)
        boxes = ByClient.from_bytes(pending[0]).contents
        with pytest.raises(sa.AggregationAborted, match=message):
            clients[0].mask_input(ByClient(change(boxes)).to_bytes())

    def without_one(number, sender, receiver, payload):
        """Client 1 sends no box for client 0."""
        if (number, sender) != (1, 1):
            return payload
        shares = secagg.Shares.from_bytes(payload)
        boxes = {receiver: box for receiver, box in shares.boxes.items() if receiver}
        return dataclasses.replace(shares, boxes=boxes).to_bytes()

    assert abort_of(without_one) == "client 1 sent boxes for others than its peers"


SHARING = {
    "lightsecagg": lambda: sa.lightsecagg(N, privacy=1, survivors=3, clip=1.0),
    "packed_shamir": lambda: sa.fastsecagg(sa.packed_shamir(N, num_secrets=2, privacy=1), clip=1.0),
    "fft": lambda: sa.fastsecagg(sa.fft_sharing((1, N), zeros=(0, 1), secrets=(1, 2)), clip=1.0),
}


@pytest.mark.parametrize("kind", SHARING)
@pytest.mark.parametrize("word", [0, 7, 21])
def test_one_bit_of_a_sum_of_shares_stops_the_run(kind, word):
    def alter(number, sender, receiver, payload):
        last = 3 if kind == "lightsecagg" else 2
        return flip(payload, 4 * word) if (number, sender) == (last, 1) else payload

    assert abort_of(honest, make=SHARING[kind], dropouts={}) == "the sum is right"
    message = "the sums of shares are not of one sum of vectors"
    assert abort_of(alter, make=SHARING[kind], dropouts={}) == message


@pytest.mark.parametrize("kind", SHARING)
def test_different_contributors_for_one_client_stop_the_run(kind):
    def alter(number, sender, receiver, payload):
        if sender != SERVER or receiver != 1:
            return payload
        if kind == "lightsecagg" and number == 2:
            return importlib.import_module("gia_jax.secure_aggregation.lightsecagg").Survivors((0, 1, 2, 3)).to_bytes()
        if kind != "lightsecagg" and number == 1:
            return ByClient(dict(list(ByClient.from_bytes(payload).contents.items())[1:])).to_bytes()
        return payload

    message = "the sums of shares are not of one sum of vectors"
    assert abort_of(alter, make=SHARING[kind], dropouts={}) == message


@pytest.mark.parametrize("kind", SHARING)
def test_what_verifies_a_sum_is_linear_and_has_no_zero_coefficient(kind):
    sharing = importlib.import_module("gia_jax.secure_aggregation.sharing")
    prime, rng = SHARING[kind]().quantizer.modulus, np.random.default_rng(0)
    one, two = rng.integers(0, prime, (2, P), np.uint32)
    total = ((one.astype(np.uint64) + two) % prime).astype(np.uint32)
    parts = [int(sharing._combination(vector, prime)[0]) for vector in (one, two, total)]
    assert (parts[0] + parts[1]) % prime == parts[2]
    coefficients = [int(sharing._combination(row, prime)[0]) for row in np.eye(P, dtype=np.uint32)]
    assert all(coefficients)
    assert len(set(coefficients)) == P


def test_a_malformed_message_of_a_client_leaves_the_view_of_the_server():
    protocol = sa.plain_sum(3, clip=1.0)

    def make_clients(residues, randoms):
        return protocol.make_clients(residues[:, :3], randoms)

    with pytest.raises(sa.MalformedMessage, match="a vector must have 16 bytes, got 12") as caught:
        sa.aggregate_residues(protocol._replace(make_clients=make_clients), np.zeros((3, 4), np.uint32))
    assert caught.value.view.total is None
    assert [message.kind for message in caught.value.view.transcript] == ["upload"] * 3


@pytest.mark.parametrize(("threshold", "opens"), [(3, True), (4, False)])
def test_a_server_that_lies_needs_twice_the_threshold(threshold, opens):
    protocol = sa.secagg(6, threshold=threshold, clip=1.0)
    residues = random_residues(np.random.default_rng(0), protocol, P)
    clients, server = parties(protocol, residues)
    drive(clients, server, until=3)
    # To three clients it says that client 5 has dropped out, to the others that it has not.
    lie, truth = secagg.UnmaskRequest((0, 1, 2, 3, 4), (5,), {}), secagg.UnmaskRequest((0, 1, 2, 3, 4, 5), (), {})
    answers = [clients[c].unmask((lie if c < 3 else truth).to_bytes()) for c in range(6)]
    opened = [secagg.UnmaskAnswer.from_bytes(answer) for answer in answers]
    keys = {c: answer.keys[5] for c, answer in enumerate(opened) if 5 in answer.keys}
    seeds = {c: answer.seeds[5] for c, answer in enumerate(opened) if 5 in answer.seeds}
    assert (len(keys) >= threshold and len(seeds) >= threshold) == opens
    if opens:
        mask_key = X25519PrivateKey.from_private_bytes(shamir.recombine(keys, threshold))
        vector = server.uploads[5] - keystream(shamir.recombine(seeds, threshold), P)
        for peer in range(5):
            vector = vector + keystream(agree(mask_key, server._keys[peer].mask, b"mask"), P)
        np.testing.assert_array_equal(vector, residues[5])


def test_signed_survivors_show_that_a_server_tells_clients_different_stories():
    def alter(number, sender, receiver, payload):
        """To client 0 client 3 has dropped out as well."""
        if sender != SERVER or receiver != 0 or number not in (2, 3):
            return payload
        message = secagg.UnmaskRequest.from_bytes(payload)
        return dataclasses.replace(message, survivors=(0, 1, 2), dropped=(3, 4)).to_bytes()

    assert "the signature of client 1 is wrong" in abort_of(alter, consistency=True)

    def alter_once(number, sender, receiver, payload):
        return alter(number, sender, receiver, payload) if number == 2 else payload

    assert "client 0 signed other survivors" in abort_of(alter_once, consistency=True)


def test_a_key_that_the_server_swaps_needs_a_forged_signature():
    other = secagg.SecAggClient(1, np.zeros(P, np.uint32), os.urandom, threshold=T).advertise_keys(b"")

    def alter(number, sender, receiver, payload):
        if (number, sender, receiver) != (0, SERVER, 0):
            return payload
        keys = dict(ByClient.from_bytes(payload).contents)
        signature = secagg.Keys.from_bytes(keys[1]).signature
        keys[1] = dataclasses.replace(secagg.Keys.from_bytes(other), signature=signature).to_bytes()
        return ByClient(keys).to_bytes()

    assert "the signature of client 1 is wrong" in abort_of(alter, consistency=True)


def test_fewer_than_its_neighbours_never_cut_the_circle_in_two():
    def connected(peers, left):
        found, reached = set(), {min(left)}
        while reached - found:
            client = (reached - found).pop()
            found.add(client)
            reached |= peers[client] & left
        return reached == left

    k, everyone = 4, set(range(9))
    assert sa.secagg(9, threshold=5, neighbours=k, clip=1.0).collusion == k - 1
    peers = secagg.graph(insecure_random(0, 0), sorted(everyone), k)
    assert all(len(mine) == k + 1 and client in mine for client, mine in peers.items())
    assert all(client in peers[peer] for client in everyone for peer in peers[client])
    assert all(connected(peers, everyone - set(out)) for out in itertools.combinations(everyone, k - 1))
    assert not all(connected(peers, everyone - set(out)) for out in itertools.combinations(everyone, k))
    assert secagg.graph(insecure_random(1, 0), sorted(everyone), k) != peers


@pytest.mark.parametrize("kind", ["lightsecagg", "fastsecagg"])
def test_a_second_sum_of_shares_is_refused(kind):
    made = {
        "lightsecagg": sa.lightsecagg(N, privacy=1, survivors=3, clip=1.0),
        "fastsecagg": sa.fastsecagg(sa.packed_shamir(N, num_secrets=1, privacy=1), clip=1.0),
    }
    clients, server = parties(made[kind], random_residues(np.random.default_rng(0), made[kind], P))
    pending = drive(clients, server, until=-1)
    clients[0].sum_shares(pending[0])
    with pytest.raises(sa.AggregationAborted, match="client 0 answers each round once and in order: got sum_shares"):
        clients[0].sum_shares(pending[0])


def test_a_sum_over_too_few_is_refused():
    protocol = sa.lightsecagg(N, privacy=1, survivors=3, clip=1.0)
    clients, server = parties(protocol, random_residues(np.random.default_rng(0), protocol, P))
    drive(clients, server, until=-1)
    light = importlib.import_module("gia_jax.secure_aggregation.lightsecagg")
    with pytest.raises(sa.AggregationAborted, match="only 1 clients answered and are to be summed, threshold 3"):
        clients[0].sum_shares(light.Survivors((2,)).to_bytes())
    with pytest.raises(sa.AggregationAborted, match="client 9 shared nothing with client 1"):
        clients[1].sum_shares(light.Survivors((1, 2, 9)).to_bytes())


# Uploads of a fixed seed: the p-values are numbers, not luck.


def upload_p_values(make, vector, count=6):
    """The smallest p-value of three tests that a client's uploads are uniform: two bytes of each word, and the half."""
    protocol = make()
    residues = np.tile(vector, (protocol.quantizer.num_clients, 1)).astype(np.uint32)
    runs = [sa.aggregate_residues(protocol, residues, insecure_seed=seed) for seed in range(count)]
    uploads = np.stack([run.uploads[0] for run in runs])
    high_bytes = np.bincount((uploads >> 16).ravel() & 0xFF, minlength=256)
    low_bytes = np.bincount(uploads.ravel() & 0xFF, minlength=256)
    half = protocol.quantizer.modulus / 2
    signs = stats.binomtest(int((uploads > half).sum()), uploads.size).pvalue
    return min(stats.chisquare(high_bytes).pvalue, stats.chisquare(low_bytes).pvalue, signs)


VECTORS = {"zero": np.zeros(2000), "constant": np.full(2000, 12345), "small": np.arange(2000) % 50}
MASKED: dict[str, Callable[[], sa.AggregationProtocol]] = {
    "secagg": lambda: sa.secagg(4, threshold=2, clip=1.0),
    "secagg neighbours": lambda: sa.secagg(4, threshold=2, neighbours=2, clip=1.0),
    "lightsecagg": lambda: sa.lightsecagg(4, privacy=1, survivors=2, clip=1.0),
}


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("name", VECTORS)
def test_uploads_are_uniform(kind, name):
    assert upload_p_values(MASKED[kind], VECTORS[name]) > 1e-4


def test_uploads_are_not_uniform_without_masks():
    assert upload_p_values(lambda: sa.plain_sum(4, clip=1.0), VECTORS["small"]) < 1e-9


@functools.wraps(secagg.SecAggClient.mask_input)
def without_a_pair_mask(self, message, original=secagg.SecAggClient.mask_input):
    masked = np.frombuffer(original(self, message), "<u4")
    peer = min(self._held)
    mask = keystream(agree(self._mask_key, self._peers[peer], b"mask"), P)
    return to_bytes(masked - mask if self._client < peer else masked + mask)


@functools.wraps(secagg.SecAggClient.mask_input)
def with_one_sign(self, message, original=secagg.SecAggClient.mask_input):
    masked = np.frombuffer(original(self, message), "<u4")
    for peer in self._held:
        mask = keystream(agree(self._mask_key, self._peers[peer], b"mask"), P)
        masked = masked if self._client < peer else masked + mask + mask
    return to_bytes(masked)


@pytest.mark.parametrize("mutant", [without_a_pair_mask, with_one_sign])
def test_masks_that_do_not_cancel_are_noticed(mutant, monkeypatch):
    monkeypatch.setattr(secagg.SecAggClient, "mask_input", mutant)
    assert abort_of(honest) == "the sum is wrong"


def test_insecure_random_differs_between_parties_and_seeds():
    drawn = {insecure_random(seed, party)(16) for seed in range(3) for party in range(3)}
    assert len(drawn) == 9
    assert insecure_random(0, 0)(16) in drawn
