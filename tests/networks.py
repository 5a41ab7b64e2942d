"""A network that compiles in a moment, for tests of what does not depend on convolutions."""

from collections.abc import Callable

import jax
from flax import nnx

from gia_jax.models.layers import flatten, linear


class Tiny(nnx.Module):
    """One hidden layer of smooth features, and a head."""

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        width: int = 48,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation = activation
        size = 1
        for side in input_shape:
            size *= side
        self.body = linear(size, width, rngs=rngs)
        self.head = linear(width, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.activation(self.body(flatten(x))))
