"""The control: every client sends its quantised update in the clear."""

from collections.abc import Sequence

import numpy as np

from gia_jax.secure_aggregation.primitives import RandomBytes
from gia_jax.secure_aggregation.protocol import (
    AggregationProtocol,
    Client,
    Server,
    client_round,
    modular_sum,
    require,
    server_round,
    to_bytes,
    words,
)
from gia_jax.secure_aggregation.quantization import Quantizer
from gia_jax.secure_aggregation.wire import Bytes


def plain_sum(num_clients: int, *, clip: float, bits: int = 22) -> AggregationProtocol:
    """No protection: what the protocols are compared with. Whoever answers is in the sum.

    An upload that was changed on its way changes the sum unnoticed.

    Args:
        num_clients: Number N of clients.
        clip: Largest magnitude of an entry, > 0 and finite; larger ones are clipped.
        bits: Number of bits of an entry, the sign included, from 2 to 31.

    Returns:
        The protocol.

    Raises:
        ValueError: Arguments that `Quantizer` refuses.
    """
    quantizer = Quantizer(clip, bits, num_clients)

    def make_clients(residues: np.ndarray, randoms: Sequence[RandomBytes]) -> list[PlainClient]:
        del randoms
        return [PlainClient(client, vector) for client, vector in enumerate(residues)]

    return AggregationProtocol(
        "plain_sum", quantizer, 0, make_clients, lambda length, _: PlainServer(length, num_clients)
    )


class PlainClient(Client):
    """Sends its vector."""

    def __init__(self, client: int, vector: np.ndarray) -> None:
        super().__init__(client, self.upload)
        self._vector = vector

    @client_round
    def upload(self, message: bytes) -> bytes:
        """Round 0."""
        del message
        return to_bytes(self._vector)


class PlainServer(Server):
    """Adds what it is sent."""

    def __init__(self, length: int, num_clients: int) -> None:
        super().__init__(num_clients)
        self._length = length
        self.rounds = (self.add,)

    @server_round
    def add(self, answers: Bytes) -> Bytes:
        """Round 0."""
        require(len(answers), 1, "the upload")
        vectors = {client: words(data, self._length) for client, data in answers.items()}
        self.uploads, self.contributors = vectors, tuple(vectors)
        self.total = modular_sum(list(vectors.values()), 2**32)
        return {}
