"""The control: a protocol in which every client sends its quantised update in the clear."""

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
    """Builds the protocol without any protection, with which the others are compared. Whoever answers is in the sum.

    An upload that was changed on its way changes the sum unnoticed.

    Args:
        num_clients: Number N of clients, at least 1.
        clip: Largest magnitude of an entry, positive and finite. Larger entries are clipped.
        bits: Number of bits of an entry, the sign included, from 2 to 31.

    Returns:
        The protocol.

    Raises:
        ValueError: If `Quantizer` refuses the arguments.

    Examples:
        The server reads the update of client 1 as it is:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import secure_aggregation as sa
        >>> updates = jnp.array([[0.5, -0.25], [0.25, 0.5]])
        >>> view = sa.aggregate(jax.random.key(0), sa.plain_sum(2, clip=1.0), updates)
        >>> [round(float(entry), 2) for entry in sa.observe(view, "client:1", jnp.zeros(2)).update]
        [0.25, 0.5]
    """
    quantizer = Quantizer(clip, bits, num_clients)

    def make_clients(residues: np.ndarray, randoms: Sequence[RandomBytes]) -> list[PlainClient]:
        del randoms
        return [PlainClient(client, vector) for client, vector in enumerate(residues)]

    return AggregationProtocol(
        "plain_sum", quantizer, 0, make_clients, lambda length, _: PlainServer(length, num_clients)
    )


class PlainClient(Client):
    """One client, which sends its vector as it is.

    Args:
        client: Number of the client.
        vector: Residues that the client puts into the sum, shape (p,).
    """

    def __init__(self, client: int, vector: np.ndarray) -> None:
        super().__init__(client, self.upload)
        self._vector = vector

    @client_round
    def upload(self, message: bytes) -> bytes:
        """Round 0: sends the vector."""
        del message
        return to_bytes(self._vector)


class PlainServer(Server):
    """The server, which adds what it is sent.

    Args:
        length: Length p of the vectors.
        num_clients: Number of clients.
    """

    def __init__(self, length: int, num_clients: int) -> None:
        super().__init__(num_clients)
        self._length = length
        self.rounds = (self.add,)

    @server_round
    def add(self, answers: Bytes) -> Bytes:
        """Round 0: adds the vectors."""
        require(len(answers), 1, "the upload")
        vectors = {client: words(data, self._length) for client, data in answers.items()}
        self.uploads, self.contributors = vectors, tuple(vectors)
        self.total = modular_sum(list(vectors.values()), 2**32)
        return {}
