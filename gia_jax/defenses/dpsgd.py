"""DP-SGD inside the client: each example's gradient is clipped, and the mean of them gets Gaussian noise.

Abadi et al., Deep Learning with Differential Privacy, CCS 2016, algorithm 1; but the batch is the one given, not a
Poisson sample, and the sum is divided by its own size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Batch, ClientFn, LossFn, Params, Updates
from gia_jax.clients.gradient import parameter_gradient
from gia_jax.clients.sgd import Draws
from gia_jax.defenses.clipping import clipped
from gia_jax.defenses.noise import add_noise
from gia_jax.lowering import Lowering
from gia_jax.precision import cast_like, widened_tree


def dp_sgd(
    loss_fn: LossFn | Callable[[PRNGKeyArray], LossFn],
    key: PRNGKeyArray,
    *,
    norm: Float[ArrayLike, ""],
    noise_multiplier: Float[ArrayLike, ""],
    loss_key: PRNGKeyArray | None = None,
    microbatch_size: int | np.integer | None = None,
    lowering: Lowering = "auto",
) -> ClientFn:
    """A client that shares (sum_i clip(g_i) + N(0, (noise_multiplier * norm)^2)) / b, clip(g) = g min(1, norm / |g|).

    An attacker that knows the defense takes for its own client the one with `noise_multiplier=0`: the noise is the
    victim's, the clipping of each example is not.

    Args:
        loss_fn: `(params, batch) -> ` scalar; it sees batches of one example. With `loss_key`, `(key) -> ` such a loss.
        key: Key of this client and this round, never the attacker's. A key used twice draws the same noise, which the
            difference of the two updates cancels. `vmap` over clients, each with a key of its own.
        norm: Largest L2 norm of one example's gradient, all parameters together, positive and finite.
        noise_multiplier: Standard deviation of the noise on the sum, in units of `norm`, >= 0 and finite.
        loss_key: Key of a loss that draws, such as `Precode.loss_fn`: every example has a key of its own, split off
            this one. It is of this client and this round, another than `key`, never the attacker's. None: the loss
            draws nothing, or the same for every example.
        microbatch_size: Examples whose gradients are held at a time, a divisor of the batch's size; None: all.
        lowering: How convolutions are computed, as for `clients.federated_sgd`.

    Returns:
        `(params, batch) -> update`, with one noise for each key, and one draw for each `loss_key`: the same in every
        call.

    Raises:
        ValueError: If `norm` is not positive and finite, `noise_multiplier` negative or not finite, `microbatch_size`
            no positive integer, a batch is empty or its size no multiple of `microbatch_size`, or a model has batch
            normalisation in training mode, which mixes the examples.

    Formal Guarantees:
        In exact arithmetic (rounding adds to it; bfloat16 visibly) adding or removing one example changes the sum by at
        most `norm` in L2, and replacing one by at most 2 `norm`. The shared mean is that sum over a public b, so
        replacing is the relation of one release. There is no sampling, hence no amplification, and without noise no
        epsilon. All of it is for given draws of the loss, which do not depend on the data.
    """
    _check.scalar(norm=norm, noise_multiplier=noise_multiplier)
    _check.positive(norm=norm)
    _check.finite("norm", norm)
    _check.not_negative(noise_multiplier=noise_multiplier)
    _check.finite("noise_multiplier", noise_multiplier)
    if microbatch_size is not None:
        _check.integer(microbatch_size=microbatch_size)
    noiseless = _check.is_concrete(noise_multiplier) and not np.any(np.asarray(noise_multiplier))

    _check.different(key=key, loss_key=loss_key)
    loss = Draws(loss_fn, loss_key)

    def clipped_sum(params: Params, batch: Batch, keys: Key[Array, "b"] | None) -> Updates:
        def one(example: Batch, own: PRNGKeyArray | None) -> Updates:
            gradient_fn = parameter_gradient(loss.of(own), lowering=lowering)
            gradient = gradient_fn(params, jax.tree.map(lambda leaf: leaf[None], example))
            return clipped(widened_tree(gradient), norm)

        return jax.tree.map(lambda leaf: jnp.sum(leaf, 0), jax.vmap(one)(batch, keys))

    def client_fn(params: Params, batch: Batch) -> Updates:
        _check.examples(batch.inputs)
        size = batch.inputs.shape[0]
        microbatch = microbatch_size or size
        if size % microbatch:
            raise ValueError(f"microbatch_size must divide the batch of {size}, got {microbatch}")

        loss.check_apart("dp_sgd", params, batch)
        loss.check(params, batch)
        keys = loss.keys(size)

        def add(total: Updates, part: tuple[Batch, Key[Array, "b"] | None]) -> tuple[Updates, None]:
            return optax.tree.add(total, clipped_sum(params, *part)), None

        if microbatch == size:
            total = clipped_sum(params, batch, keys)
        else:
            parts = jax.tree.map(lambda leaf: leaf.reshape(-1, microbatch, *leaf.shape[1:]), (batch, keys))
            total, _ = jax.lax.scan(
                jax.checkpoint(add, prevent_cse=False), optax.tree.zeros_like(widened_tree(params)), parts
            )
        if not noiseless:
            total = add_noise(key, total, norm * noise_multiplier, jax.random.normal)

        def mean(leaf: Array) -> Array:
            return leaf / jnp.asarray(size, leaf.dtype)

        return cast_like(jax.tree.map(mean, total), params)

    return client_fn
