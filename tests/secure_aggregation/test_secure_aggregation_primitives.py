"""Published test vectors, and Shamir's scheme by enumeration."""

import itertools
import os

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from gia_jax.secure_aggregation import shamir
from gia_jax.secure_aggregation.primitives import Mailbox, agree, insecure_random, keystream, uniform
from gia_jax.secure_aggregation.secagg import UnmaskRequest

hexadecimal = bytes.fromhex


def test_x25519_is_rfc_7748():
    # Section 5.2, first vector.
    scalar = hexadecimal("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = hexadecimal("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    shared = X25519PrivateKey.from_private_bytes(scalar).exchange(X25519PublicKey.from_public_bytes(point))
    assert shared.hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"


def test_hkdf_is_rfc_5869():
    # Appendix A.1.
    derived = HKDF(hashes.SHA256(), length=42, salt=bytes(range(13)), info=bytes(range(0xF0, 0xFA))).derive(
        b"\x0b" * 22
    )
    assert derived.hex() == ("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")


def test_chacha20_is_rfc_8439():
    # Section 2.4.2: the cipher takes the counter, little-endian, before the nonce.
    nonce = (1).to_bytes(4, "little") + hexadecimal("000000000000004a00000000")
    sunscreen = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would "
        b"be it."
    )
    cipher = Cipher(algorithms.ChaCha20(bytes(range(32)), nonce), mode=None).encryptor().update(sunscreen)
    assert cipher.hex().startswith("6e2e359a2568f98041ba0728dd0d6981")
    # Section 2.8.2: the tag.
    sealed = ChaCha20Poly1305(bytes(range(0x80, 0xA0))).encrypt(
        hexadecimal("070000004041424344454647"), sunscreen, hexadecimal("50515253c0c1c2c3c4c5c6c7")
    )
    assert sealed[-16:].hex() == "1ae10b594f09e26a7e902ecbd0600691"


def test_the_keystream_is_the_first_block_of_rfc_8439():
    # Appendix A.1, vector 1: key and nonce of zeros, counter 0.
    words = keystream(bytes(32), 16)
    assert (
        words.astype("<u4")
        .tobytes()
        .hex()
        .startswith("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    )
    np.testing.assert_array_equal(keystream(bytes(32), 5), words[:5])


def test_a_shared_key_depends_on_both_parties_and_its_purpose():
    a, b, c = (X25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in (1, 2, 3))
    public = [key.public_key().public_bytes_raw() for key in (a, b, c)]
    assert agree(a, public[1], b"mask") == agree(b, public[0], b"mask")
    others = [agree(a, public[1], b"channel"), agree(a, public[2], b"mask"), agree(b, public[2], b"mask")]
    assert agree(a, public[1], b"mask") not in others
    # The mask of two fixed keys: it changes only with the protocol.
    assert keystream(agree(a, public[1], b"mask"), 2).tolist() == [311409446, 1144660408]


@pytest.mark.parametrize("point", [0, 1])
def test_points_of_low_order_are_refused(point):
    with pytest.raises(ValueError, match="a public key must be 32 bytes and not of low order, got 0"):
        agree(X25519PrivateKey.generate(), point.to_bytes(32, "little"), b"mask")


def test_boxes_open_for_their_receiver_only():
    boxes = [Mailbox(i, os.urandom) for i in range(3)]
    for a, b in itertools.permutations(boxes, 2):
        a.connect(b.client, b.public)
    sealed = boxes[0].seal(1, b"share")
    assert boxes[1].open(0, sealed) == b"share"
    flipped = sealed[:-1] + bytes([sealed[-1] ^ 1])
    for receiver, sender, box in [(2, 0, sealed), (1, 2, sealed), (1, 0, flipped), (1, 0, sealed[:20])]:
        with pytest.raises(ValueError, match=f"the box from client {sender} to client {receiver}"):
            boxes[receiver].open(sender, box)
    # Sent back to its sender: the key is the same, the names are not.
    with pytest.raises(ValueError, match="the box from client 1 to client 0"):
        boxes[0].open(1, sealed)


def test_uniform_elements_fill_the_field_evenly():
    drawn = uniform(insecure_random(0, 0), 13, (13_000,))
    counts = np.bincount(drawn, minlength=13)
    assert len(counts) == 13
    assert np.sum((counts - 1000) ** 2 / 1000) < 40  # chi-square of 12: 1e-4
    assert uniform(insecure_random(0, 0), 2**31 - 1, (3, 4)).max() < 2**31 - 1


def test_a_shared_secret_comes_back_from_every_threshold_of_shares():
    secret = os.urandom(32)
    shares = shamir.share(os.urandom, secret, 3, [0, 4, 7, 8, 9])
    for chosen in itertools.combinations(shares, 3):
        assert shamir.recombine({client: shares[client] for client in chosen}, 3) == secret
    assert shamir.recombine(shares, 3) == secret
    with pytest.raises(ValueError, match="shares must be at least 3, got 2"):
        shamir.recombine({0: shares[0], 4: shares[4]}, 3)
    wrong = dict(list(shares.items())[:3])
    wrong[0] = bytes([wrong[0][0] ^ 1]) + wrong[0][1:]
    assert shamir.recombine(wrong, 3) != secret


def test_extreme_secrets_come_back():
    for secret in (bytes(32), b"\xff" * 32):
        assert shamir.recombine(shamir.share(os.urandom, secret, 2, range(3)), 2) == secret


def test_fewer_shares_are_consistent_with_every_secret():
    # All polynomials of degree 2 over a field of 7: two shares take every value equally often, for every secret.
    for points in itertools.combinations(range(1, 7), 2):
        seen = {}
        for secret, *rest in itertools.product(range(7), repeat=3):
            values = tuple(shamir.evaluate([secret, *rest], point, 7) for point in points)
            seen.setdefault(secret, []).append(values)
        assert all(sorted(values) == sorted(seen[0]) for values in seen.values())
        assert len(set(seen[0])) == 49
    # Three shares do not.
    weights = shamir.weights_at_zero((1, 2, 5), 7)
    for secret, *rest in itertools.product(range(7), repeat=3):
        values = [shamir.evaluate([secret, *rest], point, 7) for point in (1, 2, 5)]
        assert sum(value * weight for value, weight in zip(values, weights)) % 7 == secret


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 2**32 - 1), unique=True, max_size=5),
    st.lists(st.integers(0, 9), unique=True, max_size=3),
    st.binary(max_size=9),
)
def test_messages_survive_the_wire_and_damage_is_refused(survivors, dropped, content):
    message = UnmaskRequest(tuple(survivors), tuple(dropped), dict.fromkeys(dropped, content))
    data = message.to_bytes()
    assert UnmaskRequest.from_bytes(data) == message
    for cut in range(len(data)):
        with pytest.raises(ValueError, match="early"):
            UnmaskRequest.from_bytes(data[:cut])
    with pytest.raises(ValueError, match="1 bytes too many"):
        UnmaskRequest.from_bytes(data + b"\0")


def test_a_client_named_twice_is_refused():
    data = UnmaskRequest((3, 3), (), {}).to_bytes()
    with pytest.raises(ValueError, match=r"names a client twice, got \[3, 3\]"):
        UnmaskRequest.from_bytes(data)
