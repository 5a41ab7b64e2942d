"""Fake gradients, the defense that Jin et al., CAFE, NeurIPS 2021, propose against their own attack."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Updates
from gia_jax.defenses.noise import stochastic
from gia_jax.precision import widened


def fake_gradients(key: PRNGKeyArray, scale: Float[ArrayLike, ""], *, count: int = 10) -> optax.GradientTransformation:
    """Shares random numbers in the order of the true entries: the largest number takes the place of the largest entry.

    `count` updates are drawn from scale * N(0, 1). Each tensor of them is sorted and put in the order of the true one.
    The update that is then nearest to the true one in L2 norm is shared. It holds the ranks of the entries within each
    tensor and no magnitude. The sorted numbers of a large tensor hardly vary, so that there `count` changes little.

    Departures: the paper's worker draws its fake updates once, for all rounds, and again where none is nearer than a
    threshold. Here every round draws anew, and there is no threshold.

    Args:
        key: Key of this transformation of one client. Build the transformation inside the `vmap` over clients: `vmap`
            over `init` alone gives all of them the same numbers, and so does one key in two transformations.
        scale: Standard deviation of the numbers, above 0 and finite. It is the scale of what is shared, whatever the
            gradient's: choose the learning rate for it.
        count: Number of updates drawn each round, at least 1.

    Returns:
        The transformation. Its state is the key of the next update. Its derivative is that of the identity, a
        straight-through estimate, because the true derivative is 0.

    Raises:
        ValueError: If `scale` is not positive and finite, or `count` is no positive integer or does not fit into
            memory.

    Examples:
        The order of the entries is shared, and the entries are not:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import defenses
        >>> fake = defenses.fake_gradients(jax.random.key(0), 0.1, count=2)
        >>> update = jnp.array([5.0, -20.0, 30.0])
        >>> shared, _ = fake.update(update, fake.init(update))
        >>> jnp.argsort(shared).tolist(), jnp.argsort(update).tolist()
        ([1, 0, 2], [1, 0, 2])
        >>> bool(jnp.max(jnp.abs(shared)) < 1)
        True
    """
    _check.scalar(scale=scale)
    _check.positive(scale=scale)
    _check.integer(count=count)
    _check.fits(2 * int(count), count=count)
    _check.finite("scale", scale)

    def apply_fn(key: PRNGKeyArray, updates: Updates) -> Updates:
        true = jax.tree.map(lambda leaf: jax.lax.stop_gradient(widened(leaf)), updates)

        def fake(key: PRNGKeyArray) -> Updates:
            drawn = optax.tree.random_like(key, true, jax.random.normal)
            return jax.tree.map(lambda numbers, leaf: in_order_of(leaf, scale * numbers), drawn, true)

        def distance(key: PRNGKeyArray) -> Float[Array, ""]:
            return jnp.asarray(optax.tree.norm(optax.tree.sub(fake(key), true), squared=True))

        keys = jax.random.split(key, count)
        nearest = fake(keys[jnp.argmin(jax.lax.map(distance, keys))])
        # What is shared is the fake number itself: the difference added is 0, with the derivative of the identity.
        return jax.tree.map(
            lambda leaf, f: f.astype(leaf.dtype) + (leaf - jax.lax.stop_gradient(leaf)), updates, nearest
        )

    return stochastic(key, apply_fn)


def in_order_of(leaf: Float[Array, "*shape"], numbers: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Rearranges the numbers so that they have the ranks of the entries of `leaf`.

    Args:
        leaf: Array whose order is taken. Of equal entries the first counts as the lesser.
        numbers: Array of the same shape, in any order.

    Returns:
        The entries of `numbers`, the smallest in the place of the smallest entry of `leaf`, and so on.
    """
    ranks = jnp.argsort(jnp.argsort(leaf.reshape(-1)))
    return jnp.sort(numbers.reshape(-1))[ranks].reshape(leaf.shape)
