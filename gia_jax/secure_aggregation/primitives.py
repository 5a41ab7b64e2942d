"""The cryptographic primitives of the protocols: X25519, HKDF-SHA256, ChaCha20 and ChaCha20-Poly1305.

All of them are of the package `cryptography`.
"""

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
    """Returns a reproducible source of bytes for one party, for experiments only.

    Whoever knows the seed knows every secret. Two runs with one seed draw the same masks, so that the difference of a
    client's uploads is that of its vectors.

    Args:
        seed: Seed of the run.
        party: Number of the party.

    Returns:
        A function `(count) -> bytes`, whose every call goes on in the party's stream.

    Examples:
        >>> from gia_jax.secure_aggregation.primitives import insecure_random
        >>> first, again = insecure_random(0, party=1)(8), insecure_random(0, party=1)(8)
        >>> other = insecure_random(0, party=2)(8)
        >>> first == again, first == other
        (True, False)
    """
    key = hashlib.sha256(f"insecure {seed} {party}".encode()).digest()
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return lambda count: stream.update(bytes(count))


def keystream(key: bytes, count: int) -> UInt32[np.ndarray, " count"]:
    """Returns uniform 32-bit words, the ChaCha20 keystream (RFC 8439) of a key that is used for nothing else.

    Args:
        key: Key, 32 bytes.
        count: Number of words.

    Returns:
        The words, shape (count,).

    Examples:
        >>> from gia_jax.secure_aggregation.primitives import keystream
        >>> [hex(word) for word in keystream(bytes(32), 2)]
        ['0xade0b876', '0x903df1a0']
    """
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * count))
    return np.frombuffer(stream, "<u4")


def uniform(random: RandomBytes, prime: int, shape: tuple[int, ...]) -> UInt32[np.ndarray, "..."]:
    """Draws uniform elements of the field of a prime, by rejection.

    Args:
        random: Source of randomness.
        prime: Modulus of the field, below 2^32.
        shape: Shape of the result.

    Returns:
        The residues, below `prime`.

    Examples:
        >>> import os
        >>> from gia_jax.secure_aggregation.primitives import uniform
        >>> drawn = uniform(os.urandom, 5, (2, 3))
        >>> drawn.shape, bool((drawn < 5).all())
        ((2, 3), True)
    """
    shift = np.uint32(32 - prime.bit_length())
    count = int(np.prod(shape))
    found = np.frombuffer(random(4 * count), "<u4") >> shift
    while np.any(rejected := found >= prime):
        fresh = np.frombuffer(random(4 * int(rejected.sum())), "<u4") >> shift
        found[rejected] = fresh
    return found.reshape(shape)


def agree(private: X25519PrivateKey, public: bytes, purpose: bytes) -> bytes:
    """Returns the 32-byte key that two parties share for one purpose: X25519 (RFC 7748), then HKDF (RFC 5869).

    Args:
        private: Private key of this party.
        public: Public key of the other party, 32 bytes.
        purpose: Name of what the key is for. Other purposes give other keys.

    Returns:
        The key.

    Raises:
        MalformedMessage: If the public key is not 32 bytes, or of low order: the shared secret would be known to all.

    Examples:
        >>> from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
        >>> from gia_jax.secure_aggregation.primitives import agree
        >>> first, second = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        >>> own = agree(first, second.public_key().public_bytes_raw(), b"mask")
        >>> theirs = agree(second, first.public_key().public_bytes_raw(), b"mask")
        >>> own == theirs, len(own)
        (True, 32)
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

    Attributes:
        client: Number of the client that owns it.
        public: Public key of the client, 32 bytes.

    Args:
        client: Number of the client that owns it.
        random: Source of randomness of the client.

    Examples:
        >>> import os
        >>> from gia_jax.secure_aggregation.primitives import Mailbox
        >>> first, second = Mailbox(0, os.urandom), Mailbox(1, os.urandom)
        >>> first.connect(1, second.public)
        >>> second.connect(0, first.public)
        >>> second.open(0, first.seal(1, b"a share"))
        b'a share'
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
            public: Public key of that client, 32 bytes.
            announced: What both ends must have been told alike: a box opens only for an end that was.

        Raises:
            MalformedMessage: If the public key is not 32 bytes, or of low order.
        """
        self._channels[peer] = ChaCha20Poly1305(agree(self._private, public, b"channel")), announced

    def seal(self, receiver: int, content: bytes) -> bytes:
        """Encrypts a content to one peer. The box opens only for that receiver, and only as from this sender.

        Args:
            receiver: Number of the client that may open the box.
            content: Bytes to encrypt.

        Returns:
            The box.
        """
        nonce = self._random(NONCE)
        cipher, announced = self._channels[receiver]
        return nonce + cipher.encrypt(nonce, content, f"{self.client} to {receiver} ".encode() + announced)

    def open(self, sender: int, box: bytes) -> bytes:
        """Decrypts what a peer sealed.

        Args:
            sender: Number of the client that sealed the box.
            box: The box, as it arrived.

        Returns:
            The content.

        Raises:
            MalformedMessage: If there is no channel to `sender`, or a bit, a name or what was announced differs.
        """
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
