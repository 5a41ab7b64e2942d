"""DP-SGD inside the client: each example's gradient is clipped, and the mean of them gets Gaussian noise.

Abadi et al., Deep Learning with Differential Privacy, CCS 2016, algorithm 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Batch, ClientFn, LossFn, Params, Updates
from gia_jax.clients.gradient import parameter_gradient
from gia_jax.lowering import Lowering


def dp_sgd(
    loss_fn: LossFn,
    key: PRNGKeyArray,
    *,
    norm: float,
    noise_multiplier: float,
    microbatch_size: int | None = None,
    lowering: Lowering = "auto",
) -> ClientFn:
    """A client that shares (sum_i clip(g_i) + N(0, (noise_multiplier * norm)^2)) / b, clip(g) = g min(1, norm / |g|).

    An attacker that knows the defense takes for its own client the one with `noise_multiplier=0`: the noise is the
    victim's, the clipping of each example is not.

    Args:
        loss_fn: `(params, batch) -> ` scalar; it sees batches of one example.
        key: Of this client's round, never the attacker's. `vmap` over clients, each with a key of its own.
        norm: Largest L2 norm > 0 of one example's gradient, all parameters together.
        noise_multiplier: Standard deviation of the noise on the sum over `norm`, >= 0.
        microbatch_size: Examples whose gradients are held at a time, a divisor of the batch's size; None: all.
        lowering: As for `clients.federated_sgd`.

    Returns:
        `(params, batch) -> update`, with one noise for each key: the same update in every call on the same data.

    Raises:
        ValueError: If `norm` or `microbatch_size` is not positive, `noise_multiplier` is negative, or the size of a
            batch is no multiple of `microbatch_size`.

    Formal Guarantees:
        Adding or removing one example changes the sum by at most `norm` in L2 (the sensitivity); replacing one, by at
        most 2 `norm`. Division by b assumes that b is public. Clipping without noise has no epsilon.
    """
    _check.positive(norm=norm, microbatch_size=microbatch_size)
    _check.not_negative(noise_multiplier=noise_multiplier)
    gradient_fn = parameter_gradient(loss_fn, lowering=lowering)

    def clipped_sum(params: Params, batch: Batch) -> Updates:
        def one(example: Batch) -> Updates:
            gradient = gradient_fn(params, jax.tree.map(lambda leaf: leaf[None], example))
            squared = optax.tree.norm(gradient, squared=True)
            # The root of a norm of zero has no derivative; such a gradient is not clipped.
            length = jnp.sqrt(jnp.where(squared > norm**2, squared, norm**2))
            return optax.tree.scale(norm / length, gradient)

        return jax.tree.map(lambda leaf: jnp.sum(leaf, 0), jax.vmap(one)(batch))

    def client_fn(params: Params, batch: Batch) -> Updates:
        size = batch.inputs.shape[0]
        if microbatch_size is None or microbatch_size == size:
            total = clipped_sum(params, batch)
        else:
            if size % microbatch_size:
                raise ValueError(f"microbatch_size must divide the batch of {size}, got {microbatch_size}")
            parts = jax.tree.map(lambda leaf: leaf.reshape(-1, microbatch_size, *leaf.shape[1:]), batch)
            zeros = optax.tree.zeros_like(params)
            add: Callable = jax.checkpoint(lambda total, part: optax.tree.add(total, clipped_sum(params, part)))
            total, _ = jax.lax.scan(lambda total, part: (add(total, part), None), zeros, parts)
        if _check.is_concrete(noise_multiplier) and noise_multiplier == 0:
            return optax.tree.scale(1 / size, total)
        noise = optax.tree.random_like(key, total, jax.random.normal)
        return optax.tree.scale(1 / size, optax.tree.add_scale(total, norm * noise_multiplier, noise))

    return client_fn
