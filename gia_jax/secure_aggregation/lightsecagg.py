"""LightSecAgg: one mask a client, and the sum of the masks in one shot.

So et al., LightSecAgg: a Lightweight and Versatile Design for Secure Aggregation in Federated Learning, MLSys 2022,
algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gia_jax.secure_aggregation.primitives import RandomBytes, uniform
from gia_jax.secure_aggregation.protocol import (
    AggregationProtocol,
    Client,
    Server,
    modular_sum,
    require,
    to_bytes,
    words,
)
from gia_jax.secure_aggregation.quantization import Quantizer
from gia_jax.secure_aggregation.sharing import ShareClient, ShareServer, Sharing, packed_shamir
from gia_jax.secure_aggregation.wire import Bytes, Wire


def lightsecagg(
    num_clients: int, *, privacy: int, survivors: int, clip: float, bits: int = 22, prime: int = 2**31 - 1
) -> AggregationProtocol:
    """The sum over the clients that sent a masked input, modulo a prime; any `survivors` answers give it.

    Threat model: an honest-but-curious server and up to `privacy` clients that collude with it learn the sum over the
    other contributors, and nothing else: of the masks information-theoretically so, on encrypted channels. Clients that
    send garbage are not noticed, nor is a server that lies about who dropped out.

    Args:
        num_clients: N.
        privacy: T, not negative, below `survivors`.
        survivors: U, at most N; N - U clients may drop out.
        clip: Largest magnitude of an entry.
        bits: Bits an entry.
        prime: Of the field, below 2^31.

    Returns:
        The protocol. A client sends (N - 1) / (U - T) times the length of its update beside its masked update.

    Raises:
        ValueError: As `Quantizer`, or T < U <= N does not hold.
    """
    if not 0 <= privacy < survivors <= num_clients:
        raise ValueError(
            f"privacy and survivors must hold 0 <= privacy < survivors <= {num_clients}, got {privacy} and {survivors}"
        )
    quantizer = Quantizer(clip, bits, num_clients, prime)
    sharing = packed_shamir(num_clients, num_secrets=survivors - privacy, privacy=privacy, prime=prime)

    def make_clients(residues: np.ndarray, randoms: Sequence[RandomBytes]) -> list[LightSecAggClient]:
        return [LightSecAggClient(i, *own, sharing, survivors) for i, own in enumerate(zip(residues, randoms))]

    def make_server(length: int, random: RandomBytes) -> LightSecAggServer:
        del random
        return LightSecAggServer(length, sharing, survivors)

    return AggregationProtocol("lightsecagg", quantizer, privacy, make_clients, make_server)


@dataclass(frozen=True)
class Survivors(Wire):
    """Who is in the sum."""

    clients: tuple[int, ...]


class LightSecAggClient(Client):
    """One client: it shares a uniform mask, and sends its vector under it."""

    def __init__(self, client: int, vector: np.ndarray, random: RandomBytes, sharing: Sharing, survivors: int) -> None:
        self._vector, self._prime = vector, sharing.prime
        self._mask = uniform(random, sharing.prime, vector.shape)
        self._shares = ShareClient(client, self._mask, random, sharing, survivors)
        self.rounds = (self._shares.advertise_keys, self._shares.share, self.mask_input, self.sum_shares)

    def mask_input(self, message: bytes) -> bytes:
        """Round 2."""
        self._shares.receive(message)
        return to_bytes(modular_sum([self._vector, self._mask], self._prime))

    def sum_shares(self, message: bytes) -> bytes:
        """Round 3."""
        return self._shares.sum_shares(Survivors.from_bytes(message).clients)


class LightSecAggServer(Server):
    """The server."""

    def __init__(self, length: int, sharing: Sharing, survivors: int) -> None:
        self._length, self._prime, self._survivors = length, sharing.prime, survivors
        self._shares = ShareServer(length, sharing, survivors)
        self.rounds = (self._shares.send_keys, self._shares.send_boxes, self.send_survivors, self.recover_sum)

    def send_survivors(self, answers: Bytes) -> Bytes:
        """Round 2."""
        self._masked = {client: words(data, self._length, self._prime) for client, data in answers.items()}
        self.uploads, self.contributors = self._masked, tuple(answers)
        require(len(answers), self._survivors, "with a masked input")
        return dict.fromkeys(answers, Survivors(self.contributors).to_bytes())

    def recover_sum(self, answers: Bytes) -> Bytes:
        """Round 3."""
        mask = self._shares.recover(answers)
        masked = modular_sum(list(self._masked.values()), self._prime)
        self.total = modular_sum([masked, np.uint32(self._prime) - mask], self._prime)
        return {}
