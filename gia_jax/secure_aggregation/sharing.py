"""Sharing a whole vector: linear secret sharing, several secrets in one share, and its exchange between clients.

Franklin and Yung, Communication Complexity of Secure Computation, STOC 1992, for `packed_shamir`; it is also the
Lagrange coding of LightSecAgg (So et al., MLSys 2022, section 4).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt32

from gia_jax.secure_aggregation.finite_field import lagrange, matmul
from gia_jax.secure_aggregation.primitives import Mailbox, RandomBytes, uniform
from gia_jax.secure_aggregation.protocol import (
    AggregationAborted,
    modular_sum,
    require,
    require_own_keys,
    to_bytes,
    words,
)
from gia_jax.secure_aggregation.wire import ByClient, Bytes


class Sharing(NamedTuple):
    """A linear scheme: sums of shares are shares of sums.

    Attributes:
        prime: Of the field.
        num_shares: One for every client.
        num_secrets: Secrets in one block.
        privacy: Shares that together say nothing of the secrets.
        share: From randomness and blocks of secrets, shape (num_secrets, m), the shares, (num_shares, m).
        recover: From shares by client, shape (m,) each, the secrets; AggregationAborted where they are too few.
    """

    prime: int
    num_shares: int
    num_secrets: int
    privacy: int
    share: Callable[[RandomBytes, np.ndarray], np.ndarray]
    recover: Callable[[Mapping[int, np.ndarray]], np.ndarray]


def packed_shamir(num_shares: int, *, num_secrets: int, privacy: int, prime: int = 2**31 - 1) -> Sharing:
    """A polynomial through the secrets and `privacy` random values: any num_secrets + privacy shares determine it.

    Args:
        num_shares: N.
        num_secrets: S, at least 1.
        privacy: T, not negative, S + T <= N.
        prime: Above N + S + T and below 2^31.

    Returns:
        The scheme.

    Raises:
        ValueError: An argument out of range.
    """
    needed = num_secrets + privacy
    if num_secrets < 1 or privacy < 0 or needed > num_shares:
        raise ValueError(f"num_secrets + privacy must be from 1 to {num_shares}, got {num_secrets} + {privacy}")
    if not num_shares + needed < prime < 2**31:
        raise ValueError(f"prime must be above {num_shares + needed} and below 2^31, got {prime}")
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
    """A vector, padded with zeros, as blocks: the columns."""
    return np.pad(vector, (0, -vector.size % num_secrets)).reshape(num_secrets, -1)


class ShareClient:
    """A client that shares one vector among all, and answers with the sum of what it holds, once.

    Args:
        client: Its number.
        secret: The vector of residues that it shares, shape (p,).
        random: Its source of randomness.
        sharing: The scheme.
        minimum: Clients in a sum that it takes part in.
    """

    def __init__(self, client: int, secret: np.ndarray, random: RandomBytes, sharing: Sharing, minimum: int) -> None:
        self._client, self._secret, self._random, self._sharing = client, secret, random, sharing
        self._minimum = minimum
        self._mailbox = Mailbox(client, random)
        self._answered = False

    def advertise_keys(self, message: bytes) -> bytes:
        """The public key of its channels."""
        del message
        return self._mailbox.public

    def share(self, message: bytes) -> bytes:
        """A box for every peer, with its share of the vector."""
        keys = ByClient.from_bytes(message).contents
        require_own_keys(self._client, self._mailbox.public, keys, keys.values())
        shares = self._sharing.share(self._random, to_blocks(self._secret, self._sharing.num_secrets))
        self._own_share = shares[self._client]
        boxes = {}
        for peer in keys:
            if peer != self._client:
                self._mailbox.connect(peer, keys[peer])
                boxes[peer] = self._mailbox.seal(peer, to_bytes(shares[peer]))
        return ByClient(boxes).to_bytes()

    def receive(self, message: bytes) -> None:
        """Keeps the boxes for it."""
        self._boxes = ByClient.from_bytes(message).contents

    @property
    def senders(self) -> tuple[int, ...]:
        """Whose shares it holds, its own included."""
        return tuple(sorted({*self._boxes, self._client}))

    def sum_shares(self, contributors: tuple[int, ...]) -> bytes:
        """The sum of the contributors' shares. A second sum would give away differences: it is refused."""
        if self._answered:
            raise AggregationAborted(f"client {self._client} was asked for a second sum")
        if unknown := set(contributors) - set(self.senders):
            raise AggregationAborted(f"client {min(unknown)} shared nothing with client {self._client}")
        require(len(contributors), self._minimum, "and are to be summed")
        self._answered = True
        held = [self._open(sender) for sender in contributors]
        return to_bytes(modular_sum(held, self._sharing.prime))

    def _open(self, sender: int) -> np.ndarray:
        if sender == self._client:
            return self._own_share
        return words(self._mailbox.open(sender, self._boxes[sender]), self._own_share.size, self._sharing.prime)


class ShareServer:
    """The server of such an exchange: it forwards keys and boxes, and recovers the sum of the vectors.

    Args:
        length: p.
        sharing: The scheme.
        minimum: Clients that must answer.
    """

    def __init__(self, length: int, sharing: Sharing, minimum: int) -> None:
        self._length, self._sharing, self._minimum = length, sharing, minimum

    def send_keys(self, answers: Bytes) -> Bytes:
        """To everybody everybody's key."""
        require(len(answers), self._minimum, "with keys")
        return dict.fromkeys(answers, ByClient(answers).to_bytes())

    def send_boxes(self, answers: Bytes) -> Bytes:
        """To each client the boxes for it."""
        require(len(answers), self._minimum, "with shares")
        boxes = {sender: ByClient.from_bytes(data).contents for sender, data in answers.items()}
        return {
            client: ByClient({sender: boxes[sender][client] for sender in boxes if sender != client}).to_bytes()
            for client in answers
        }

    def recover(self, answers: Bytes) -> UInt32[np.ndarray, " p"]:
        """The sum of the contributors' vectors, from the clients' sums of shares."""
        blocks = -(-self._length // self._sharing.num_secrets)
        shares = {client: words(data, blocks, self._sharing.prime) for client, data in answers.items()}
        return self._sharing.recover(shares).reshape(-1)[: self._length]
