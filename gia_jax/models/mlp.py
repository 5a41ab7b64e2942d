"""Fully connected networks."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from gia_jax.models.layers import flatten, linear


class MLP(nnx.Module):
    """A network of dense layers with an activation between them. Without a hidden layer it is a linear classifier.

    Args:
        input_shape: Shape (*d) of an example.
        num_classes: Number of classes, and so of logits.
        hidden: Widths of the hidden layers, from the input on.
        activation: Function applied to every entry after each hidden layer. The default is ReLU.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Examples:
        The shapes of the weights follow from the settings, here without computing the weights:

        >>> from flax import nnx
        >>> from gia_jax import models
        >>> module = nnx.eval_shape(lambda: models.MLP((2, 2, 1), 3, hidden=(5,), rngs=nnx.Rngs(0)))
        >>> module.dense0.kernel.shape, module.head.kernel.shape
        ((4, 5), (5, 3))
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (32, 32, 3),
        num_classes: int = 10,
        *,
        hidden: Sequence[int] = (1024, 1024, 1024),
        activation: Callable[[Array], Array] = jax.nn.relu,
        rngs: nnx.Rngs,
    ) -> None:
        features = 1
        for n in input_shape:
            features *= n
        self.activation = activation
        self.depth = len(hidden)
        for i, width in enumerate(hidden):
            setattr(self, f"dense{i}", linear(features, width, rngs=rngs))
            features = width
        self.head = linear(features, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b *d"]) -> Float[Array, "b classes"]:
        hidden = [getattr(self, f"dense{i}") for i in range(self.depth)]
        x = flatten(x, [*hidden, self.head][0])
        for layer in hidden:
            x = self.activation(layer(x))
        return self.head(x)
