"""Sharing a whole vector: linear secret sharing, several secrets in one share, and its exchange between clients.

Franklin and Yung, Communication Complexity of Secure Computation, STOC 1992, for `packed_shamir`; it is also the
Lagrange coding of LightSecAgg (So et al., MLSys 2022, section 4).

Departure: the shared vector has one entry more, a public linear combination of the others with pseudo-random
coefficients, none of them zero. The recovered sum has it as well, so that it verifies itself: where a share was
changed, or clients added up shares of different contributors, the run ends, but for a chance of one in `prime`. It
costs no privacy, because it is linear: of one vector it is shared like the rest, and of the sum it follows from the
sum. It is no signature: a client that knows it can change its share so that the sum is wrong and still verifies.
"""

import hashlib
from collections.abc import Callable, Mapping
from operator import index
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt32

from gia_jax import _check
from gia_jax.secure_aggregation.errors import AggregationAborted, MalformedMessage
from gia_jax.secure_aggregation.finite_field import LIMB, is_prime, lagrange, matmul
from gia_jax.secure_aggregation.primitives import Mailbox, RandomBytes, keystream, uniform
from gia_jax.secure_aggregation.protocol import (
    Client,
    Server,
    client_round,
    modular_sum,
    require,
    require_own_keys,
    server_round,
    to_bytes,
    words,
)
from gia_jax.secure_aggregation.wire import ByClient, Bytes

MATRIX = 2**22  # most entries of a code's matrix: Python computes each, which takes seconds


class Sharing(NamedTuple):
    """A linear secret sharing scheme of blocks of secrets: sums of shares are shares of sums.

    Attributes:
        prime: Modulus of the field.
        num_shares: Number of shares, one for every client.
        num_secrets: Number of secrets in one block.
        privacy: Number of shares that together say nothing of the secrets.
        share: Function `(random, blocks) -> shares` that makes from randomness and blocks of secrets, shape
            (num_secrets, m), the shares, shape (num_shares, m).
        recover: Function `(shares) -> blocks` that finds the secrets from shares by client, shape (m,) each. It raises
            AggregationAborted where they are too few.

    Examples:
        The sum of the shares of 7 and of 8 gives 15:

        >>> import os
        >>> import numpy as np
        >>> from gia_jax import secure_aggregation as sa
        >>> sharing = sa.packed_shamir(3, num_secrets=1, privacy=1)
        >>> first, second = (sharing.share(os.urandom, np.array([[one]], np.uint32)) for one in (7, 8))
        >>> total = ((first.astype(np.uint64) + second) % sharing.prime).astype(np.uint32)
        >>> sharing.recover({0: total[0], 2: total[2]}).tolist()
        [[15]]
    """

    prime: int
    num_shares: int
    num_secrets: int
    privacy: int
    share: Callable[[RandomBytes, np.ndarray], np.ndarray]
    recover: Callable[[Mapping[int, np.ndarray]], np.ndarray]


def packed_shamir(num_shares: int, *, num_secrets: int, privacy: int, prime: int = 2**31 - 1) -> Sharing:
    """Builds packed Shamir sharing: a polynomial through the secrets and `privacy` random values.

    Any num_secrets + privacy shares determine the polynomial.

    Args:
        num_shares: Number N of shares, such that N (S + T) is at most 2^22.
        num_secrets: Number S of secrets in a block, at least 1.
        privacy: Number T of shares that say nothing of the secrets, at least 0. S + T is at most N and at most 2,048.
        prime: Modulus of the field, a prime above N + S + T and below 2^31.

    Returns:
        The scheme.

    Raises:
        ValueError: If an argument is out of range, or no integer.

    Examples:
        Two secrets are shared among five clients, and any three shares give them:

        >>> import os
        >>> import numpy as np
        >>> from gia_jax import secure_aggregation as sa
        >>> sharing = sa.packed_shamir(5, num_secrets=2, privacy=1)
        >>> shares = sharing.share(os.urandom, np.array([[7], [8]], np.uint32))
        >>> sharing.recover({client: shares[client] for client in (0, 2, 4)}).tolist()
        [[7], [8]]
    """
    _check.integer(num_shares=num_shares, num_secrets=num_secrets, prime=prime)
    _check.integer(0, privacy=privacy)
    # Python's integers: those of NumPy may overflow.
    num_shares, num_secrets, privacy, prime = map(index, (num_shares, num_secrets, privacy, prime))
    needed = num_secrets + privacy
    if needed > num_shares:
        raise ValueError(f"num_secrets + privacy must be from 1 to {num_shares}, got {num_secrets} + {privacy}")
    if needed > 2**LIMB or num_shares * needed > MATRIX:
        raise ValueError(
            f"num_secrets + privacy must be at most {2**LIMB}, and times num_shares at most {MATRIX}, "
            f"got {needed} times {num_shares}"
        )
    if not (num_shares + needed < prime < 2**31 and is_prime(prime)):
        raise ValueError(f"prime must be one, above {num_shares + needed} and below 2^31, got {prime}")
    inside = range(num_shares + 1, num_shares + 1 + needed)
    encoding = lagrange(inside, range(1, num_shares + 1), prime)

    def share(random: RandomBytes, secrets: np.ndarray) -> np.ndarray:
        noise = uniform(random, prime, (privacy, secrets.shape[1]))
        return matmul(encoding, np.concatenate([secrets, noise]), prime)

    def recover(shares: Mapping[int, np.ndarray]) -> np.ndarray:
        require(len(shares), needed, "with their sum of shares")
        clients = sorted(shares)[:needed]
        decoding = lagrange([client + 1 for client in clients], inside[:num_secrets], prime)
        return matmul(decoding, np.stack([shares[client] for client in clients]), prime)

    return Sharing(prime, num_shares, num_secrets, privacy, share, recover)


def to_blocks(vector: UInt32[np.ndarray, " p"], num_secrets: int) -> UInt32[np.ndarray, "s m"]:
    """Arranges a vector, padded with zeros, in blocks: the columns of the result.

    Args:
        vector: Residues, shape (p,).
        num_secrets: Number of secrets in a block.

    Returns:
        The blocks, shape (num_secrets, m) with the least m for which they hold the vector.

    Examples:
        >>> import numpy as np
        >>> from gia_jax.secure_aggregation.sharing import to_blocks
        >>> to_blocks(np.array([1, 2, 3], np.uint32), 2).tolist()
        [[1, 2], [3, 0]]
    """
    return np.pad(vector, (0, -vector.size % num_secrets)).reshape(num_secrets, -1)


def _combination(vector: np.ndarray, prime: int) -> UInt32[np.ndarray, " 1"]:
    """Returns the linear combination of a vector of residues that verifies it, as a vector of one entry."""
    stream = keystream(hashlib.sha256(b"gia_jax secure aggregation 1, sum of a shared vector").digest(), vector.size)
    coefficients = 1 + stream.astype(np.uint64) % np.uint64(prime - 1)
    return np.array([np.sum(coefficients * vector % np.uint64(prime)) % np.uint64(prime)], np.uint32)


class ShareClient(Client):
    """A client that shares one vector among all, and answers with the sum of what it holds.

    Args:
        client: Number of the client.
        secret: Vector of residues that the client shares, shape (p,).
        random: Source of randomness of the client.
        sharing: Sharing scheme of the protocol.
        minimum: Least number of clients in a sum that the client takes part in.
        rounds: Rounds of the protocol that come after the exchange of shares.
    """

    def __init__(
        self,
        client: int,
        secret: np.ndarray,
        random: RandomBytes,
        sharing: Sharing,
        minimum: int,
        *rounds: Callable[[bytes], bytes],
    ) -> None:
        super().__init__(client, self.advertise_keys, self.share, *rounds)
        self._secret, self._random, self._sharing = secret, random, sharing
        self._minimum = minimum
        self._mailbox = Mailbox(client, random)

    @client_round
    def advertise_keys(self, message: bytes) -> bytes:
        """Round 0: sends the public key of its channels."""
        del message
        return self._mailbox.public

    @client_round
    def share(self, message: bytes) -> bytes:
        """Round 1: sends a box for every peer, with its share of the vector."""
        keys = ByClient.from_bytes(message).contents
        require_own_keys(self._client, self._mailbox.public, keys, keys.values())
        if unknown := [peer for peer in keys if peer >= self._sharing.num_shares]:
            raise MalformedMessage(
                f"client {self._client} got a key of client {unknown[0]}, for whom there is no share"
            )
        verified = np.concatenate([self._secret, _combination(self._secret, self._sharing.prime)])
        shares = self._sharing.share(self._random, to_blocks(verified, self._sharing.num_secrets))
        self._held = {self._client: shares[self._client]}
        boxes = {}
        for peer in keys:
            if peer != self._client:
                self._mailbox.connect(peer, keys[peer])
                boxes[peer] = self._mailbox.seal(peer, to_bytes(shares[peer]))
        return ByClient(boxes).to_bytes()

    def receive(self, message: bytes) -> None:
        """Opens the boxes for this client, and keeps the shares in them.

        Args:
            message: Boxes by sender, as the server sent them.

        Raises:
            MalformedMessage: If a box does not open, or holds no share.
        """
        blocks, prime = self._held[self._client].size, self._sharing.prime
        for sender, box in ByClient.from_bytes(message).contents.items():
            self._held[sender] = words(self._mailbox.open(sender, box), blocks, prime)

    @property
    def senders(self) -> tuple[int, ...]:
        """The numbers of the clients whose shares this client holds, itself included."""
        return tuple(sorted(self._held))

    def sum_of(self, contributors: tuple[int, ...]) -> bytes:
        """Adds the contributors' shares.

        Args:
            contributors: Numbers of the clients in the sum.

        Returns:
            The sum of their shares, as it travels.

        Raises:
            MalformedMessage: If one of them shared nothing with this client.
            AggregationAborted: If they are too few.
        """
        if unknown := set(contributors) - set(self._held):
            raise MalformedMessage(f"client {min(unknown)} shared nothing with client {self._client}")
        require(len(contributors), self._minimum, "and are to be summed")
        return to_bytes(modular_sum([self._held[sender] for sender in contributors], self._sharing.prime))


class ShareServer(Server):
    """The server of such an exchange, which forwards keys and boxes, and recovers the sum of the vectors.

    Args:
        length: Length p of the vectors.
        sharing: Sharing scheme of the protocol.
        minimum: Least number of clients that must answer.
    """

    def __init__(self, length: int, sharing: Sharing, minimum: int) -> None:
        super().__init__(sharing.num_shares)
        self._length, self._sharing, self._minimum = length, sharing, minimum

    @server_round
    def send_keys(self, answers: Bytes) -> Bytes:
        """Round 0: sends everybody's key to everybody."""
        require(len(answers), self._minimum, "with keys")
        self._owners = set(answers)
        return dict.fromkeys(answers, ByClient(answers).to_bytes())

    @server_round
    def send_boxes(self, answers: Bytes) -> Bytes:
        """Round 1: sends each client the boxes for it."""
        require(len(answers), self._minimum, "with shares")
        boxes = {sender: ByClient.from_bytes(data).contents for sender, data in answers.items()}
        for sender, sent in boxes.items():
            if set(sent) != self._owners - {sender}:
                raise MalformedMessage(f"client {sender} sent boxes for others than those that advertised keys")
        return {
            client: ByClient({sender: boxes[sender][client] for sender in boxes if sender != client}).to_bytes()
            for client in answers
        }

    def recover(self, answers: Bytes) -> UInt32[np.ndarray, " p"]:
        """Recovers the sum of the contributors' vectors from the clients' sums of shares, and verifies it.

        Args:
            answers: Sums of shares, by client.

        Returns:
            The sum, shape (p,).

        Raises:
            MalformedMessage: If a sum of shares is of another length, or not of residues.
            AggregationAborted: If there are too few of them, or they are not of one sum of vectors.
        """
        blocks, prime = -(-(self._length + 1) // self._sharing.num_secrets), self._sharing.prime
        shares = {client: words(data, blocks, prime) for client, data in answers.items()}
        found = self._sharing.recover(shares).reshape(-1)
        total, rest = np.split(found, [self._length])
        if rest[0] != _combination(total, prime)[0] or np.any(rest[1:]):
            raise AggregationAborted("the sums of shares are not of one sum of vectors")
        return total
