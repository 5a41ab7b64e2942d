"""Several local steps: the client of federated averaging (McMahan et al., AISTATS 2017, Algorithm 1)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax.base import Batch, ClientFn, LossFn, Params, Updates
from gia_jax.clients.gradient import parameter_gradient
from gia_jax.lowering import Lowering


def federated_averaging(
    loss_fn: LossFn,
    *,
    learning_rate: float | Float[Array, ""],
    local_epochs: int = 1,
    minibatch_size: int | None = None,
    order_key: PRNGKeyArray | None = None,
    lowering: Lowering = "auto",
) -> ClientFn:
    """A client that runs `local_epochs` epochs of minibatch SGD and shares the change of its parameters.

    The change is returned as a pseudo-gradient, (theta_0 - theta_S) / (S * learning_rate): the mean of the S local
    gradients, with the sign and scale of one, so that label rules and matching losses hold as they stand.

    The attacker simulates the same steps on its dummy data. Where it does not know the order of the examples, leave
    `order_key` out of the attacker's client and give the victim's one: the dummy data then stand for the examples in
    the order of the attacker's own choosing. The steps run in `lax.scan` with rematerialisation: memory grows with the
    number of steps only by one copy of the parameters each.

    Args:
        loss_fn: `(params, batch) -> ` scalar.
        learning_rate: Of the local SGD steps, > 0; it may be traced.
        local_epochs: Passes over the batch, >= 1.
        minibatch_size: Examples a step, a divisor of the batch's size; None takes the whole batch.
        order_key: A victim's own shuffling of its examples, anew every epoch; None keeps their order. Per-client keys
            go in by building the client inside the mapped function.
        lowering: As for `federated_sgd`.

    Returns:
        `(params, batch) -> pseudo-gradient`.

    Raises:
        ValueError: If a count is below one, a concrete learning rate is not positive, or (when called) the batch's size
            is not a multiple of `minibatch_size`.
    """
    if local_epochs < 1:
        raise ValueError(f"local_epochs must be at least 1, got {local_epochs}")
    if minibatch_size is not None and minibatch_size < 1:
        raise ValueError(f"minibatch_size must be at least 1, got {minibatch_size}")
    if not isinstance(learning_rate, jax.core.Tracer) and not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    gradient_fn = parameter_gradient(loss_fn, lowering=lowering)

    def client_fn(params: Params, batch: Batch) -> Updates:
        size = batch.inputs.shape[0]
        step_size = size if minibatch_size is None else minibatch_size
        if size % step_size:
            raise ValueError(f"minibatch_size must divide the batch's size {size}, got {minibatch_size}")
        epochs = jnp.tile(jnp.arange(size), (local_epochs, 1))
        if order_key is not None:
            keys = jax.random.split(order_key, local_epochs)
            epochs = jax.vmap(jax.random.permutation)(keys, epochs)
        indices = epochs.reshape(-1, step_size)

        @jax.checkpoint
        def local_step(current: Params, index: jax.Array) -> tuple[Params, None]:
            gradient = gradient_fn(current, jax.tree.map(lambda leaf: leaf[index], batch))
            return jax.tree.map(lambda p, g: p - jnp.asarray(learning_rate, p.dtype) * g, current, gradient), None

        trained, _ = jax.lax.scan(local_step, params, indices)
        total = indices.shape[0] * learning_rate
        return jax.tree.map(lambda before, after: (before - after) / jnp.asarray(total, before.dtype), params, trained)

    return client_fn
