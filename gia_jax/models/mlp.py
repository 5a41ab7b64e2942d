"""Fully connected networks."""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from gia_jax.models.layers import flatten, linear


class MLP(nnx.Module):
    """Dense layers with ReLU between them; no hidden layer makes it a linear classifier.

    Args:
        input_shape: Shape of an example, (*d).
        num_classes: Outputs.
        hidden: Widths of the hidden layers.
        rngs: `nnx.Rngs`.
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (32, 32, 3),
        num_classes: int = 10,
        *,
        hidden: Sequence[int] = (1024, 1024, 1024),
        rngs: nnx.Rngs,
    ) -> None:
        features = 1
        for n in input_shape:
            features *= n
        self.depth = len(hidden)
        for i, width in enumerate(hidden):
            setattr(self, f"dense{i}", linear(features, width, rngs=rngs))
            features = width
        self.head = linear(features, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b *d"]) -> Float[Array, "b classes"]:
        x = flatten(x)
        for i in range(self.depth):
            x = jax.nn.relu(getattr(self, f"dense{i}")(x))
        return self.head(x)
