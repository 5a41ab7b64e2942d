"""Quantization: updates of few bits an entry, by signs or by unbiased stochastic rounding.

Bernstein et al., signSGD, ICML 2018, algorithm 1; Wen et al., TernGrad, NeurIPS 2017 (without its clipping); Alistarh
et al., QSGD, NeurIPS 2017, section 3.1, with the largest magnitude of each tensor in place of the L2 norm.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Updates
from gia_jax.defenses.noise import stochastic
from gia_jax.precision import widened


def sign() -> optax.GradientTransformation:
    """Shares the sign of every entry, scaled by the mean magnitude of its tensor, so that 0 stays 0.

    The signs are those of signSGD. The scale, one number for each tensor, keeps the update usable as a gradient
    (Karimireddy et al., Error Feedback Fixes SignSGD, ICML 2019, algorithm 1).

    The derivative of the signs is 0: an attack through this transformation hardly moves, which says nothing of the
    defense. An attacker that knows the defense compares the undefended client with the signs observed, by
    `matching.adaptive.sign_hinge`.

    Returns:
        The transformation, which has no state.

    Examples:
        The mean magnitude of the entries is 2:

        >>> import jax.numpy as jnp
        >>> from gia_jax import defenses
        >>> sign = defenses.sign()
        >>> update = jnp.array([5.0, -3.0, 0.0, 0.0])
        >>> shared, _ = sign.update(update, sign.init(update))
        >>> shared.tolist()
        [2.0, -2.0, 0.0, 0.0]
    """

    return optax.stateless_with_tree_map(lambda leaf, _: _scaled_sign(jnp.asarray(leaf)))


def _scaled_sign(leaf: Array) -> Array:
    """Returns the signs of one tensor times its mean magnitude."""
    exact = widened(leaf)
    return (jnp.sign(exact) * jnp.mean(jnp.abs(exact))).astype(leaf.dtype)


def ternary(key: PRNGKeyArray) -> optax.GradientTransformation:
    """Rounds every entry to -s, 0 or s, where s is the largest magnitude of its tensor (TernGrad).

    It is `quantize` with 2 bits: the rounding is random, and its expectation is the entry.

    Args:
        key: Key of this transformation of one client. Build the transformation inside the `vmap` over clients: `vmap`
            over `init` alone gives all of them the same rounding, and one key in two transformations the same bits.

    Returns:
        The transformation. Its state is the key of the next update.

    Examples:
        The largest entry and 0 are shared as they are, and the rest becomes 0 or 2:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import defenses
        >>> ternary = defenses.ternary(jax.random.key(0))
        >>> update = jnp.array([-2.0, 0.0, 1.0, 1.0, 1.0])
        >>> shared, _ = ternary.update(update, ternary.init(update))
        >>> shared[:2].tolist(), bool(jnp.isin(shared[2:], jnp.array([0.0, 2.0])).all())
        ([-2.0, 0.0], True)
    """
    return quantize(key, 2)


def quantize(key: PRNGKeyArray, bits: int | np.integer) -> optax.GradientTransformation:
    """Rounds every entry at random to one of 2^bits - 1 levels, so that the expectation is the entry.

    The levels are evenly spaced from -s to s, where s is the largest magnitude of the tensor, which is shared too. With
    L = 2^(bits - 1) - 1 and u = L |g| / s, the entry becomes sign(g) (s / L) (floor(u) + b), where b is 1 with
    probability u - floor(u) and 0 otherwise.

    Args:
        key: Key of this transformation of one client. Build the transformation inside the `vmap` over clients: `vmap`
            over `init` alone gives all of them the same rounding, and one key in two transformations the same bits.
        bits: Number of bits of an entry, an integer in [2, 16], the sign included.

    Returns:
        The transformation. Its state is the key of the next update. Its derivative is that of its expectation, the
        identity. An attacker that knows the defense attacks the undefended client, whose update is the expectation.

    Raises:
        ValueError: If `bits` is not an integer in [2, 16].

    Examples:
        With 3 bits and a largest entry of 3 the levels are the integers from -3 to 3:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import defenses
        >>> rounding = defenses.quantize(jax.random.key(0), 3)
        >>> update = jnp.array([3.0, -1.5, 0.2, 0.0])
        >>> shared, _ = rounding.update(update, rounding.init(update))
        >>> bool(jnp.allclose(shared, jnp.round(shared))), bool((jnp.abs(shared - update) < 1).all())
        (True, True)
    """
    _check.integer(2, 16, bits=bits)
    levels = 2 ** (int(bits) - 1) - 1

    def one(key: PRNGKeyArray, leaf: Array) -> Array:
        exact = widened(jax.lax.stop_gradient(leaf))
        largest = jnp.max(jnp.abs(exact), initial=0)
        scaled = jnp.abs(exact) / jnp.where(largest > 0, largest, 1) * levels
        below = jnp.floor(scaled)
        up = jax.random.uniform(key, exact.shape, exact.dtype) < scaled - below
        # Rounding errors may lift the largest entry over the last level.
        level = jnp.minimum(below + up, levels)
        rounded = (jnp.sign(exact) * (level / levels) * largest).astype(leaf.dtype)
        return rounded + (leaf - jax.lax.stop_gradient(leaf))

    def apply_fn(key: PRNGKeyArray, updates: Updates) -> Updates:
        leaves, treedef = jax.tree.flatten(updates)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(treedef, [one(k, leaf) for k, leaf in zip(keys, leaves, strict=True)])

    return stochastic(key, apply_fn)
