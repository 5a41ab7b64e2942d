"""The two sides of an aggregation protocol, a client and the server, and the protocol that makes them."""

import functools
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gia_jax.secure_aggregation.errors import AggregationAborted, MalformedMessage
from gia_jax.secure_aggregation.primitives import RandomBytes
from gia_jax.secure_aggregation.quantization import Quantizer
from gia_jax.secure_aggregation.wire import Bytes


class Client:
    """One client's side of a protocol. It keeps its secrets, and talks in bytes only.

    Every round is a method that `client_round` decorates: it answers once, in the order of `rounds`.

    Attributes:
        rounds: A function for each round, which makes from the server's message the client's answer.

    Args:
        client: Number of the client.
        rounds: The methods that become the attribute, in order.
    """

    rounds: Sequence[Callable[[bytes], bytes]]

    def __init__(self, client: int, *rounds: Callable[[bytes], bytes]) -> None:
        self._client, self.rounds = client, rounds
        self._left = [step.__name__ for step in rounds]


ClientType = TypeVar("ClientType", bound=Client)


def client_round(step: Callable[[ClientType, bytes], bytes]) -> Callable[[ClientType, bytes], bytes]:
    """Makes a method of a client one of its rounds.

    Two answers to one round would differ by secrets, such as a single pairwise mask. So the round counts as taken
    before it runs, and a client that was asked out of order, or that raised, is finished: it raises AggregationAborted
    whatever it is asked after that.

    Args:
        step: Method `(message) -> answer` of the client.

    Returns:
        The method, which answers once and in order.

    Examples:
        A client is asked for its upload twice:

        >>> import numpy as np
        >>> from gia_jax.secure_aggregation import AggregationAborted
        >>> from gia_jax.secure_aggregation.plain import PlainClient
        >>> client = PlainClient(0, np.array([5], np.uint32))
        >>> client.upload(b"").hex()
        '05000000'
        >>> try:
        ...     client.upload(b"")
        ... except AggregationAborted as aborted:
        ...     print(aborted)
        client 0 answers each round once and in order: got upload, next is none
    """

    @functools.wraps(step)
    def answer(self: ClientType, message: bytes) -> bytes:
        due = self._left.pop(0) if self._left else "none"
        try:
            if due != step.__name__:
                raise AggregationAborted(
                    f"client {self._client} answers each round once and in order: got {step.__name__}, next is {due}"
                )
            return step(self, message)
        except BaseException:
            self._left.clear()
            raise

    return answer


class Server:
    """The server's side of a protocol. All that it knows of a client it was sent as bytes.

    Attributes:
        rounds: A function for each round, which makes from the answers that came the next messages, both by client.
        uploads: What carries each client's update: residues, shape (p,), or ciphertext.
        contributors: Numbers of the clients in the sum, once they are known.
        total: The sum, shape (p,), once it is known.

    Args:
        num_clients: Number of clients, which are numbered from 0.
    """

    rounds: Sequence[Callable[[Bytes], Bytes]]
    uploads: Mapping[int, Any] = types.MappingProxyType({})
    contributors: tuple[int, ...] = ()
    total: np.ndarray | None = None

    def __init__(self, num_clients: int) -> None:
        self._asked: Collection[int] = range(num_clients)


ServerType = TypeVar("ServerType", bound=Server)


def server_round(step: Callable[[ServerType, Bytes], Bytes]) -> Callable[[ServerType, Bytes], Bytes]:
    """Makes a method of a server one of its rounds: it takes answers only from the clients that it asked.

    Args:
        step: Method `(answers) -> messages` of the server, both by client.

    Returns:
        The method, which raises MalformedMessage for the answer of another client.
    """

    @functools.wraps(step)
    def take(self: ServerType, answers: Bytes) -> Bytes:
        if unknown := [client for client in answers if client not in self._asked]:
            raise MalformedMessage(f"client {unknown[0]} answered {step.__name__}, and was not asked")
        messages = step(self, answers)
        self._asked = messages.keys()
        return messages

    return take


class AggregationProtocol(NamedTuple):
    """A protocol by which a server learns a sum. `aggregate` runs it.

    Attributes:
        name: Name of the protocol, for tables.
        quantizer: Quantizer that turns floats into residues. It knows the number of clients.
        collusion: Number of clients that may tell the server all they know, with the sum over the others still all it
            learns.
        make_clients: Function `(residues, randoms) -> clients` that makes the clients from the residues of each, shape
            (n, p), and the source of randomness of each.
        make_server: Function `(length, random) -> server` that makes the server from the length p and its randomness.

    Examples:
        >>> from gia_jax import secure_aggregation as sa
        >>> protocol = sa.secagg(5, threshold=3, clip=1.0)
        >>> protocol.name, protocol.quantizer.num_clients, protocol.collusion
        ('secagg', 5, 2)
    """

    name: str
    quantizer: Quantizer
    collusion: int
    make_clients: Callable[[np.ndarray, Sequence[RandomBytes]], Sequence[Client]]
    make_server: Callable[[int, RandomBytes], Server]


def require(found: int, threshold: int, step: str) -> None:
    """Checks that enough clients answered a step.

    Args:
        found: Number of clients that answered.
        threshold: Number of clients that must answer.
        step: Name of the step, for the error.

    Raises:
        AggregationAborted: If fewer than `threshold` clients answered.
    """
    if found < threshold:
        raise AggregationAborted(f"only {found} clients answered {step}, threshold {threshold}")


def require_own_keys(client: int, own: bytes, keys: Bytes, publics: Iterable[bytes]) -> None:
    """Checks the keys that the server sent to a client.

    Args:
        client: Number of the client.
        own: The keys that the client itself advertised.
        keys: The keys that it was sent, by client.
        publics: All public keys in them.

    Raises:
        MalformedMessage: If the keys do not hold the client's own, or two public keys are equal.
    """
    publics = list(publics)
    if keys.get(client) != own or len(set(publics)) < len(publics):
        raise MalformedMessage(f"client {client} got keys that are not its own, or not distinct")
