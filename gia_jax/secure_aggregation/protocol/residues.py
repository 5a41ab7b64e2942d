"""Residues: what updates become for a protocol, how they travel as bytes, and what their sum stands for."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree, UInt32

from gia_jax import _check
from gia_jax.base import Updates
from gia_jax.precision import wide_dtype, widened
from gia_jax.secure_aggregation.errors import MalformedMessage
from gia_jax.secure_aggregation.protocol.parties import AggregationProtocol
from gia_jax.secure_aggregation.quantization import Quantizer


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
