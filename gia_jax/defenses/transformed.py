"""A client whose update passes through a transformation before it is shared."""

import optax

from gia_jax.base import Batch, ClientFn, Params, Updates


def defended(client_fn: ClientFn, transformation: optax.GradientTransformation) -> ClientFn:
    """The client of a single round that shares `transformation` of its update.

    Every call starts from `init`: it draws the same randomness and has no residual. Build another, from another key,
    for another round.

    Any attack accepts this client and differentiates through it. Which client and objective an attacker that knows the
    defense should use, each transformation says in its own docstring: through signs, for one, there is no derivative.

    Args:
        client_fn: `(params, batch) -> update`.
        transformation: Any optax transformation, `optax.chain` of several included; it starts from its `init(params)`.

    Returns:
        `(params, batch) -> update`.
    """

    def defended_fn(params: Params, batch: Batch) -> Updates:
        update, _ = transformation.update(client_fn(params, batch), transformation.init(params), params)
        return update

    return defended_fn
