"""A client whose update passes through a transformation before it is shared."""

import optax

from gia_jax.base import Batch, ClientFn, Params, Updates


def defended(client_fn: ClientFn, transformation: optax.GradientTransformation) -> ClientFn:
    """The client of a single round that shares `transformation` of its update.

    Attacks differentiate through it: an adaptive attacker passes its own defended client to any attack. Where the
    transformation is random the attacker's must come from a key of its own, or leave the randomness out.

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
