"""DP-SGD as a client: the gradient of each example is clipped, and noise is added to their sum before the mean.

Abadi et al., Deep Learning with Differential Privacy, CCS 2016, algorithm 1. Departures: the batch is the one that is
given, not a Poisson sample, and the sum is divided by the size of that batch.
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
    """Builds a client that clips the gradient of each example and adds Gaussian noise to the sum.

    It shares (sum_i clip(g_i) + N(0, (noise_multiplier * norm)^2)) / b, where clip(g) = g min(1, norm / |g|).

    An attacker that knows the defense uses the same client with `noise_multiplier=0` as its own. It does not know the
    noise, which the victim drew, but it can clip each example as the victim does.

    Args:
        loss_fn: Function `(params, batch) -> loss`, a scalar. It is called with batches of one example. With `loss_key`
            it is a function `(key) -> loss_fn` that returns such a loss.
        key: Key of the noise of this client in this round. The attacker never has it. A key that is used twice draws
            the same noise, which cancels in the difference of the two updates. `vmap` over clients gives each of them a
            key of its own.
        norm: Largest L2 norm of one example's gradient, all parameters together, positive and finite.
        noise_multiplier: Standard deviation of the noise on the sum, in units of `norm`, at least 0 and finite.
        loss_key: Key of a loss that draws, such as `Precode.loss_fn`: every example gets a key of its own, split off
            this one. It belongs to this client and this round, differs from `key`, and the attacker never has it. With
            None the loss draws nothing, or the same for every example.
        microbatch_size: Number of examples whose gradients are held in memory at a time, a divisor of the batch's size.
            None holds those of the whole batch.
        lowering: How convolutions are computed: "matmul" as matrix products, "native" as they are, "auto" chooses the
            first on CPU and the second elsewhere.

    Returns:
        The client, a function `(params, batch) -> update`. One `key` stands for one noise and one `loss_key` for one
        draw, which are the same in every call.

    Raises:
        ValueError: If `norm` is not positive and finite, `noise_multiplier` is negative or not finite, or
            `microbatch_size` is no positive integer. The client raises it if a batch is empty or its size is no
            multiple of `microbatch_size`, or if a model has batch normalisation in training mode, which mixes the
            examples.

    Formal Guarantees:
        In exact arithmetic (rounding adds to it; bfloat16 visibly) adding or removing one example changes the sum by at
        most `norm` in L2, and replacing one by at most 2 `norm`. The shared mean is that sum over a public b, so that
        replacing is the relation of one release. There is no sampling, hence no amplification, and without noise there
        is no epsilon. All of it is for given draws of the loss, which do not depend on the data.

    Examples:
        Without noise the update is the mean of the clipped gradients. Here (3, 4) is clipped to (0.6, 0.8), and (0,
        0.5) stays:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, defenses
        >>> loss_fn = lambda params, batch: jnp.mean(batch.inputs @ params)
        >>> client_fn = defenses.dp_sgd(loss_fn, jax.random.key(0), norm=1.0, noise_multiplier=0.0)
        >>> batch = Batch(jnp.array([[3.0, 4.0], [0.0, 0.5]]), jnp.zeros(2, jnp.int32))
        >>> [f"{entry:.2f}" for entry in client_fn(jnp.zeros(2), batch).tolist()]
        ['0.30', '0.65']
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
        size = _check.examples(batch.inputs)
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
