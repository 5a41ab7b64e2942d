"""One run of a protocol with all parties in this process, and what the server holds after it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree, UInt32

from gia_jax import _check
from gia_jax.base import Updates
from gia_jax.secure_aggregation.errors import AggregationAborted
from gia_jax.secure_aggregation.primitives import RandomBytes, insecure_random
from gia_jax.secure_aggregation.protocol.parties import AggregationProtocol, Client, Server
from gia_jax.secure_aggregation.protocol.residues import decode, quantized, require_residues
from gia_jax.secure_aggregation.quantization import Quantizer
from gia_jax.secure_aggregation.wire import Bytes

SERVER = -1


class Message(NamedTuple):
    """One message on its way. The number of the server is `SERVER`.

    Attributes:
        round: Number of the round, from 0.
        kind: Name of the step that made the message.
        sender: Number of the client or server that sent it.
        receiver: Number of the client or server that is to get it.
        payload: All that travels, as bytes.

    Examples:
        A client sends two residues of four bytes to the server:

        >>> import numpy as np
        >>> from gia_jax import secure_aggregation as sa
        >>> view = sa.aggregate_residues(sa.plain_sum(2, clip=1.0), np.array([[1, 2], [3, 4]], np.uint32))
        >>> message = view.transcript[1]
        >>> message.kind, message.sender, message.receiver, message.payload.hex()
        ('upload', 1, -1, '0300000004000000')
    """

    round: int
    kind: str
    sender: int
    receiver: int
    payload: bytes


class ServerView(NamedTuple):
    """Everything an honest-but-curious server holds after a run. Attacks see it through `observe` only.

    Attributes:
        protocol: Name of the protocol.
        quantizer: Quantizer of the protocol, which is public.
        like: One client's update as `jax.ShapeDtypeStruct`s. It is public, as the shape of the model is.
        uploads: What each client sent in place of its update, by client: residues, shape (p,), or ciphertext bytes.
        contributors: Numbers of the clients in the sum.
        total: Residues of the sum, shape (p,). None where the server does not learn it.
        transcript: Every message, in order.

    Examples:
        >>> import numpy as np
        >>> from gia_jax import secure_aggregation as sa
        >>> residues = np.array([[1, 2], [3, 4]], np.uint32)
        >>> view = sa.aggregate_residues(sa.secagg(2, threshold=2, clip=1.0), residues)
        >>> view.total.tolist(), view.contributors
        ([4, 6], (0, 1))
        >>> bool(np.array_equal(view.uploads[0], residues[0]))
        False
    """

    protocol: str
    quantizer: Quantizer
    like: PyTree[jax.ShapeDtypeStruct]
    uploads: Mapping[int, Any]
    contributors: tuple[int, ...]
    total: UInt32[np.ndarray, " p"] | None
    transcript: tuple[Message, ...]

    @property
    def aggregate(self) -> Updates | None:
        """The sum of the contributors' updates, a tree like one of them. None where the server does not learn it.

        It is in float32 also where the clients' updates are in half precision, which a sum may not fit into.
        """
        return None if self.total is None else decode(self.quantizer, self.total, self.like)

    def num_bytes(self, client: int) -> int:
        """Counts the bytes that one client sends and receives.

        Args:
            client: Number of the client.

        Returns:
            The number of bytes of all its messages.
        """
        return sum(len(m.payload) for m in self.transcript if client in (m.sender, m.receiver))


def aggregate(
    key: PRNGKeyArray,
    protocol: AggregationProtocol,
    updates: Updates,
    *,
    dropouts: Mapping[int, int] | None = None,
    insecure_seed: int | None = None,
) -> ServerView:
    """Runs a protocol once, with all parties in this process.

    Each party is given nothing but its own input and bytes. The run cannot be traced: it is work of the host.

    Args:
        key: Random key of the clients' stochastic rounding: client i draws from `fold_in(key, i)`. No secret depends on
            it.
        protocol: Protocol to run, such as `secagg(...)`.
        updates: Updates of all clients: a tree of floats, every leaf with a leading axis of the protocol's number of
            clients.
        dropouts: The first round that a client does not answer, by client. By default all clients answer every round.
        insecure_seed: Seed of a reproducible run, an integer of at least 0, for experiments only: whoever knows it
            knows every secret, and two runs with one seed use the same masks. None draws every secret from the
            operating system.

    Returns:
        The server's view.

    Raises:
        ValueError: If the updates are of another number of clients, or not finite, `dropouts` names unknown clients or
            rounds, or `insecure_seed` is no such number.
        AggregationAborted: If too few clients answered, or a party refused a message.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import secure_aggregation as sa
        >>> updates = {"w": jnp.array([[0.5, -0.25], [0.25, 0.5], [0.5, 0.5]])}
        >>> view = sa.aggregate(jax.random.key(0), sa.secagg(3, threshold=2, clip=1.0), updates, dropouts={2: 1})
        >>> view.contributors, [round(float(entry), 2) for entry in view.aggregate["w"]]
        ((0, 1), [0.75, 0.25])
    """
    residues, like = quantized(key, protocol, updates)
    return aggregate_residues(protocol, residues, like=like, dropouts=dropouts, insecure_seed=insecure_seed)


def aggregate_residues(
    protocol: AggregationProtocol,
    residues: UInt32[np.ndarray, "n p"],
    *,
    like: PyTree[jax.ShapeDtypeStruct] | None = None,
    dropouts: Mapping[int, int] | None = None,
    insecure_seed: int | None = None,
) -> ServerView:
    """Runs a protocol once, like `aggregate`, on vectors that are residues already.

    Args:
        protocol: Protocol to run, such as `secagg(...)`.
        residues: Residues of every client, uint32, below the quantizer's modulus, shape (n, p).
        like: One client's update, of p entries in all, as a tree of shapes. None stands for a vector.
        dropouts: The first round that a client does not answer, by client. By default all clients answer every round.
        insecure_seed: Seed of a reproducible run, an integer of at least 0, for experiments only: whoever knows it
            knows every secret. None draws every secret from the operating system.

    Returns:
        The server's view.

    Raises:
        ValueError: If the residues are of another type or number of clients, or out of range, `like` is of another
            size, `dropouts` names unknown clients or rounds, or `insecure_seed` is no number, or negative.
        AggregationAborted: If too few clients answered, or a party refused a message.

    Examples:
        The sum is exact modulo 2^32:

        >>> import numpy as np
        >>> from gia_jax import secure_aggregation as sa
        >>> residues = np.array([[1, 2], [3, 2**32 - 1]], np.uint32)
        >>> sa.aggregate_residues(sa.secagg(2, threshold=2, clip=1.0), residues).total.tolist()
        [4, 1]
    """
    count = protocol.quantizer.num_clients
    if residues.ndim != 2 or residues.shape[0] != count or residues.shape[1] == 0:
        raise ValueError(f"residues must have shape ({count}, p > 0), got {residues.shape}")
    require_residues("residues", residues, protocol.quantizer.modulus)
    length = residues.shape[1]
    like = jax.ShapeDtypeStruct((length,), np.float32) if like is None else like
    if (size := sum(leaf.size for leaf in jax.tree.leaves(like))) != length:
        raise ValueError(f"like must have {length} entries, as residues have, got {size}")
    dropouts = {} if dropouts is None else dropouts
    whole = {client for client in dropouts if isinstance(client, int | np.integer) and not isinstance(client, bool)}
    if unknown := [client for client in dropouts if client not in whole or not 0 <= client < count]:
        raise ValueError(f"dropouts must name clients from 0 to {count - 1}, got {unknown[0]}")
    if insecure_seed is not None:
        _check.integer(0, insecure_seed=insecure_seed)
    randoms: list[RandomBytes] = [
        os.urandom if insecure_seed is None else insecure_random(insecure_seed, party) for party in range(count + 1)
    ]
    server = protocol.make_server(length, randoms[count])
    for client, number in dropouts.items():
        _check.integer(0, len(server.rounds), **{f"dropouts[{client}]": number})
    clients = protocol.make_clients(residues, randoms[:count])
    transcript: list[Message] = []

    def view() -> ServerView:
        return ServerView(
            protocol.name,
            protocol.quantizer,
            like,
            dict(server.uploads),
            tuple(server.contributors),
            server.total,
            tuple(transcript),
        )

    try:
        for message in exchange(clients, server, dropouts):
            transcript.append(message)
    except AggregationAborted as aborted:
        aborted.view = view()
        raise
    return view()


def exchange(clients: Sequence[Client], server: Server, dropouts: Mapping[int, int]) -> Iterator[Message]:
    """Carries the messages of all rounds between the clients and the server, and yields each.

    Args:
        clients: The clients, in the order of their numbers.
        server: The server.
        dropouts: The first round that a client does not answer, by client.

    Yields:
        Each message, in order.
    """
    messages: Bytes = dict.fromkeys(range(len(clients)), b"")
    for number, server_round in enumerate(server.rounds):
        answers = {}
        for client, message in messages.items():
            if dropouts.get(client, len(server.rounds)) > number:
                step = clients[client].rounds[number]
                answers[client] = step(message)
                yield Message(number, step.__name__, client, SERVER, answers[client])
        messages = server_round(answers)
        for client, message in messages.items():
            yield Message(number, server_round.__name__, SERVER, client, message)
