"""The client of federated averaging, which takes several local steps (McMahan et al., AISTATS 2017, Algorithm 1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Batch, ClientFn, LossFn, Params, Scalar, Updates
from gia_jax.clients.gradient import parameter_gradient
from gia_jax.clients.sgd import Draws
from gia_jax.lowering import Lowering, lowers_to_matmul
from gia_jax.precision import cast_like, widened_tree


def federated_averaging(
    loss_fn: LossFn | Callable[[PRNGKeyArray], LossFn],
    *,
    learning_rate: Scalar,
    local_epochs: int = 1,
    minibatch_size: int | None = None,
    order_key: PRNGKeyArray | None = None,
    loss_key: PRNGKeyArray | None = None,
    divisor: Scalar | None = None,
    lowering: Lowering = "auto",
) -> ClientFn:
    """Builds a client that runs `local_epochs` epochs of minibatch SGD and shares the change of its parameters.

    The change is returned as a pseudo-gradient, (theta_0 - theta_S) / (S * learning_rate). It is the mean of the S
    local gradients, with the sign and scale of one, so that label rules and matching losses hold as they stand.

    The attacker simulates the same steps on its dummy data. Where it does not know the order of the examples, leave
    `order_key` out of the attacker's client and give the victim's one: the dummy data then stand for the examples in
    the order of the attacker's own choosing. One epoch over E copies of the batch, one after the other, is the same as
    E epochs. So a client of one epoch takes examples that differ from epoch to epoch, as `attacks.fedavg_leakage` does.

    The steps run in `lax.scan` with rematerialisation: memory grows with the number of steps only by one copy of the
    parameters each. The weights are trained in float32 or wider, because half precision loses a small step. The model
    sees them, and their change is shared, in the type of the parameters.

    Args:
        loss_fn: Function `(params, batch) -> loss`, a scalar. With `loss_key` it is a function `(key) -> loss_fn` that
            returns such a loss.
        learning_rate: Learning rate of the local SGD steps, above 0 and finite. It may be traced.
        local_epochs: Number of passes over the batch, at least 1.
        minibatch_size: Number of examples in a step, a divisor of the batch's size. None takes the whole batch.
        order_key: Key of a victim's own shuffling of its examples, anew every epoch. None keeps their order. Give each
            client a key of its own by building the client inside the mapped function.
        loss_key: Key of a loss that draws, such as one of `models.stochastic`: every local step gets a key of its own,
            split off this one. It belongs to this client and this round, and the attacker never has it. With None the
            loss draws nothing.
        divisor: Number that the change of the parameters is divided by, above 0 and finite. None divides by
            S * learning_rate. A server that does not know these divides by a number of its own, such as 1, and assumes
            the same one of every client that it simulates.
        lowering: How convolutions are computed: "matmul" as matrix products, "native" as they are, "auto" chooses the
            first on CPU and the second elsewhere.

    Returns:
        The client, a function `(params, batch) -> pseudo-gradient`.

    Raises:
        ValueError: If a count is no positive integer, a concrete learning rate or `divisor` is not positive and finite,
            `lowering` is unknown, or `order_key` and `loss_key` are the same. The client raises it if the batch's size
            is not a multiple of `minibatch_size`.

    Examples:
        Two steps move the parameter from 0 to 0.5 and to 0.75. The local gradients are -1 and -0.5:

        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, clients
        >>> loss_fn = lambda params, batch: 0.5 * jnp.mean(jnp.square(params - batch.inputs))
        >>> client_fn = clients.federated_averaging(loss_fn, learning_rate=0.5, local_epochs=2)
        >>> float(client_fn(jnp.array(0.0), Batch(jnp.ones((1, 1)), jnp.array([0]))))
        -0.75
    """
    _check.integer(local_epochs=local_epochs)
    if minibatch_size is not None:
        _check.integer(minibatch_size=minibatch_size)
    _check.scalar(learning_rate=learning_rate)
    _check.positive(learning_rate=learning_rate)
    _check.finite("learning_rate", learning_rate)
    if divisor is not None:
        _check.scalar(divisor=divisor)
        _check.positive(divisor=divisor)
        _check.finite("divisor", divisor)
    lowers_to_matmul(lowering)  # refuses an unknown one here
    _check.different(order_key=order_key, loss_key=loss_key)
    loss = Draws(loss_fn, loss_key)

    def client_fn(params: Params, batch: Batch) -> Updates:
        size = _check.examples(batch.inputs)
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
        total = indices.shape[0] * learning_rate if divisor is None else divisor
        change = jax.tree.map(lambda before, after: (before - after) / jnp.asarray(total, before.dtype), start, trained)
        return cast_like(change, params)

    return client_fn
