"""What an attack may see of an aggregation: it turns the server's view into an observation."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gia_jax.base import Observation, Params
from gia_jax.secure_aggregation.protocol import ServerView, decode, divided, modular_sum, require_residues


class Ciphertext(NamedTuple):
    """What takes the place of an observation where there are no numbers to attack.

    A table prints "n/a: ciphertext" for it.

    Attributes:
        num_bytes: Length of the ciphertext in bytes.

    Examples:
        >>> from gia_jax import secure_aggregation as sa
        >>> print(sa.Ciphertext(512))
        n/a: ciphertext
    """

    num_bytes: int

    def __str__(self) -> str:
        return "n/a: ciphertext"


def observe(
    view: ServerView,
    target: str,
    params: Params,
    *,
    colluders: Mapping[int, np.ndarray] | None = None,
    extra: dict[str, Any] | None = None,
) -> Observation | Ciphertext:
    """Returns the update that a server sees of one client, or of all.

    The server sees it by itself, or with clients that tell it what they know.

    * "aggregate": the sum over the contributors less what the colluders put in, divided by the number of the others:
      for batches of one size, the gradient of the union of their batches.
    * "client:3": what client 3 sent in place of its update, read as if it were one. Where the colluders are all the
      other contributors, the update itself.

    Args:
        view: The server's view after a run.
        target: What is observed: "aggregate", or "client:" and a number.
        params: Parameters that the server sent to the clients.
        colluders: Residues that each colluding client put into the protocol, shape (p,), by client, as `quantized`
            gives them. By default no client colludes.
        extra: What else the threat model grants, as `gia_jax.grants` makes it. By default nothing.

    Returns:
        The observation, for any attack, in the types of the clients' updates, or `Ciphertext`.

    Raises:
        ValueError: If the target is unknown or a client that sent nothing, a colluder is no contributor or its residues
            are none or of another length, or the sum is one that the server does not have, or one over colluders only.

    Examples:
        The server sees the mean of two updates, but of client 0 only a masked vector:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import secure_aggregation as sa
        >>> updates = jnp.array([[0.5, -0.25], [0.25, 0.5]])
        >>> view = sa.aggregate(jax.random.key(0), sa.secagg(2, threshold=2, clip=1.0), updates)
        >>> params = jnp.zeros(2)
        >>> [round(float(entry), 3) for entry in sa.observe(view, "aggregate", params).update]
        [0.375, 0.125]
        >>> bool(jnp.allclose(sa.observe(view, "client:0", params).update, updates[0]))
        False
    """
    colluders = {} if colluders is None else colluders
    if unknown := sorted(set(colluders) - set(view.contributors)):
        raise ValueError(f"colluders must be contributors, got client {unknown[0]}")
    length = sum(leaf.size for leaf in jax.tree.leaves(view.like))
    for client, own in colluders.items():
        if own.shape != (length,):
            raise ValueError(f"colluders[{client}] must have shape ({length},), got {own.shape}")
        require_residues(f"colluders[{client}]", own, view.quantizer.modulus)
    others = set(view.contributors) - set(colluders)
    if target == "aggregate":
        seen = _rest(view, colluders)
        count = len(others)
    else:
        client = _client(target)
        if client not in view.uploads:
            raise ValueError(f"target must name a client that sent something, got {target!r}")
        seen = _rest(view, colluders) if colluders and others == {client} else view.uploads[client]
        count = 1
    if isinstance(seen, bytes):
        return Ciphertext(len(seen))
    update = divided(decode(view.quantizer, seen, view.like), count, view.like)
    return Observation(params, update, {} if extra is None else extra)


def _client(target: str) -> int:
    """Reads the number of the client out of a target such as "client:3", and raises ValueError for another text."""
    kind, _, number = target.partition(":")
    if kind != "client" or not number.isdecimal():
        raise ValueError(f'target must be "aggregate" or such as "client:3", got {target!r}')
    return int(number)


def _rest(view: ServerView, colluders: Mapping[int, np.ndarray]) -> np.ndarray | bytes:
    """Returns the residues of the sum over all but the colluders, or one ciphertext where there is no sum."""
    if view.total is None:
        uploads = list(view.uploads.values())
        if uploads and isinstance(uploads[0], bytes):
            return uploads[0]
        raise ValueError("target must not be the aggregate of a run that gave none")
    if len(colluders) == len(view.contributors):
        raise ValueError("colluders must leave a client to observe, got all contributors")
    modulus = view.quantizer.modulus
    negated = [(modulus - own.astype(np.uint64)) % modulus for own in colluders.values()]
    return modular_sum([view.total, *negated], modulus)
