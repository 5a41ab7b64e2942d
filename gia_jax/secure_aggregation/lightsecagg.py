"""LightSecAgg: each client adds one mask, and the server recovers the sum of the masks in one shot.

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
    """Builds the protocol LightSecAgg, which gives the sum over the clients that sent a masked input, modulo a prime.

    Any `survivors` answers give the sum.

    Threat model: an honest-but-curious server and up to `privacy` clients that collude with it learn the sum over the
    other contributors, and nothing else: of the masks information-theoretically so, on encrypted channels. A client
    answers every round once, but a server that tells clients different survivors is not noticed before it has their
    answers, and may learn more than a sum. From that only `secagg` with `consistency` protects.

    A masked input that was changed on its way, or that a client made of garbage, changes the sum unnoticed. Any other
    changed message ends the run or leaves the sum right, but for a chance of one in `prime`: the shared mask has one
    entry more, which verifies the sum of the masks. A client that answers with a wrong share on purpose can evade that.

    Args:
        num_clients: Number N of clients, such that N U is at most 2^22.
        privacy: Number T of colluding clients, at least 0 and below `survivors`.
        survivors: Number U of clients that must answer, at most N and at most 2,048. N - U clients may drop out.
        clip: Largest magnitude of an entry, positive and finite. Larger entries are clipped.
        bits: Number of bits of an entry, the sign included, from 2 to 31.
        prime: Modulus of the field, a prime above N + U and below 2^31.

    Returns:
        The protocol. For an update of p entries a client sends about (N - 1) (p + 1) / (U - T) entries beside
        its masked update.

    Raises:
        ValueError: If `Quantizer` or `packed_shamir` refuses the arguments, or T < U <= N does not hold.

    Examples:
        One of four clients never sends its masked input, and the sum is that of the others:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import secure_aggregation as sa
        >>> protocol = sa.lightsecagg(4, privacy=1, survivors=3, clip=1.0)
        >>> updates = jnp.array([[0.1, 0.2], [0.3, 0.4], [0.2, -0.1], [0.9, 0.9]])
        >>> view = sa.aggregate(jax.random.key(0), protocol, updates, dropouts={3: 2})
        >>> view.contributors, [round(float(entry), 2) for entry in view.aggregate]
        ((0, 1, 2), [0.6, 0.5])
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
    """The message of the server in round 2.

    Attributes:
        clients: Numbers of the clients that are in the sum.
    """

    clients: tuple[int, ...]


class LightSecAggClient(ShareClient):
    """One client of LightSecAgg: it shares a uniform mask, and sends its vector under it.

    Args:
        client: Number of the client.
        vector: Residues that the client puts into the sum, shape (p,).
        random: Source of randomness of the client.
        sharing: Sharing scheme of the protocol.
        survivors: Least number of clients in a sum that the client takes part in.
    """

    def __init__(self, client: int, vector: np.ndarray, random: RandomBytes, sharing: Sharing, survivors: int) -> None:
        mask = uniform(random, sharing.prime, vector.shape)
        super().__init__(client, mask, random, sharing, survivors, self.mask_input, self.sum_shares)
        self._masked = modular_sum([vector, mask], sharing.prime)

    @client_round
    def mask_input(self, message: bytes) -> bytes:
        """Round 2: keeps the shares that came, and sends the masked vector."""
        self.receive(message)
        return to_bytes(self._masked)

    @client_round
    def sum_shares(self, message: bytes) -> bytes:
        """Round 3: answers with the sum of the shares of the survivors' masks."""
        return self.sum_of(Survivors.from_bytes(message).clients)


class LightSecAggServer(ShareServer):
    """The server of LightSecAgg, which takes the sum of the masks off the sum of the masked vectors.

    Args:
        length: Length p of the vectors.
        sharing: Sharing scheme of the protocol.
        survivors: Number of clients that must answer.
    """

    def __init__(self, length: int, sharing: Sharing, survivors: int) -> None:
        super().__init__(length, sharing, survivors)
        self.rounds = (self.send_keys, self.send_boxes, self.send_survivors, self.recover_sum)

    @server_round
    def send_survivors(self, answers: Bytes) -> Bytes:
        """Round 2: tells all clients who sent a masked vector and so is in the sum."""
        self._masked = {client: words(data, self._length, self._sharing.prime) for client, data in answers.items()}
        self.uploads, self.contributors = self._masked, tuple(answers)
        require(len(answers), self._minimum, "with a masked input")
        return dict.fromkeys(answers, Survivors(self.contributors).to_bytes())

    @server_round
    def recover_sum(self, answers: Bytes) -> Bytes:
        """Round 3: recovers the sum of the masks, and with it the sum of the vectors."""
        prime = self._sharing.prime
        masked = modular_sum(list(self._masked.values()), prime)
        self.total = modular_sum([masked, np.uint32(prime) - self.recover(answers)], prime)
        return {}
