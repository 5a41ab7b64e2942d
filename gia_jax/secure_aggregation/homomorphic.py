"""Additively homomorphic encryption: the server adds ciphertexts, and only clients decrypt.

Phong et al., Privacy-Preserving Deep Learning via Additively Homomorphic Encryption, IEEE TIFS 2018, section 4, with
Paillier (EUROCRYPT 1999, scheme 1) packed as there; Fan and Vercauteren 2012 (BFV) and Cheon et al., ASIACRYPT 2017
(CKKS), by tenseal. Departures: one sum of gradients instead of asynchronous steps on encrypted weights.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric import rsa

from gia_jax.secure_aggregation.primitives import RandomBytes
from gia_jax.secure_aggregation.protocol import (
    AggregationAborted,
    AggregationProtocol,
    Client,
    Server,
    require,
    to_bytes,
    words,
)
from gia_jax.secure_aggregation.quantization import RING, Quantizer
from gia_jax.secure_aggregation.wire import Bytes, Wire

DEGREE = 8192  # of the ring of BFV and CKKS
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
    """The sum over the clients that sent a ciphertext, of which the server sees nothing but what clients publish.

    Threat model: an honest-but-curious server that no client helps. All clients hold one secret key: a single one
    that colludes opens every upload (`collusion` is 0), and so does one that reads another's traffic. The key comes
    from the operating system always, also with `insecure_seed`. CKKS decryptions that are published leak of the key
    (Li and Micciancio, EUROCRYPT 2021); here they are rounded to integers, which is no proof of the contrary.

    Args:
        num_clients: N; with Paillier at most 2^15.
        scheme: "bfv" is exact; "ckks" is approximate, its error of about 1e-6 steps is rounded off; both need the
            extra `he`. "paillier" is exact, of the extra `secure` alone, and slow: a tenth of a second or more for
            every 65 entries.
        clip: Largest magnitude of an entry.
        bits: Bits an entry.
        publish: Whether the clients tell the server the sum, as a server that holds the model in the clear needs it.
            False: the view's aggregate is None.
        key_bits: Of Paillier, from 1024; below 3072 it is for tests.

    Returns:
        The protocol.

    Raises:
        ValueError: As `Quantizer`, an unknown scheme, or Paillier's arguments out of range.
        ImportError: BFV or CKKS without the extra `he`.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if scheme == "paillier" and num_clients > 2 ** (SLOT - 32):
        raise ValueError(f"num_clients must be at most {2 ** (SLOT - 32)} with Paillier, got {num_clients}")
    if key_bits < 1024:
        raise ValueError(f"key_bits must be at least 1024, got {key_bits}")
    quantizer = Quantizer(clip, bits, num_clients, BFV_PRIME if scheme == "bfv" else RING)
    cipher = SCHEMES[scheme]()

    def make_clients(residues: np.ndarray, randoms: Sequence[RandomBytes]) -> list[HomomorphicClient]:
        del randoms
        key = cipher.generate(key_bits)
        return [HomomorphicClient(vector, cipher, key, quantizer.modulus, publish) for vector in residues]

    def make_server(length: int, random: RandomBytes) -> HomomorphicServer:
        del random
        return HomomorphicServer(length, cipher, quantizer.modulus, min(2, num_clients), publish)

    return AggregationProtocol(f"homomorphic {scheme}", quantizer, 0, make_clients, make_server)


class Cipher(NamedTuple):
    """An additively homomorphic scheme on blocks of integers.

    Attributes:
        generate: From the key's bits, the secret key. (Lattice schemes have a length of their own.)
        public: From the secret key, what the server needs to add; it encrypts nothing.
        encrypt: From the secret key and signed integers, shape (p,), a ciphertext for every block of them.
        add: From what `public` gave and ciphertexts of the same block, that of the sum.
        decrypt: From the secret key and the ciphertexts of all blocks, the integers, at least p of them.
    """

    generate: Callable[[int], bytes]
    public: Callable[[bytes], bytes]
    encrypt: Callable[[bytes, np.ndarray], list[bytes]]
    add: Callable[[bytes, Sequence[bytes]], bytes]
    decrypt: Callable[[bytes, Sequence[bytes]], np.ndarray]


def lattice(name: Literal["bfv", "ckks"]) -> Cipher:
    """BFV or CKKS, `DEGREE` or half as many integers in a ciphertext; 128 bits of security by tenseal's own check."""
    try:
        import tenseal
    except ImportError as error:
        raise ImportError(f"{name} needs the extra 'he': pip install 'gia-jax[he]'") from error

    def new() -> Any:
        if name == "bfv":
            return tenseal.context(tenseal.SCHEME_TYPE.BFV, poly_modulus_degree=DEGREE, plain_modulus=BFV_PRIME)
        context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=DEGREE, coeff_mod_bit_sizes=[60, 40, 60]
        )
        context.global_scale = CKKS_SCALE
        return context

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
        context = tenseal.context_from(public)
        total = load(context, ciphertexts[0])
        for ciphertext in ciphertexts[1:]:
            total += load(context, ciphertext)
        return total.serialize()

    def decrypt(key: bytes, ciphertexts: Sequence[bytes]) -> np.ndarray:
        context = tenseal.context_from(key)
        values = np.concatenate([load(context, ciphertext).decrypt() for ciphertext in ciphertexts])
        return np.round(values).astype(np.int64)

    def public(key: bytes) -> bytes:
        context = tenseal.context_from(key)
        return context.serialize(
            save_public_key=False, save_secret_key=False, save_galois_keys=False, save_relin_keys=False
        )

    return Cipher(lambda _: new().serialize(save_secret_key=True), public, encrypt, add, decrypt)


def paillier() -> Cipher:
    """Paillier with the generator n + 1, entries packed modulo 2^32 into slots of 47 bits.

    Two's complement makes the slots signed: a sum is right modulo 2^32 where it stays below 2^47 in its slot. The
    secret key is the two primes, as long each.
    """

    def primes(key: bytes) -> tuple[int, int]:
        half = len(key) // 2
        return int.from_bytes(key[:half], "little"), int.from_bytes(key[half:], "little")

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
        square = int.from_bytes(public, "little") ** 2
        total = 1
        for ciphertext in ciphertexts:
            total = total * int.from_bytes(ciphertext, "little") % square
        return total.to_bytes(2 * len(public), "little")

    def decrypt(key: bytes, ciphertexts: Sequence[bytes]) -> np.ndarray:
        p, q = primes(key)
        n, exponent = p * q, (p - 1) * (q - 1)
        slots, inverse = (n.bit_length() - 1) // SLOT, pow(exponent, -1, n)
        found = []
        for ciphertext in ciphertexts:
            # (1 + plain n)^exponent = 1 + plain exponent n modulo n^2, and the noise becomes 1.
            power = pow(int.from_bytes(ciphertext, "little"), exponent, n * n)
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
    """What the server needs to add (from clients only), and ciphertexts by block."""

    public: bytes
    blocks: Bytes


class HomomorphicClient(Client):
    """One client, with the key of all clients.

    Attributes:
        sum: The sum's residues, once decrypted.
    """

    def __init__(self, vector: np.ndarray, cipher: Cipher, key: bytes, modulus: int, publish: bool) -> None:
        self._vector, self._cipher, self._key, self._modulus = vector, cipher, key, modulus
        self._publish = publish
        self.sum: np.ndarray | None = None
        self.rounds = (self.encrypt, self.decrypt)

    def encrypt(self, message: bytes) -> bytes:
        """Round 0."""
        del message
        signed = self._vector.astype(np.int64)
        signed[signed > (self._modulus - 1) // 2] -= self._modulus
        blocks = self._cipher.encrypt(self._key, signed)
        return Encrypted(self._cipher.public(self._key), dict(enumerate(blocks))).to_bytes()

    def decrypt(self, message: bytes) -> bytes:
        """Round 1."""
        blocks = Encrypted.from_bytes(message).blocks
        integers = self._cipher.decrypt(self._key, [blocks[i] for i in range(len(blocks))])
        self.sum = (integers[: self._vector.size] % self._modulus).astype(np.uint32)
        return to_bytes(self.sum) if self._publish else b""


class HomomorphicServer(Server):
    """The server, without a key."""

    def __init__(self, length: int, cipher: Cipher, modulus: int, minimum: int, publish: bool) -> None:
        self._length, self._cipher, self._modulus, self._minimum = length, cipher, modulus, minimum
        self._publish = publish
        self.rounds = (self.add, self.learn)

    def add(self, answers: Bytes) -> Bytes:
        """Round 0."""
        self.uploads, self.contributors = answers, tuple(answers)
        require(len(answers), self._minimum, "with a ciphertext")
        received = [Encrypted.from_bytes(data) for data in answers.values()]
        public, count = received[0].public, len(received[0].blocks)
        if any(one.public != public or len(one.blocks) != count for one in received):
            raise AggregationAborted("ciphertexts must be of one key and one length, got others")
        total = {i: self._cipher.add(public, [one.blocks[i] for one in received]) for i in range(count)}
        return dict.fromkeys(answers, Encrypted(b"", total).to_bytes())

    def learn(self, answers: Bytes) -> Bytes:
        """Round 1: what a client publishes, if they do."""
        require(len(answers), 1, "with the decrypted sum")
        if self._publish:
            self.total = words(next(iter(answers.values())), self._length, self._modulus)
        return {}
