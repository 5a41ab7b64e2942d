"""LightSecAgg: one mask a client, and the sum of the masks in one shot.

So et al., LightSecAgg: a Lightweight and Versatile Design for Secure Aggregation in Federated Learning, MLSys 2022,
algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gia_jax import _check
from gia_jax.secure_aggregation.primitives import RandomBytes, uniform
from gia_jax.secure_aggregation.protocol import (
    AggregationProtocol,
    client_round,
    modular_sum,
    require,
    server_round,
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
    other contributors, and nothing else: of the masks information-theoretically so, on encrypted channels. A client
    answers every round once, but a server that tells clients different survivors is not noticed before it has their
    answers, and may learn more than a sum: from that only `secagg` with `consistency` protects.

    A masked input that was changed on its way, or that a client made of garbage, changes the sum unnoticed. Any other
    changed message ends the run or leaves the sum right, but for a chance of one in `prime`: the shared mask has one
    entry more, which verifies the sum of the masks. A client that answers with a wrong share on purpose can evade that.

    Args:
        num_clients: Number N of clients, so that N U is at most 2^22.
        privacy: Number T of colluding clients, not negative, below `survivors`.
        survivors: Number U of clients that must answer, at most N and 2,048; N - U clients may drop out.
        clip: Largest magnitude of an entry, > 0 and finite; larger ones are clipped.
        bits: Number of bits of an entry, the sign included, from 2 to 31.
        prime: Modulus of the field, a prime above N + U and below 2^31.

    Returns:
        The protocol. For an update of p entries a client sends about (N - 1) (p + 1) / (U - T) entries beside
        its masked update.

    Raises:
        ValueError: Arguments that `Quantizer` or `packed_shamir` refuses, or T < U <= N does not hold.
    """
    _check.integer(num_clients=num_clients, survivors=survivors)
    _check.integer(0, privacy=privacy)
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


class LightSecAggClient(ShareClient):
    """One client: it shares a uniform mask, and sends its vector under it."""

    def __init__(self, client: int, vector: np.ndarray, random: RandomBytes, sharing: Sharing, survivors: int) -> None:
        mask = uniform(random, sharing.prime, vector.shape)
        super().__init__(client, mask, random, sharing, survivors, self.mask_input, self.sum_shares)
        self._masked = modular_sum([vector, mask], sharing.prime)

    @client_round
    def mask_input(self, message: bytes) -> bytes:
        """Round 2."""
        self.receive(message)
        return to_bytes(self._masked)

    @client_round
    def sum_shares(self, message: bytes) -> bytes:
        """Round 3."""
        return self.sum_of(Survivors.from_bytes(message).clients)


class LightSecAggServer(ShareServer):
    """The server."""

    def __init__(self, length: int, sharing: Sharing, survivors: int) -> None:
        super().__init__(length, sharing, survivors)
        self.rounds = (self.send_keys, self.send_boxes, self.send_survivors, self.recover_sum)

    @server_round
    def send_survivors(self, answers: Bytes) -> Bytes:
        """Round 2."""
        self._masked = {client: words(data, self._length, self._sharing.prime) for client, data in answers.items()}
        self.uploads, self.contributors = self._masked, tuple(answers)
        require(len(answers), self._minimum, "with a masked input")
        return dict.fromkeys(answers, Survivors(self.contributors).to_bytes())

    @server_round
    def recover_sum(self, answers: Bytes) -> Bytes:
        """Round 3."""
        prime = self._sharing.prime
        masked = modular_sum(list(self._masked.values()), prime)
        self.total = modular_sum([masked, np.uint32(prime) - self.recover(answers)], prime)
        return {}
