"""Ciphertexts that the server adds. BFV and CKKS need tenseal, Paillier nothing."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanges import drive, lenet_gradients, modular, parties, random_residues

from gia_jax import secure_aggregation as sa
from gia_jax.secure_aggregation.homomorphic import SCHEMES, Encrypted, EncryptedSum

SCHEME_NAMES = ["bfv", "ckks", "paillier"]


def made(scheme, n=4, **options):
    if scheme != "paillier":
        pytest.importorskip("tenseal")
    return sa.homomorphic(n, scheme, clip=1.0, key_bits=1024, **options)


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
@pytest.mark.parametrize("length", [1, 50])
def test_the_sum_is_the_integer_sum(scheme, length):
    protocol = made(scheme)
    top = protocol.quantizer.modulus - 1
    residues = random_residues(np.random.default_rng(0), protocol, length)
    residues[:, 0] = [top, top // 2, top // 2 + 1, 0]
    view = sa.aggregate_residues(protocol, residues, dropouts={1: 0, 3: 1})
    assert view.contributors == (0, 2, 3)
    np.testing.assert_array_equal(view.total, modular(residues[[0, 2, 3]], top + 1))


def test_the_gradients_of_a_lenet_add_up_as_in_the_clear():
    pytest.importorskip("tenseal")
    gradients = jax.tree.map(lambda leaf: leaf[:2], lenet_gradients())
    found = {}
    for protocol in (sa.plain_sum(2, clip=1.0), made("bfv", 2), made("ckks", 2)):
        view = sa.aggregate(jax.random.key(1), protocol, gradients)
        found[protocol.name] = np.asarray(view.quantizer.decode(jnp.asarray(view.total)))
    assert found["plain_sum"].size == 15826
    np.testing.assert_array_equal(found["homomorphic bfv"], found["plain_sum"])
    np.testing.assert_array_equal(found["homomorphic ckks"], found["plain_sum"])


def test_packed_slots_hold_two_to_the_fifteenth_additions_and_not_one_more():
    cipher = SCHEMES["paillier"]()
    key = cipher.generate(1024)
    extreme = np.array([-1, 5, -(2**31), 2**31 - 1])  # -1 is the largest residue
    public, ciphertext = cipher.public(key), cipher.encrypt(key, extreme)[0]
    square = int.from_bytes(public, "little") ** 2

    def times(count):
        total = pow(int.from_bytes(ciphertext, "little"), count, square).to_bytes(2 * len(public), "little")
        return cipher.decrypt(key, [total])[:4] % 2**32

    np.testing.assert_array_equal(times(2**15), extreme * 2**15 % 2**32)
    assert not np.array_equal(times(2**15 + 1), extreme * (2**15 + 1) % 2**32)
    np.testing.assert_array_equal(cipher.decrypt(key, [cipher.add(public, [ciphertext] * 3)])[:4], extreme % 2**32 * 3)
    assert sa.homomorphic(2**15, "paillier", clip=1.0, bits=17).quantizer.num_clients == 2**15
    with pytest.raises(ValueError, match="num_clients must be at most 32768 with Paillier, got 32769"):
        sa.homomorphic(2**15 + 1, "paillier", clip=1.0, bits=16)


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_the_server_holds_ciphertext_and_one_colluder_opens_all(scheme):
    protocol = made(scheme, 3, publish=False)
    assert protocol.collusion == 0
    residues = random_residues(np.random.default_rng(1), protocol, 20)
    made_clients, server = parties(protocol, residues)
    drive(made_clients, server)
    assert server.total is None
    np.testing.assert_array_equal(made_clients[1].sum, modular(residues, protocol.quantizer.modulus))
    assert residues[0].tobytes() not in server.uploads[0]
    # Two encryptions of one vector differ.
    cipher, blocks = SCHEMES[scheme](), Encrypted.from_bytes(server.uploads[0]).blocks
    assert cipher.encrypt(made_clients[0]._key, residues[0].astype(np.int64))[0] != blocks[0]
    opened = cipher.decrypt(made_clients[2]._key, [blocks[i] for i in range(len(blocks))])[:20]
    np.testing.assert_array_equal(opened % protocol.quantizer.modulus, residues[0])


def test_what_is_not_published_is_ciphertext_to_an_attack():
    params = {"w": jnp.zeros(3)}
    updates = {"w": jnp.ones((3, 3)) / 2}
    view = sa.aggregate(jax.random.key(0), made("paillier", 3, publish=False), updates)
    assert view.aggregate is None
    for target in ("client:1", "aggregate"):
        assert str(sa.observe(view, target, params)) == "n/a: ciphertext"
    published = sa.aggregate(jax.random.key(0), made("paillier", 3), updates)
    np.testing.assert_allclose(sa.observe(published, "aggregate", params).update["w"], 0.5, atol=1e-6)


@pytest.mark.parametrize("scheme", ["bfv", "ckks"])
def test_what_the_server_needs_to_add_does_not_decrypt(scheme):
    tenseal = pytest.importorskip("tenseal")
    cipher = SCHEMES[scheme]()
    key = cipher.generate(0)
    public = tenseal.context_from(cipher.public(key))
    assert not public.is_private()
    assert not public.has_public_key()
    assert tenseal.context_from(key).is_private()


def test_one_ciphertext_alone_is_not_opened():
    protocol = made("paillier", 3)
    residues = random_residues(np.random.default_rng(0), protocol, 3)
    with pytest.raises(sa.AggregationAborted, match="only 1 clients answered with a ciphertext, threshold 2"):
        sa.aggregate_residues(protocol, residues, dropouts={0: 0, 1: 0})


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="scheme must be one of bfv, ckks, paillier, got 'rsa'"):
        sa.homomorphic(3, "rsa", clip=1.0)
    with pytest.raises(ValueError, match="key_bits must be an integer from 1024 to 16384, got 512"):
        sa.homomorphic(3, "paillier", clip=1.0, key_bits=512)


@pytest.mark.parametrize("publish", [True, False])
def test_a_sum_that_one_client_alone_publishes_is_not_believed(publish):
    protocol = made("paillier", 3, publish=publish)
    clients, server = parties(protocol, random_residues(np.random.default_rng(0), protocol, 3))
    pending = drive(clients, server, until=1)
    answers = {client: clients[client].decrypt(pending[client]) for client in range(3)} | {0: bytes(12)}
    with pytest.raises(sa.AggregationAborted, match="clients must publish one sum, got 2 that differ"):
        server.learn(answers)
    assert server.total is None


def test_a_sum_that_only_one_client_publishes_is_not_believed():
    protocol = made("paillier", 3)
    clients, server = parties(protocol, random_residues(np.random.default_rng(0), protocol, 3))
    drive(clients, server, until=1)
    with pytest.raises(sa.AggregationAborted, match="only 1 clients answered with the decrypted sum, threshold 2"):
        server.learn({0: bytes(12)})
    assert server.total is None


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_what_is_no_ciphertext_of_the_right_kind_is_refused(scheme):
    cipher = made(scheme) and SCHEMES[scheme]()
    key, other = cipher.generate(1024), cipher.generate(1024)
    public, good = cipher.public(key), cipher.encrypt(key, np.arange(3))[0]
    for bad in (b"", b"x", good[:-1], good + b"\0", public):
        with pytest.raises(sa.MalformedMessage, match="ciphertext"):
            cipher.add(public, [good, bad])
        with pytest.raises(sa.MalformedMessage, match="ciphertext"):
            cipher.decrypt(key, [bad])
    if scheme != "paillier":
        with pytest.raises(sa.MalformedMessage, match="ciphertext"):
            cipher.add(b"no key", [good])
        with pytest.raises(sa.MalformedMessage, match="ciphertexts of one block must have one length"):
            cipher.add(public, [good, cipher.encrypt(key, np.arange(1))[0]])
        # A ciphertext of another key decrypts to other integers, or to none.
        values = cipher.decrypt(other, [good]) if scheme == "bfv" else np.zeros(3)
        assert not np.array_equal(values[:3], np.arange(3))
        return
    n = int.from_bytes(public, "little")
    half = int.from_bytes(key[: len(key) // 2], "little")
    for number in (0, n, half, n * n, n * n + 1):
        with pytest.raises(sa.MalformedMessage, match="a ciphertext must be 256 bytes of a unit modulo n"):
            cipher.decrypt(key, [number.to_bytes(256, "little")])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**55])
def test_values_that_are_no_integers_are_refused(value, monkeypatch):
    tenseal = pytest.importorskip("tenseal")
    key = SCHEMES["ckks"]().generate(0)
    opened = types.SimpleNamespace(size=lambda: 2, decrypt=lambda: [1.0, value])
    monkeypatch.setattr(tenseal, "ckks_vector_from", lambda context, data: opened)
    with pytest.raises(sa.MalformedMessage, match="a ciphertext of ckks must hold integers, got"):
        SCHEMES["ckks"]().decrypt(key, [b""])


@pytest.mark.parametrize("change", ["drop", "rename", "add"])
def test_blocks_that_are_not_those_of_the_vector_are_refused(change):
    protocol = made("paillier", 2)
    clients, server = parties(protocol, random_residues(np.random.default_rng(0), protocol, 40))  # two blocks
    pending = drive(clients, server, until=1)

    def changed(blocks):
        return {"drop": {0: blocks[0]}, "rename": {0: blocks[0], 7: blocks[1]}, "add": {**blocks, 2: blocks[0]}}[change]

    blocks = EncryptedSum.from_bytes(pending[0]).blocks
    with pytest.raises(sa.MalformedMessage, match="ciphertexts must be of the 2 blocks, got"):
        clients[0].decrypt(EncryptedSum(changed(blocks)).to_bytes())
    clients, server = parties(protocol, random_residues(np.random.default_rng(0), protocol, 40))
    answers = {client: clients[client].encrypt(b"") for client in range(2)}
    upload = Encrypted.from_bytes(answers[1])
    answers[1] = Encrypted(upload.public, changed(upload.blocks)).to_bytes()
    with pytest.raises(sa.MalformedMessage, match="ciphertexts must be of the 2 blocks, got"):
        server.add(answers)
