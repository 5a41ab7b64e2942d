"""Additively homomorphic encryption: the server adds ciphertexts, and only clients decrypt.

Phong et al., Privacy-Preserving Deep Learning via Additively Homomorphic Encryption, IEEE TIFS 2018, section 4, with
Paillier (EUROCRYPT 1999, scheme 1) packed as there; Fan and Vercauteren 2012 (BFV) and Cheon et al., ASIACRYPT 2017
(CKKS), by tenseal. Departure: one sum of gradients instead of asynchronous steps on encrypted weights.
"""

import contextlib
import math
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric import rsa

from gia_jax import _check
from gia_jax.secure_aggregation.errors import AggregationAborted, MalformedMessage
from gia_jax.secure_aggregation.primitives import RandomBytes
from gia_jax.secure_aggregation.protocol import (
    AggregationProtocol,
    Client,
    Server,
    client_round,
    require,
    server_round,
    to_bytes,
    words,
)
from gia_jax.secure_aggregation.quantization import RING, Quantizer
from gia_jax.secure_aggregation.wire import Bytes, Wire

DEGREE = 8192  # degree of the ring of BFV and CKKS
BFV_PRIME = 4293918721  # the largest below 2^32 that is 1 modulo 2 DEGREE
CKKS_SCALE = 2.0**40
SLOT = 47  # bits of an entry of 32 bits in a Paillier plaintext: room for 2^15 additions


def homomorphic(
    num_clients: int,
    scheme: str = "bfv",
    *,
    clip: float,
    bits: int = 22,
    publish: bool = True,
    key_bits: int = 3072,
) -> AggregationProtocol:
    """Builds the protocol of homomorphic encryption, which gives the sum over the clients that sent a ciphertext.

    The server sees nothing of the sum but what clients publish.

    Threat model: an honest-but-curious server that no client helps. All clients hold one secret key: a single one
    that colludes opens every upload (`collusion` is 0), and so does one that reads another's traffic. The key always
    comes from the operating system, also with `insecure_seed`. CKKS decryptions that are published leak of the key
    (Li and Micciancio, EUROCRYPT 2021). Here they are rounded to integers, which is no proof of the contrary.

    The server believes a published sum only where all published sums are equal, so a client alone cannot lie about it.
    But these ciphertexts have no tag, as they can be added: a client's ciphertext that was changed on its way, and
    still is one, changes the sum unnoticed. So does a wrong one that the server sends to all clients: they publish
    nothing, or all the same wrong sum. Bytes that are no ciphertext of the right kind end the run.

    Args:
        num_clients: Number N of clients, at least 1, with Paillier at most 2^15.
        scheme: Name of the encryption scheme. "bfv" is exact. "ckks" is approximate: its error of about 1e-6 steps is
            rounded off. Both need the extra `he`. "paillier" is exact, needs the extra `secure` alone, and is slow: it
            takes a tenth of a second or more for every 65 entries.
        clip: Largest magnitude of an entry, positive and finite. Larger entries are clipped.
        bits: Number of bits of an entry, the sign included, from 2 to 31.
        publish: Whether the clients tell the server the sum, as a server that holds the model in the clear needs it.
            Without it the view's aggregate is None.
        key_bits: Length of Paillier's key in bits, from 1024 to 16384, above which it would take minutes. A key below
            3072 bits is for tests.

    Returns:
        The protocol.

    Raises:
        ValueError: If `Quantizer` refuses the arguments, the scheme is unknown, or `num_clients` or `key_bits` is out
            of range.
        ImportError: If the scheme is BFV or CKKS and the extra `he` is not installed.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import secure_aggregation as sa
        >>> protocol = sa.homomorphic(2, "paillier", clip=1.0, key_bits=1024)
        >>> updates = jnp.array([[0.5, -0.25], [0.25, 0.5]])
        >>> view = sa.aggregate(jax.random.key(0), protocol, updates)
        >>> [round(float(entry), 2) for entry in view.aggregate]
        [0.75, 0.25]
        >>> print(sa.observe(view, "client:0", jnp.zeros(2)))
        n/a: ciphertext
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    _check.integer(num_clients=num_clients)
    if scheme == "paillier" and num_clients > 2 ** (SLOT - 32):
        raise ValueError(f"num_clients must be at most {2 ** (SLOT - 32)} with Paillier, got {num_clients}")
    _check.integer(1024, 16384, key_bits=key_bits)
    quantizer = Quantizer(clip, bits, num_clients, BFV_PRIME if scheme == "bfv" else RING)
    cipher = SCHEMES[scheme]()

    def make_clients(residues: np.ndarray, randoms: Sequence[RandomBytes]) -> list[HomomorphicClient]:
        del randoms
        key = cipher.generate(key_bits)
        shared = cipher, key, quantizer.modulus, publish
        return [HomomorphicClient(client, vector, *shared) for client, vector in enumerate(residues)]

    def make_server(length: int, random: RandomBytes) -> HomomorphicServer:
        del random
        return HomomorphicServer(length, num_clients, cipher, quantizer.modulus, publish)

    return AggregationProtocol(f"homomorphic {scheme}", quantizer, 0, make_clients, make_server)


class Cipher(NamedTuple):
    """An additively homomorphic scheme on blocks of integers, as five functions.

    They raise MalformedMessage for bytes that are no ciphertext or public key of their own scheme.

    Attributes:
        generate: Function `(key_bits) -> key` that makes a secret key. Lattice schemes have a length of their own.
        public: Function `(key) -> public` that derives from the secret key what the server needs to add. That encrypts
            nothing.
        encrypt: Function `(key, integers) -> ciphertexts` that encrypts signed integers, shape (p,), with the secret
            key: a ciphertext for every block of them.
        add: Function `(public, ciphertexts) -> ciphertext` that adds ciphertexts of the same block.
        decrypt: Function `(key, ciphertexts) -> integers` that reads the ciphertexts of all blocks with the secret key:
            at least p integers.
    """

    generate: Callable[[int], bytes]
    public: Callable[[bytes], bytes]
    encrypt: Callable[[bytes, np.ndarray], list[bytes]]
    add: Callable[[bytes, Sequence[bytes]], bytes]
    decrypt: Callable[[bytes, Sequence[bytes]], np.ndarray]


def lattice(name: Literal["bfv", "ckks"]) -> Cipher:
    """Returns BFV or CKKS, by tenseal.

    A ciphertext holds `DEGREE` integers with BFV and half as many with CKKS. Both have 128 bits of security by
    tenseal's own check.

    Args:
        name: Name of the scheme.

    Returns:
        The scheme.

    Raises:
        ImportError: If the extra `he` is not installed.

    Examples:
        >>> import numpy as np
        >>> from gia_jax.secure_aggregation.homomorphic import lattice
        >>> cipher = lattice("bfv")
        >>> key = cipher.generate(0)
        >>> first, second = (cipher.encrypt(key, np.array(entries))[0] for entries in ([2, 3], [5, -7]))
        >>> cipher.decrypt(key, [cipher.add(cipher.public(key), [first, second])]).tolist()
        [7, -4]
    """
    try:
        import tenseal
    except ImportError as error:
        raise ImportError(f"{name} needs the extra 'he': pip install 'gia-jax[he]'") from error

    make, load = (
        (tenseal.bfv_vector, tenseal.bfv_vector_from)
        if name == "bfv"
        else (tenseal.ckks_vector, tenseal.ckks_vector_from)
    )
    slots = DEGREE if name == "bfv" else DEGREE // 2

    def encrypt(key: bytes, integers: np.ndarray) -> list[bytes]:
        context = tenseal.context_from(key)
        blocks = (integers[start : start + slots].tolist() for start in range(0, integers.size, slots))
        return [make(context, block).serialize() for block in blocks]

    def add(public: bytes, ciphertexts: Sequence[bytes]) -> bytes:
        with _refusing(name):
            context = tenseal.context_from(public)
            summands = [load(context, ciphertext) for ciphertext in ciphertexts]
            # tenseal repeats a vector of one entry to the other's length.
            if len({(one.size(), len(one.ciphertext())) for one in summands}) > 1:
                raise MalformedMessage("ciphertexts of one block must have one length, got others")
            total = summands[0]
            for one in summands[1:]:
                total += one
            return total.serialize()

    def decrypt(key: bytes, ciphertexts: Sequence[bytes]) -> np.ndarray:
        with _refusing(name):
            context = tenseal.context_from(key)
            blocks = [load(context, ciphertext) for ciphertext in ciphertexts]
            if any(block.size() != slots for block in blocks[:-1]) or not blocks[-1].size():
                raise MalformedMessage(
                    f"a ciphertext of {name} must have {slots} entries, fewer only in the last block"
                )
            values = np.concatenate([block.decrypt() for block in blocks])
        return _whole(name, values)

    def public(key: bytes) -> bytes:
        context = tenseal.context_from(key)
        return context.serialize(
            save_public_key=False, save_secret_key=False, save_galois_keys=False, save_relin_keys=False
        )

    return Cipher(lambda _: _context(name).serialize(save_secret_key=True), public, encrypt, add, decrypt)


def _context(name: Literal["bfv", "ckks"]) -> Any:
    """Makes tenseal's context of a scheme, with a new secret key."""
    import tenseal

    if name == "bfv":
        return tenseal.context(tenseal.SCHEME_TYPE.BFV, poly_modulus_degree=DEGREE, plain_modulus=BFV_PRIME)
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=DEGREE, coeff_mod_bit_sizes=[60, 40, 60])
    context.global_scale = CKKS_SCALE
    return context


@contextlib.contextmanager
def _refusing(name: str) -> Generator[None]:
    """Turns what tenseal and SEAL raise for bad bytes into MalformedMessage."""
    try:
        yield
    except AggregationAborted:
        raise
    except (RuntimeError, ValueError, IndexError, MemoryError):  # all that tenseal and SEAL make of bad bytes
        raise MalformedMessage(f"a ciphertext or key is not of {name}, or not of this one's parameters") from None


def _whole(name: str, values: np.ndarray) -> np.ndarray:
    """Rounds decrypted numbers; raises MalformedMessage for those that cannot be a sum of integers."""
    if not np.all(np.abs(values) < 2.0**52):  # also where one is NaN
        raise MalformedMessage(
            f"a ciphertext of {name} must hold integers, got {values[~(np.abs(values) < 2.0**52)][0]}"
        )
    return np.round(values).astype(np.int64)


def paillier() -> Cipher:
    """Returns Paillier with the generator n + 1, entries packed modulo 2^32 into slots of 47 bits.

    Two's complement makes the slots signed: a sum is right modulo 2^32 where it stays below 2^47 in its slot. The
    secret key is the two primes, which are equally long.

    Returns:
        The scheme.

    Examples:
        >>> import numpy as np
        >>> from gia_jax.secure_aggregation.homomorphic import paillier
        >>> cipher = paillier()
        >>> key = cipher.generate(1024)
        >>> first, second = (cipher.encrypt(key, np.array(entries))[0] for entries in ([2, 3], [5, -1]))
        >>> found = cipher.decrypt(key, [cipher.add(cipher.public(key), [first, second])])
        >>> (found[:2] % 2**32).tolist()
        [7, 2]
    """

    def primes(key: bytes) -> tuple[int, int]:
        half = len(key) // 2
        return int.from_bytes(key[:half], "little"), int.from_bytes(key[half:], "little")

    def unit(ciphertext: bytes, n: int, size: int) -> int:
        number = int.from_bytes(ciphertext, "little")
        if len(ciphertext) != size or number >= n * n or math.gcd(number, n) != 1:
            raise MalformedMessage(f"a ciphertext must be {size} bytes of a unit modulo n^2, got others")
        return number

    def generate(key_bits: int) -> bytes:
        numbers = rsa.generate_private_key(65537, key_bits).private_numbers()
        size = (key_bits + 15) // 16
        return numbers.p.to_bytes(size, "little") + numbers.q.to_bytes(size, "little")

    def public(key: bytes) -> bytes:
        p, q = primes(key)
        return (p * q).to_bytes(len(key), "little")

    def encrypt(key: bytes, integers: np.ndarray) -> list[bytes]:
        n = int.from_bytes(public(key), "little")
        slots = (n.bit_length() - 1) // SLOT
        ciphertexts = []
        for start in range(0, integers.size, slots):
            entries = (integers[start : start + slots] % RING).tolist()
            plain = sum(entry << (SLOT * i) for i, entry in enumerate(entries))
            noise = pow(1 + secrets.randbelow(n - 1), n, n * n)
            ciphertexts.append(((1 + plain * n) * noise % (n * n)).to_bytes(2 * len(key), "little"))
        return ciphertexts

    def add(public: bytes, ciphertexts: Sequence[bytes]) -> bytes:
        n = int.from_bytes(public, "little")
        total = 1
        for ciphertext in ciphertexts:
            total = total * unit(ciphertext, n, 2 * len(public)) % (n * n)
        return total.to_bytes(2 * len(public), "little")

    def decrypt(key: bytes, ciphertexts: Sequence[bytes]) -> np.ndarray:
        p, q = primes(key)
        n, exponent = p * q, (p - 1) * (q - 1)
        slots, inverse = (n.bit_length() - 1) // SLOT, pow(exponent, -1, n)
        found = []
        for ciphertext in ciphertexts:
            # (1 + plain n)^exponent = 1 + plain exponent n modulo n^2, and the noise becomes 1.
            power = pow(unit(ciphertext, n, 2 * len(key)), exponent, n * n)
            plain = (power - 1) // n * inverse % n
            found += [(plain >> (SLOT * i)) % (1 << SLOT) for i in range(slots)]
        return np.array(found, np.int64)

    return Cipher(generate, public, encrypt, add, decrypt)


SCHEMES: Mapping[str, Callable[[], Cipher]] = {
    "bfv": lambda: lattice("bfv"),
    "ckks": lambda: lattice("ckks"),
    "paillier": paillier,
}


@dataclass(frozen=True)
class Encrypted(Wire):
    """The message of a client in round 0.

    Attributes:
        public: What the server needs to add the ciphertexts.
        blocks: Ciphertexts by number of the block.
    """

    public: bytes
    blocks: Bytes


@dataclass(frozen=True)
class EncryptedSum(Wire):
    """The message of the server in round 0.

    Attributes:
        blocks: Ciphertexts of the sum by number of the block.
    """

    blocks: Bytes


class HomomorphicClient(Client):
    """One client, which holds the secret key of all clients.

    Attributes:
        sum: The residues of the sum, shape (p,), once they are decrypted.

    Args:
        client: Number of the client.
        vector: Residues that the client puts into the sum, shape (p,).
        cipher: Encryption scheme.
        key: Secret key of all clients.
        modulus: Modulus of the residues.
        publish: Whether the client tells the server the sum.
    """

    def __init__(
        self, client: int, vector: np.ndarray, cipher: Cipher, key: bytes, modulus: int, publish: bool
    ) -> None:
        super().__init__(client, self.encrypt, self.decrypt)
        self._vector, self._cipher, self._key, self._modulus = vector, cipher, key, modulus
        self._publish = publish
        self.sum: np.ndarray | None = None

    @client_round
    def encrypt(self, message: bytes) -> bytes:
        """Round 0: encrypts the vector."""
        del message
        signed = self._vector.astype(np.int64)
        signed[signed > (self._modulus - 1) // 2] -= self._modulus
        blocks = self._cipher.encrypt(self._key, signed)
        self._num_blocks = len(blocks)
        return Encrypted(self._cipher.public(self._key), dict(enumerate(blocks))).to_bytes()

    @client_round
    def decrypt(self, message: bytes) -> bytes:
        """Round 1: decrypts the sum, and publishes it if the protocol wants it."""
        blocks = EncryptedSum.from_bytes(message).blocks
        integers = self._cipher.decrypt(self._key, _in_order(blocks, self._num_blocks))
        if integers.size < self._vector.size:
            raise MalformedMessage(f"the sum must have {self._vector.size} entries, got {integers.size}")
        self.sum = (integers[: self._vector.size] % self._modulus).astype(np.uint32)
        return to_bytes(self.sum) if self._publish else b""


class HomomorphicServer(Server):
    """The server, which has no secret key. It adds the ciphertexts of two clients or more, or of the only one.

    Args:
        length: Length p of the vectors.
        num_clients: Number of clients.
        cipher: Encryption scheme.
        modulus: Modulus of the residues.
        publish: Whether the clients tell the server the sum.
    """

    def __init__(self, length: int, num_clients: int, cipher: Cipher, modulus: int, publish: bool) -> None:
        super().__init__(num_clients)
        self._length, self._cipher, self._modulus, self._minimum = length, cipher, modulus, min(2, num_clients)
        self._publish = publish
        self.rounds = (self.add, self.learn)

    @server_round
    def add(self, answers: Bytes) -> Bytes:
        """Round 0: adds the ciphertexts of all clients block by block, and sends the sum to each of them."""
        self.uploads, self.contributors = answers, tuple(answers)
        require(len(answers), self._minimum, "with a ciphertext")
        received = [Encrypted.from_bytes(data) for data in answers.values()]
        public, count = received[0].public, len(received[0].blocks)
        if any(one.public != public for one in received):
            raise MalformedMessage("ciphertexts must be of one key, got others")
        blocks = zip(*[_in_order(one.blocks, count) for one in received])
        total = {i: self._cipher.add(public, block) for i, block in enumerate(blocks)}
        return dict.fromkeys(answers, EncryptedSum(total).to_bytes())

    @server_round
    def learn(self, answers: Bytes) -> Bytes:
        """Round 1: takes the sum that the clients publish, if they do."""
        require(len(answers), self._minimum, "with the decrypted sum")
        published = set(answers.values())
        if len(published) > 1:
            raise AggregationAborted(f"clients must publish one sum, got {len(published)} that differ")
        if self._publish:
            self.total = words(published.pop(), self._length, self._modulus)
        return {}


def _in_order(blocks: Bytes, count: int) -> list[bytes]:
    """Returns the ciphertexts of the blocks from 0 to `count` - 1; raises MalformedMessage where they are others."""
    if set(blocks) != set(range(count)):
        raise MalformedMessage(f"ciphertexts must be of the {count} blocks, got {len(blocks)} of {sorted(blocks)[:9]}")
    return [blocks[i] for i in range(count)]
