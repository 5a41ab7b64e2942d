"""What every aggregation protocol is, how one round of it is run, and what the server ends up holding."""

import functools
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree, UInt32

from gia_jax import _check
from gia_jax.base import Updates
from gia_jax.secure_aggregation.primitives import RandomBytes, insecure_random
from gia_jax.secure_aggregation.quantization import Quantizer
from gia_jax.secure_aggregation.wire import Bytes

SERVER = -1


class Client:
    """One client's side of a protocol. It keeps its secrets, and talks in bytes only.

    Attributes:
        rounds: For each round, from the server's message to the client's answer.
    """

    rounds: Sequence[Callable[[bytes], bytes]]


class Server:
    """The server's side of a protocol. All that it knows of a client it was sent as bytes.

    Attributes:
        rounds: For each round, from the answers that came to the next messages, both by client.
        uploads: What carries each client's update: residues, shape (p,), or ciphertext.
        contributors: The clients in the sum, once they are known.
        total: The sum, shape (p,), once it is known.
    """

    rounds: Sequence[Callable[[Bytes], Bytes]]
    uploads: Mapping[int, Any] = types.MappingProxyType({})
    contributors: tuple[int, ...] = ()
    total: np.ndarray | None = None


class AggregationProtocol(NamedTuple):
    """A protocol by which a server learns a sum. `aggregate` runs it.

    Attributes:
        name: For tables.
        quantizer: From floats to residues; it knows the number of clients.
        collusion: Clients that may tell the server all they know, with the sum over the others still all it learns.
        make_clients: From every client's residues, shape (n, p), and every client's randomness, the clients.
        make_server: From the length p, and the server's randomness, the server.
    """

    name: str
    quantizer: Quantizer
    collusion: int
    make_clients: Callable[[np.ndarray, Sequence[RandomBytes]], Sequence[Client]]
    make_server: Callable[[int, RandomBytes], Server]


class Message(NamedTuple):
    """One message on its way; the server's number is `SERVER`.

    Attributes:
        round: From 0.
        kind: The step that made it.
        sender: Client or server.
        receiver: Client or server.
        payload: All that travels.
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
        quantizer: Public.
        like: One client's update as `jax.ShapeDtypeStruct`s: public, the shape of the model.
        uploads: What each client sent in place of its update: residues, shape (p,), or ciphertext bytes.
        contributors: The clients in the sum.
        total: The sum's residues, shape (p,); None where the server does not learn it.
        transcript: Every message, in order.
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
        """The sum of the contributors' updates, a tree like one of them; None where the server does not learn it."""
        return None if self.total is None else decode(self.quantizer, self.total, self.like)

    def num_bytes(self, client: int) -> int:
        """Bytes that one client sends and receives."""
        return sum(len(m.payload) for m in self.transcript if client in (m.sender, m.receiver))


class AggregationAborted(RuntimeError):  # noqa: N818, the usual word
    """The run ended without a sum.

    Attributes:
        view: What the server holds nevertheless; its total is None. None where a single party was driven by hand.
    """

    view: ServerView | None = None


def aggregate(
    key: PRNGKeyArray,
    protocol: AggregationProtocol,
    updates: Updates,
    *,
    dropouts: Mapping[int, int] | None = None,
    insecure_seed: int | None = None,
) -> ServerView:
    """Runs a protocol once, all parties in this process; each of them is given nothing but its own input and bytes.

    It cannot be traced: it is work of the host.

    Args:
        key: The clients' stochastic rounding; client i draws from `fold_in(key, i)`. No secret depends on it.
        protocol: Such as `secagg(...)`.
        updates: A tree of floats, every leaf with a leading axis of the protocol's number of clients.
        dropouts: From a client to the first round that it does not answer.
        insecure_seed: None draws every secret from the operating system. A number makes a run reproducible, for
            experiments only: whoever knows it knows every secret.

    Returns:
        The server's view.

    Raises:
        ValueError: Updates with another number of clients, or not finite; unknown clients in `dropouts`.
        AggregationAborted: Too few clients answered.
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
    """`aggregate` of vectors that are residues already.

    Args:
        protocol: As for `aggregate`.
        residues: Of every client, below the quantizer's modulus.
        like: One client's update, of p entries in all; None for a vector.
        dropouts: As for `aggregate`.
        insecure_seed: As for `aggregate`.

    Returns:
        The server's view.

    Raises:
        ValueError: Residues of another number of clients or out of range; unknown clients in `dropouts`.
        AggregationAborted: Too few clients answered.
    """
    count, length = residues.shape
    if count != protocol.quantizer.num_clients or length == 0:
        raise ValueError(f"residues must have shape ({protocol.quantizer.num_clients}, p > 0), got {residues.shape}")
    if int(residues.max()) >= protocol.quantizer.modulus:
        raise ValueError(f"residues must be below {protocol.quantizer.modulus}, got {residues.max()}")
    like = jax.ShapeDtypeStruct((length,), np.float32) if like is None else like
    dropouts = {} if dropouts is None else dropouts
    if unknown := sorted(set(dropouts) - set(range(count))):
        raise ValueError(f"dropouts must name clients from 0 to {count - 1}, got {unknown[0]}")
    randoms: list[RandomBytes] = [
        os.urandom if insecure_seed is None else insecure_random(insecure_seed, party) for party in range(count + 1)
    ]
    clients = protocol.make_clients(residues, randoms[:count])
    server = protocol.make_server(residues.shape[1], randoms[count])
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
    """Carries the messages of all rounds, and yields each."""
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
    """What every client puts into the protocol: its own secret, which a colluder knows of itself.

    Args:
        key: As for `aggregate`.
        protocol: Its quantizer is used.
        updates: As for `aggregate`.

    Returns:
        The residues of every client, shape (n, p), and the shapes of one update.

    Raises:
        ValueError: As `aggregate`.
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
    flat = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(updates)], axis=1)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(flat)))
    return jax.vmap(quantizer.encode)(keys, flat)


_decode = jax.jit(Quantizer.decode, static_argnums=0)


def decode(
    quantizer: Quantizer, residues: UInt32[np.ndarray, " p"], like: PyTree[jax.ShapeDtypeStruct]
) -> PyTree[Array]:
    """The tree of floats that a vector of residues, or a sum of such, stands for."""
    leaves, treedef = jax.tree.flatten(like)
    values = np.asarray(_decode(quantizer, residues))
    parts = np.split(values, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(
        treedef, [jnp.asarray(part.reshape(leaf.shape), leaf.dtype) for part, leaf in zip(parts, leaves)]
    )


def words(data: bytes, count: int, modulus: int = 2**32) -> UInt32[np.ndarray, " count"]:
    """`count` residues that travelled as bytes; AggregationAborted where they are not."""
    if len(data) != 4 * count:
        raise AggregationAborted(f"a vector must have {4 * count} bytes, got {len(data)}")
    found = np.frombuffer(data, "<u4")
    if found.size and int(found.max()) >= modulus:
        raise AggregationAborted(f"a vector must be of residues below {modulus}, got {found.max()}")
    return found


def to_bytes(vector: UInt32[np.ndarray, "..."]) -> bytes:
    """Residues as they travel, little-endian."""
    return np.ascontiguousarray(vector, "<u4").tobytes()


def require(found: int, threshold: int, step: str) -> None:
    """Raises AggregationAborted where fewer than `threshold` clients answered."""
    if found < threshold:
        raise AggregationAborted(f"only {found} clients answered {step}, threshold {threshold}")


def require_own_keys(client: int, own: bytes, keys: Bytes, publics: Iterable[bytes]) -> None:
    """Raises AggregationAborted where the keys that a client is sent have not its own, or two public keys are equal."""
    publics = list(publics)
    if keys.get(client) != own or len(set(publics)) < len(publics):
        raise AggregationAborted(f"client {client} got keys that are not its own, or not distinct")


def modular_sum(vectors: Sequence[np.ndarray], modulus: int) -> UInt32[np.ndarray, " p"]:
    """The sum of vectors of residues."""
    total = np.zeros(vectors[0].shape, np.uint64)
    for vector in vectors:
        total += vector
    return (total % np.uint64(modulus)).astype(np.uint32)
