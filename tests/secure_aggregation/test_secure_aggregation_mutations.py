"""Two thousand messages are changed: the run aborts or its sum is right, unless a client's own upload was changed."""

import collections
import dataclasses
import functools
import importlib
import random

import numpy as np
import pytest
from exchanges import modular, protocols, random_residues

from gia_jax import secure_aggregation as sa
from gia_jax.secure_aggregation.primitives import insecure_random
from gia_jax.secure_aggregation.protocol import SERVER
from gia_jax.secure_aggregation.wire import ByClient

secagg, light, he = (
    importlib.import_module(f"gia_jax.secure_aggregation.{name}") for name in ("secagg", "lightsecagg", "homomorphic")
)
pytestmark = pytest.mark.usefixtures("unchecked")
N, P = 4, 5
WIRES = (
    secagg.UnmaskRequest,
    secagg.UnmaskAnswer,
    secagg.Shares,
    secagg.Keys,
    he.Encrypted,
    he.EncryptedSum,
    light.Survivors,
    ByClient,
)
# A client's own update on its way, in the clear, masked or as a ciphertext that can be added: it has no tag.
UPLOADS = {"upload", "mask_input", "encrypt"}


@pytest.fixture
def cheap_ciphers(monkeypatch):
    """Uses one key for all runs, and computes once what is the same in all of them."""
    for scheme in ("bfv", "ckks", "paillier"):
        try:
            cipher = he.SCHEMES[scheme]()
        except ImportError:
            continue
        if scheme != "paillier":
            tenseal = importlib.import_module("tenseal")
            monkeypatch.setattr(tenseal, "context_from", functools.lru_cache(tenseal.context_from))
        key, encrypted, decrypt = cipher.generate(1024), {}, functools.lru_cache(cipher.decrypt)
        public = cipher.public(key)
        cheap = cipher._replace(
            generate=lambda bits, key=key: key,
            public=lambda key, public=public: public,
            encrypt=lambda key, vector, c=cipher, seen=encrypted: seen.setdefault(
                vector.tobytes(), seen.get(vector.tobytes()) or c.encrypt(key, vector)
            ),
            decrypt=lambda key, blocks, decrypt=decrypt: decrypt(key, tuple(blocks)),
        )
        monkeypatch.setitem(he.SCHEMES, scheme, lambda cheap=cheap: cheap)


def run(protocol, residues, seed, change):
    """The server after a run in which `change(messages so far, kind, sender, receiver, payload)` is what arrives.

    It gives from receiver to payload, or from sender to payload where the server receives.
    """
    randoms = [insecure_random(seed, party) for party in range(N + 1)]
    clients, server = protocol.make_clients(residues, randoms[:N]), protocol.make_server(P, randoms[N])
    messages, sent = dict.fromkeys(range(N), b""), []
    for number, server_round in enumerate(server.rounds):
        answers = {}
        for client, message in messages.items():
            if client < N:
                step = clients[client].rounds[number]
                answer = step(message)
                answers |= change(sent, step.__name__, client, SERVER, answer)
                sent.append((step.__name__, client, SERVER, answer))
        messages = {}
        for client, message in server_round(answers).items():
            messages |= change(sent, server_round.__name__, SERVER, client, message)
            sent.append((server_round.__name__, SERVER, client, message))
    return server, sent


def unchanged(sent, kind, sender, receiver, payload):
    return {receiver if sender == SERVER else sender: payload}


def bytewise(rng, payload):
    if not payload:
        return rng.randbytes(1)
    place = rng.randrange(len(payload)) if rng.random() < 0.5 else rng.randrange(min(len(payload), 40))
    return {
        "flip": lambda: payload[:place] + bytes([payload[place] ^ 1 << rng.randrange(8)]) + payload[place + 1 :],
        "byte": lambda: payload[:place] + rng.randbytes(1) + payload[place + 1 :],
        "cut": lambda: payload[:place],
        "extend": lambda: payload + rng.randbytes(rng.choice([1, 4, 33])),
        "insert": lambda: payload[:place] + rng.randbytes(4) + payload[place:],
        "empty": lambda: b"",
    }[rng.choice(["flip", "flip", "byte", "byte", "cut", "extend", "insert", "empty"])]()


def fieldwise(rng, payload):
    """Drops, renames, exchanges or adds entries in one field of a message."""
    for wire in WIRES:
        try:
            message = wire.from_bytes(payload)
        except ValueError:
            continue
        field = rng.choice(dataclasses.fields(wire)).name
        value = getattr(message, field)
        if isinstance(value, bytes):
            return dataclasses.replace(message, **{field: bytewise(rng, value)}).to_bytes()
        entries = dict(value) if not isinstance(value, tuple) else dict.fromkeys(value)
        other = rng.choice([*range(N), 77, 2**32 - 1])
        kind = rng.choice(["drop", "rename", "exchange", "add"])
        if entries and kind in ("drop", "rename"):
            held = entries.pop(rng.choice(list(entries)))
            entries |= {other: held} if kind == "rename" else {}
        elif kind == "exchange":
            contents = list(entries.values())
            entries = dict(zip(entries, contents[1:] + contents[:1]))
        else:
            entries |= {other: next(iter(entries.values()), b"")}
        changed = tuple(entries) if isinstance(value, tuple) else entries
        return dataclasses.replace(message, **{field: changed}).to_bytes()
    return bytewise(rng, payload)


def mutation(rng, place, kinds, old):
    """Makes a change of the message at one place: of its bytes or fields, or another message in its stead."""
    done = []

    def change(sent, kind, sender, receiver, payload):
        if len(sent) != place:
            return unchanged(sent, kind, sender, receiver, payload)
        name = rng.choice(kinds)
        earlier = [payload for *_, payload in sent] or [b""]
        alike = [m[3] for m in old if m[0] == kind and (m[1], m[2]) != (sender, receiver)] or [b""]
        changed = {
            "bytes": lambda: bytewise(rng, payload),
            "fields": lambda: fieldwise(rng, payload),
            "replay": lambda: rng.choice(earlier),
            "other client": lambda: rng.choice(alike),
            "other run": lambda: old[place][3],
            "lost": lambda: b"",
            "renamed": lambda: payload,
        }[name]()
        done.append((kind, sender))
        at = receiver if sender == SERVER else sender
        return {"lost": {}, "renamed": {77: changed}}.get(name, {at: changed})

    return change, done


KINDS = [
    "bytes",
    "bytes",
    "bytes",
    "fields",
    "fields",
    "fields",
    "replay",
    "other client",
    "other run",
    "lost",
    "renamed",
]
# By protocol, how it is made and how many messages of it are changed: 2,000 in all, fewer where a run takes longer.
COUNTS = {"plain_sum": 400, "secagg": 150, "secagg consistency": 130, "secagg neighbours": 180, "packed_shamir": 250}
MADE = {
    **{kind: (lambda kind=kind: protocols(N)[kind], COUNTS.get(kind, 200)) for kind in protocols(N)},
    "model_hashes": (lambda: sa.secagg(N, threshold=3, clip=1.0, model_hashes=[b"model"] * N), 130),
    "fft": (lambda: sa.fastsecagg(sa.fft_sharing((1, N), zeros=(0, 1), secrets=(1, 2)), clip=1.0), 200),
    "paillier": (lambda: sa.homomorphic(N, "paillier", clip=1.0, key_bits=1024), 312),
    "bfv": (lambda: sa.homomorphic(N, "bfv", clip=1.0), 24),
    "ckks": (lambda: sa.homomorphic(N, "ckks", clip=1.0), 24),
}


def outcome(protocol, residues, seed, change):
    """The reason why a run aborted, or else the server after it."""
    try:
        return None, run(protocol, residues, seed, change)[0]
    except sa.AggregationAborted as error:
        return str(error), None


@pytest.mark.parametrize("name", MADE)
def test_a_changed_message_ends_the_run_or_leaves_the_sum_right(name, cheap_ciphers):
    if name in ("bfv", "ckks"):
        pytest.importorskip("tenseal")
    make, count = MADE[name]
    protocol, rng = make(), random.Random(name)
    residues = random_residues(np.random.default_rng(0), protocol, P)
    server, _ = run(protocol, residues, 0, unchanged)
    np.testing.assert_array_equal(server.total, modular(residues, protocol.quantizer.modulus))
    _, old = run(protocol, residues[::-1].copy(), 1, unchanged)
    outcomes = collections.Counter()
    for seed in range(count):
        change, done = mutation(rng, rng.randrange(len(old)), KINDS, old)
        ended, server = outcome(protocol, residues, 2 + seed, change)
        if ended is not None:
            assert ended.strip()
            assert "\n" not in ended
            outcomes["aborted"] += 1
            continue
        ((kind, sender),) = done
        contributors = residues[list(server.contributors)]
        if np.array_equal(server.total, modular(contributors, protocol.quantizer.modulus)):
            outcomes["right"] += 1
            continue
        assert sender != SERVER
        assert kind in UPLOADS
        outcomes["wrong upload"] += 1
    assert outcomes.total() == count
    assert outcomes["aborted"] > count / 4
    # Boxes have tags: an upload that consists of them cannot change unnoticed.
    assert (outcomes["wrong upload"] > 0) == (name not in ("fft", "packed_shamir"))


def test_the_counts_are_two_thousand():
    assert sum(count for _, count in MADE.values()) == 2000
