"""Several local steps: the client of federated averaging (McMahan et al., AISTATS 2017, Algorithm 1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Batch, ClientFn, LossFn, Params, Updates
from gia_jax.clients.gradient import parameter_gradient
from gia_jax.clients.sgd import Draws
from gia_jax.lowering import Lowering, lowers_to_matmul
from gia_jax.precision import cast_like, widened_tree


def federated_averaging(
    loss_fn: LossFn | Callable[[PRNGKeyArray], LossFn],
    *,
    learning_rate: float | Float[Array, ""],
    local_epochs: int = 1,
    minibatch_size: int | None = None,
    order_key: PRNGKeyArray | None = None,
    loss_key: PRNGKeyArray | None = None,
    lowering: Lowering = "auto",
) -> ClientFn:
    """A client that runs `local_epochs` epochs of minibatch SGD and shares the change of its parameters.

    The change is returned as a pseudo-gradient, (theta_0 - theta_S) / (S * learning_rate): the mean of the S local
    gradients, with the sign and scale of one, so that label rules and matching losses hold as they stand.

    The attacker simulates the same steps on its dummy data. Where it does not know the order of the examples, leave
    `order_key` out of the attacker's client and give the victim's one: the dummy data then stand for the examples in
    the order of the attacker's own choosing. The steps run in `lax.scan` with rematerialisation: memory grows with the
    number of steps only by one copy of the parameters each. The weights are trained in float32 or wider, because half
    precision loses a small step; the model sees them, and their change is shared, in the type of the parameters.

    Args:
        loss_fn: `(params, batch) -> ` scalar. With `loss_key`, `(key) -> ` such a loss.
        learning_rate: Learning rate of the local SGD steps, > 0 and finite; it may be traced.
        local_epochs: Number of passes over the batch, at least 1.
        minibatch_size: Number of examples in a step, a divisor of the batch's size; None takes the whole batch.
        order_key: A victim's own shuffling of its examples, anew every epoch; None keeps their order. Per-client keys
            go in by building the client inside the mapped function.
        loss_key: The key of a loss that draws, such as one of `models.stochastic`: every local step has a key of its
            own, split off this one; of this client and this round, never the attacker's. None: the loss draws nothing.
        lowering: How convolutions are computed, as for `federated_sgd`.

    Returns:
        `(params, batch) -> pseudo-gradient`.

    Raises:
        ValueError: If a count is no positive integer, a concrete learning rate is not positive and finite, `lowering`
            is unknown, or (when called) the batch's size is not a multiple of `minibatch_size`.
    """
    _check.integer(local_epochs=local_epochs)
    if minibatch_size is not None:
        _check.integer(minibatch_size=minibatch_size)
    _check.scalar(learning_rate=learning_rate)
    _check.positive(learning_rate=learning_rate)
    _check.finite("learning_rate", learning_rate)
    lowers_to_matmul(lowering)  # refuses an unknown one here
    _check.different(order_key=order_key, loss_key=loss_key)
    loss = Draws(loss_fn, loss_key)

    def client_fn(params: Params, batch: Batch) -> Updates:
        _check.examples(batch.inputs)
        size = batch.inputs.shape[0]
        step_size = size if minibatch_size is None else minibatch_size
        if size % step_size:
            raise ValueError(f"minibatch_size must divide the batch's size {size}, got {minibatch_size}")
        loss.check(params, batch)
        _check.fits(size * int(local_epochs), local_epochs=local_epochs)
        epochs = jnp.tile(jnp.arange(size), (local_epochs, 1))
        if order_key is not None:
            keys = jax.random.split(order_key, local_epochs)
            epochs = jax.vmap(jax.random.permutation)(keys, epochs)
        indices = epochs.reshape(-1, step_size)

        @jax.checkpoint
        def local_step(current: Params, step: tuple[jax.Array, PRNGKeyArray | None]) -> tuple[Params, None]:
            index, own = step
            gradient_fn = parameter_gradient(loss.of(own), lowering=lowering)
            gradient = gradient_fn(cast_like(current, params), jax.tree.map(lambda leaf: leaf[index], batch))
            gradient = widened_tree(gradient)
            return jax.tree.map(lambda p, g: p - jnp.asarray(learning_rate, p.dtype) * g, current, gradient), None

        start = widened_tree(params)
        trained, _ = jax.lax.scan(local_step, start, (indices, loss.keys(len(indices))))
        total = indices.shape[0] * learning_rate
        change = jax.tree.map(lambda before, after: (before - after) / jnp.asarray(total, before.dtype), start, trained)
        return cast_like(change, params)

    return client_fn
