"""What every aggregation protocol is, how one round of it is run, and what the server ends up holding."""

import functools
import os
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree, UInt32

from gia_jax import _check
from gia_jax.base import Updates
from gia_jax.precision import wide_dtype, widened
from gia_jax.secure_aggregation.errors import AggregationAborted, MalformedMessage
from gia_jax.secure_aggregation.primitives import RandomBytes, insecure_random
from gia_jax.secure_aggregation.quantization import Quantizer
from gia_jax.secure_aggregation.wire import Bytes

SERVER = -1


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


def quantized(
    key: PRNGKeyArray, protocol: AggregationProtocol, updates: Updates
) -> tuple[UInt32[np.ndarray, "n p"], PyTree[jax.ShapeDtypeStruct]]:
    """Returns what every client puts into the protocol: its own secret, which a colluder knows of itself.

    Args:
        key: Random key of the clients' stochastic rounding: client i draws from `fold_in(key, i)`.
        protocol: Protocol whose quantizer is used.
        updates: Updates of all clients: a tree of floats, every leaf with a leading axis of the protocol's number of
            clients.

    Returns:
        The residues of every client, shape (n, p), and the shapes of one update.

    Raises:
        ValueError: If the updates are of another number of clients, have no parameter, are not floats or are not
            finite.

    Examples:
        With two bits an entry of 1 becomes one step, and one of -1 becomes 2^32 - 1, which is -1 modulo 2^32:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import secure_aggregation as sa
        >>> protocol = sa.plain_sum(2, clip=1.0, bits=2)
        >>> residues, like = sa.quantized(jax.random.key(0), protocol, jnp.array([[1.0, 0.0], [-1.0, 1.0]]))
        >>> residues.tolist(), like.shape
        ([[1, 0], [4294967295, 1]], (2,))
    """
    count = protocol.quantizer.num_clients
    leaves = jax.tree.leaves(updates)
    for leaf in leaves:
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != count or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"updates must be floats with a leading axis of {count} clients, got {leaf.dtype} {jnp.shape(leaf)}"
            )
    if not leaves or sum(leaf.size for leaf in leaves) == 0:
        raise ValueError("updates must have at least one parameter, got none")
    _check.finite("updates", updates)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), updates)
    return np.asarray(_encode(protocol.quantizer, key, updates)), like


# Jitted here and not by the caller, as an exception: a run of a protocol cannot be traced as a whole.
@functools.partial(jax.jit, static_argnums=0)
def _encode(quantizer: Quantizer, key: PRNGKeyArray, updates: Updates) -> UInt32[Array, "n p"]:
    """Turns the updates of all clients into residues, a row for each client."""
    flat = jnp.concatenate([widened(leaf).reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(updates)], axis=1)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(flat)))
    return jax.vmap(quantizer.encode)(keys, flat)


_decode = jax.jit(Quantizer.decode, static_argnums=0)


def decode(
    quantizer: Quantizer, residues: UInt32[np.ndarray, " p"], like: PyTree[jax.ShapeDtypeStruct]
) -> PyTree[Array]:
    """Returns the tree of floats that a vector of residues, or a sum of such, stands for.

    It is in float32 where `like` is in half precision, so that a sum may be divided before it is cast.

    Args:
        quantizer: Quantizer of the protocol.
        residues: Residues, shape (p,).
        like: One client's update, of p entries in all, as a tree of shapes.

    Returns:
        The tree, with the shapes of `like`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import secure_aggregation as sa
        >>> from gia_jax.secure_aggregation.protocol import decode
        >>> protocol = sa.plain_sum(2, clip=1.0, bits=2)
        >>> residues, like = sa.quantized(jax.random.key(0), protocol, {"w": jnp.array([[1.0, 0.0], [-1.0, 1.0]])})
        >>> decode(protocol.quantizer, residues[1], like)["w"].tolist()
        [-1.0, 1.0]
    """
    leaves, treedef = jax.tree.flatten(like)
    values = np.asarray(_decode(quantizer, residues))
    parts = np.split(values, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(
        treedef, [jnp.asarray(part.reshape(leaf.shape), wide_dtype(leaf.dtype)) for part, leaf in zip(parts, leaves)]
    )


def divided(tree: PyTree[Array], count: int, like: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Array]:
    """Divides a sum by a number, and only then casts it to the types of `like`.

    Args:
        tree: The sum, a tree.
        count: The number.
        like: One client's update, as a tree of shapes and types.

    Returns:
        The quotient, in the types of `like`.
    """
    return jax.tree.map(lambda leaf, one: (leaf / count).astype(one.dtype), tree, like)


def require_residues(name: str, residues: np.ndarray, modulus: int) -> None:
    """Checks that an array is of residues below `modulus`, as uint32.

    Args:
        name: Name of the array, for the error.
        residues: The array.
        modulus: Modulus of the residues.

    Raises:
        ValueError: If it is not.
    """
    if residues.dtype != np.uint32:
        raise ValueError(f"{name} must be of uint32, got {residues.dtype}")
    if residues.size and int(residues.max()) >= modulus:
        raise ValueError(f"{name} must be below {modulus}, got {residues.max()}")


def words(data: bytes, count: int, modulus: int = 2**32) -> UInt32[np.ndarray, " count"]:
    """Reads residues that travelled as bytes.

    Args:
        data: The bytes, four for each residue, little-endian.
        count: Number of residues that must be there.
        modulus: Modulus of the residues.

    Returns:
        The residues, shape (count,).

    Raises:
        MalformedMessage: If the bytes are of another number, or not of residues.

    Examples:
        >>> from gia_jax.secure_aggregation.protocol import words
        >>> words(bytes([1, 0, 0, 0, 0, 1, 0, 0]), 2).tolist()
        [1, 256]
    """
    if len(data) != 4 * count:
        raise MalformedMessage(f"a vector must have {4 * count} bytes, got {len(data)}")
    found = np.frombuffer(data, "<u4")
    if found.size and int(found.max()) >= modulus:
        raise MalformedMessage(f"a vector must be of residues below {modulus}, got {found.max()}")
    return found


def to_bytes(vector: UInt32[np.ndarray, "..."]) -> bytes:
    """Writes residues as they travel, as four bytes each, little-endian.

    Args:
        vector: Residues, of any shape.

    Returns:
        The bytes.

    Examples:
        >>> import numpy as np
        >>> from gia_jax.secure_aggregation.protocol import to_bytes
        >>> to_bytes(np.array([1, 256], np.uint32)).hex()
        '0100000000010000'
    """
    return np.ascontiguousarray(vector, "<u4").tobytes()


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


def modular_sum(vectors: Sequence[np.ndarray], modulus: int) -> UInt32[np.ndarray, " p"]:
    """Adds vectors of residues.

    Args:
        vectors: The vectors, at least one, all of the same shape.
        modulus: Modulus of the residues.

    Returns:
        The sum modulo `modulus`, in the shape of a vector.

    Examples:
        >>> import numpy as np
        >>> from gia_jax.secure_aggregation.protocol import modular_sum
        >>> modular_sum([np.array([5, 1], np.uint32), np.array([4, 1], np.uint32)], 7).tolist()
        [2, 2]
    """
    total = np.zeros(vectors[0].shape, np.uint64)
    for vector in vectors:
        total += vector
    return (total % np.uint64(modulus)).astype(np.uint32)
