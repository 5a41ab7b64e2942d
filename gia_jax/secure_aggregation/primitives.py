"""The cryptographic primitives, all of the package `cryptography`: X25519, HKDF-SHA256, ChaCha20, ChaCha20-Poly1305."""

import hashlib
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt32

from gia_jax.secure_aggregation.errors import MalformedMessage

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as error:
    raise ImportError("secure aggregation needs the extra 'secure': pip install 'gia-jax[secure]'") from error

RandomBytes = Callable[[int], bytes]
NONCE = 12


def insecure_random(seed: int, party: int) -> RandomBytes:
    """Reproducible bytes of one party, for experiments only: whoever knows the seed knows every secret.

    Two runs with one seed draw the same masks, so that the difference of a client's uploads is that of its vectors.
    """
    key = hashlib.sha256(f"insecure {seed} {party}".encode()).digest()
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return lambda count: stream.update(bytes(count))


def keystream(key: bytes, count: int) -> UInt32[np.ndarray, " count"]:
    """`count` uniform 32-bit words, the ChaCha20 keystream (RFC 8439) of a key that is used for nothing else."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * count))
    return np.frombuffer(stream, "<u4")


def uniform(random: RandomBytes, prime: int, shape: tuple[int, ...]) -> UInt32[np.ndarray, "..."]:
    """Uniform elements of the field of `prime` < 2^32, by rejection."""
    shift = np.uint32(32 - prime.bit_length())
    count = int(np.prod(shape))
    found = np.frombuffer(random(4 * count), "<u4") >> shift
    while np.any(rejected := found >= prime):
        fresh = np.frombuffer(random(4 * int(rejected.sum())), "<u4") >> shift
        found[rejected] = fresh
    return found.reshape(shape)


def agree(private: X25519PrivateKey, public: bytes, purpose: bytes) -> bytes:
    """The 32-byte key that two parties share for one purpose: X25519 (RFC 7748), then HKDF (RFC 5869).

    Raises:
        MalformedMessage: A public key that is not 32 bytes, or of low order: the shared secret would be known to all.
    """
    pair = sorted([private.public_key().public_bytes_raw(), public])
    info = b"gia_jax secure aggregation 1, " + purpose + b"".join(pair)
    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise MalformedMessage(f"a public key must be 32 bytes and not of low order, got {public[:32].hex()}") from None
    return HKDF(hashes.SHA256(), length=32, salt=None, info=info).derive(secret)


class Mailbox:
    """One client's end of the encrypted channels to its peers, which run through the server.

    Args:
        client: The owner.
        random: Its source of randomness.
    """

    def __init__(self, client: int, random: RandomBytes) -> None:
        self.client = client
        self._random = random
        self._private = X25519PrivateKey.from_private_bytes(random(32))
        self._channels: dict[int, tuple[ChaCha20Poly1305, bytes]] = {}
        self.public = self._private.public_key().public_bytes_raw()

    def connect(self, peer: int, public: bytes, announced: bytes = b"") -> None:
        """Agrees on the key of the channel to `peer`.

        Args:
            peer: Number of the client at the other end.
            public: Public key of that client.
            announced: What both ends must have been told alike: a box opens only for an end that was.
        """
        self._channels[peer] = ChaCha20Poly1305(agree(self._private, public, b"channel")), announced

    def seal(self, receiver: int, content: bytes) -> bytes:
        """Encrypts to one peer; the box opens for that receiver, and as from this sender, only."""
        nonce = self._random(NONCE)
        cipher, announced = self._channels[receiver]
        return nonce + cipher.encrypt(nonce, content, f"{self.client} to {receiver} ".encode() + announced)

    def open(self, sender: int, box: bytes) -> bytes:
        """Decrypts what `sender` sealed; raises MalformedMessage where a bit, a name or what was announced differs."""
        if sender not in self._channels:
            raise MalformedMessage(f"client {self.client} has no channel to client {sender}, and got a box from it")
        cipher, announced = self._channels[sender]
        try:
            # Padded, because the cipher takes no nonce that is cut short.
            nonce, sealed = box[:NONCE].ljust(NONCE, b"\0"), box[NONCE:]
            return cipher.decrypt(nonce, sealed, f"{sender} to {self.client} ".encode() + announced)
        except InvalidTag:
            raise MalformedMessage(
                f"the box from client {sender} to client {self.client} is not what was sealed"
            ) from None
