"""A client whose update passes through a transformation before it is shared."""

import optax

from gia_jax.base import Batch, ClientFn, Params, Updates


def defended(client_fn: ClientFn, transformation: optax.GradientTransformation) -> ClientFn:
    """Builds the client of a single round that shares `transformation` of its update.

    Every call starts from the transformation's `init`, so that it draws the same randomness and has no residual. Build
    another client, from another key, for another round.

    Any attack accepts this client and differentiates through it. Which client and objective an attacker that knows the
    defense should use, each transformation says in its own docstring: through signs, for one, there is no derivative.

    Args:
        client_fn: Client to defend, a function `(params, batch) -> update`.
        transformation: Any optax transformation, `optax.chain` of several included. It starts from its `init(params)`.

    Returns:
        The defended client, a function `(params, batch) -> update`.

    Examples:
        The gradient is (3, 4) here. Half of it is pruned, and the rest is clipped to norm 1:

        >>> import jax.numpy as jnp
        >>> import optax
        >>> from gia_jax import Batch, clients, defenses
        >>> client_fn = clients.federated_sgd(lambda params, batch: jnp.mean(batch.inputs @ params))
        >>> client_fn = defenses.defended(client_fn, optax.chain(defenses.prune(0.5), defenses.clip(1.0)))
        >>> client_fn(jnp.zeros(2), Batch(jnp.array([[3.0, 4.0]]), jnp.array([0]))).tolist()
        [0.0, 1.0]
    """

    def defended_fn(params: Params, batch: Batch) -> Updates:
        update, _ = transformation.update(client_fn(params, batch), transformation.init(params), params)
        return update

    return defended_fn
