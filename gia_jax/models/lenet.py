"""The LeNet of DLG (Zhu et al., NeurIPS 2019): strides instead of pooling, so that it is smooth."""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from gia_jax.models.layers import flatten, symmetric_uniform


class LeNet(nnx.Module):
    """A network of three 5x5 convolutions of 12 features (strides 2, 2, 1) and a dense layer.

    All weights and biases are drawn from U(-0.5, 0.5). The network has 15,826 parameters for 32x32x3 inputs and 10
    classes.

    Args:
        input_shape: Shape (h, w, c) of an image.
        num_classes: Number of classes, and so of logits.
        activation: Function applied to every entry after each convolution. The default is the paper's sigmoid.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Examples:
        The parameters are counted without computing them:

        >>> import jax
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> module = nnx.eval_shape(lambda: models.LeNet(rngs=nnx.Rngs(0)))
        >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
        15826
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int] = (32, 32, 3),
        num_classes: int = 10,
        *,
        activation: Callable[[Array], Array] = jax.nn.sigmoid,
        rngs: nnx.Rngs,
    ) -> None:
        height, width, channels = input_shape
        init = symmetric_uniform(0.5)

        def conv(features_in: int, stride: int) -> nnx.Conv:
            padding = ((2, 2), (2, 2))
            return nnx.Conv(
                features_in, 12, (5, 5), stride, padding=padding, kernel_init=init, bias_init=init, rngs=rngs
            )

        self.activation = activation
        self.conv1, self.conv2, self.conv3 = conv(channels, 2), conv(12, 2), conv(12, 1)
        features = 12 * -(-height // 4) * -(-width // 4)
        self.head = nnx.Linear(features, num_classes, kernel_init=init, bias_init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = self.activation(conv(x))
        return self.head(flatten(x, self.head))
