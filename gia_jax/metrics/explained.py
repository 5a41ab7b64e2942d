"""Whether a reconstruction explains the update: a check that needs no truth."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gia_jax.base import Batch, ClientFn, Observation, Updates
from gia_jax.precision import widened


class Explained(NamedTuple):
    """How an observed update u compares with the update g of a reconstruction.

    Attributes:
        share: Share of u that g explains at its best positive scale, 1 - min over s >= 0 of ||u - s g||^2 / ||u||^2, in
            [0, 1]. It is the square of the cosine between u and g, or 0 where the cosine is negative.
        mismatch: Distance ||u - g|| / ||u||, at least 0, with g as it is.
        scale: Best scale <u, g> / <g, g>. It is 1 where u and g have the same length, negative where u points the other
            way, as new minus old parameters do.
    """

    share: Float[Array, ""]
    mismatch: Float[Array, ""]
    scale: Float[Array, ""]


def explained(client_fn: ClientFn, observation: Observation, batch: Batch) -> Explained:
    """Measures how much of an observed update a reconstruction explains.

    A reconstruction that explains little is a guess, whatever its loss: the solver is stuck, or the client differs from
    the one that is assumed. A negative scale tells of an update of the wrong sign. A scale far from 1 tells of an
    update that was averaged, clipped, or divided by another learning rate. A low share tells of parameters in another
    layout. A high share does not prove that the images are right, because many batches can have nearly the same update.
    Compare with the same attack on noise, `gia_jax.control`.

    Args:
        client_fn: Client `(params, batch) -> update` that the attacker assumes.
        observation: What the attacker sees, for one victim.
        batch: Reconstruction, such as `reconstruction.batch`.

    Returns:
        Three numbers, in float32 or wider. They are NaN where the update of the reconstruction has a NaN. Of an update
        that is all zeros, the share is 1 if the reconstruction has the same, else 0.

    Raises:
        ValueError: If the client's update has another structure or other shapes than the observed one.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, Observation, clients, metrics
        >>> client_fn = clients.federated_sgd(clients.cross_entropy(lambda params, x: x @ params["w"]))
        >>> params = {"w": jnp.eye(3)}
        >>> batch = Batch(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([0]))
        >>> seen = Observation(params, jax.tree.map(jnp.negative, client_fn(params, batch)), {})
        >>> found = metrics.explained(client_fn, seen, batch)  # the sign of the update is wrong
        >>> print(round(float(found.share), 3), round(float(found.mismatch), 3), round(float(found.scale), 3))
        0.0 2.0 -1.0
    """
    simulated, observed = client_fn(observation.params, batch), observation.update
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (simulated, observed)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"client_fn must give an update of the observed one's shapes, {shapes[1]}, got {shapes[0]}")
    # Divided by the largest entry first, so that no square overflows or vanishes.
    largest = jnp.maximum(_largest(simulated), _largest(observed))
    unit = jnp.where(largest > 0, largest, 1)

    def inner(left: Updates, right: Updates) -> Float[Array, ""]:
        products = jax.tree.map(lambda a, b: jnp.sum((widened(a) / unit) * (widened(b) / unit)), left, right)
        return sum(jax.tree.leaves(products), jnp.zeros(()))

    uu, gg, ug = inner(observed, observed), inner(simulated, simulated), inner(observed, simulated)
    share = _ratio(jnp.square(jnp.maximum(ug, 0)), uu * gg, where_zero=jnp.where(uu == gg, 1, 0))
    difference = jax.tree.map(lambda a, b: widened(a) - widened(b), observed, simulated)
    mismatch = _ratio(jnp.sqrt(inner(difference, difference)), jnp.sqrt(uu), where_zero=jnp.where(gg > 0, jnp.inf, 0))
    scale = _ratio(ug, gg, where_zero=jnp.where(uu > 0, jnp.inf, 1))
    return Explained(jnp.minimum(share, 1), mismatch, scale)


def _largest(tree: Updates) -> Float[Array, ""]:
    """Returns the largest magnitude of all entries."""
    leaves = [jnp.max(jnp.abs(widened(leaf)), initial=0) for leaf in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack(leaves)) if leaves else jnp.zeros(())


def _ratio(top: Array, bottom: Array, *, where_zero: Array) -> Float[Array, ""]:
    """Divides, with a value of its own where the divisor is 0."""
    return jnp.where(bottom == 0, where_zero, top / jnp.where(bottom == 0, 1, bottom))
