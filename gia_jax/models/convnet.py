"""Plain convolutional networks: the ConvNet of Inverting Gradients, R-GAP's CNN6, and one with group normalisation."""

import functools

import jax
from flax import nnx
from jaxtyping import Array, Float

from gia_jax.models.layers import batch_norm, conv, flatten, group_norm, linear, max_pool


class ConvNet(nnx.Module):
    """A network of eight 3x3 convolutions, each with batch normalisation and ReLU, and two 3x3 max poolings.

    It is the ConvNet of the code of Geiping et al., Inverting Gradients, NeurIPS 2020. It has 2,904,970 parameters at
    width 64 for 32x32x3 inputs and 10 classes.

    Args:
        input_shape: Shape (h, w, c) of an image, at least 9 pixels high and wide.
        num_classes: Number of classes, and so of logits.
        width: Number of features of the first convolution. The later ones have once, twice or four times as many.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Examples:
        The parameters are counted without computing them:

        >>> import jax
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> module = nnx.eval_shape(lambda: models.ConvNet(rngs=nnx.Rngs(0)))
        >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
        2904970
    """

    def __init__(
        self, input_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10, *, width: int = 64, rngs: nnx.Rngs
    ) -> None:
        height, wide, features = input_shape
        for i, factor in enumerate((1, 2, 2, 4, 4, 4, 4, 4)):
            setattr(self, f"conv{i}", conv(features, factor * width, 3, rngs=rngs))
            setattr(self, f"norm{i}", batch_norm(factor * width, rngs=rngs))
            features = factor * width
        self.head = linear(features * (height // 9) * (wide // 9), num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        for i in range(8):
            x = jax.nn.relu(getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x)))
            x = max_pool(x, 3) if i in (5, 7) else x
        return self.head(flatten(x, self.head))


class CNN6(nnx.Module):
    """A network of six convolutions without bias, each followed by a leaky ReLU of slope 0.2, and a dense layer.

    Zhu and Blaschko, R-GAP, ICLR 2021. R-GAP's own network has one output and no bias. With 10 classes and a bias, as
    here, it has 154,266 parameters for 32x32x3 inputs.

    Args:
        input_shape: Shape (h, w, c) of an image.
        num_classes: Number of classes, and so of logits.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Examples:
        The parameters are counted without computing them:

        >>> import jax
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> module = nnx.eval_shape(lambda: models.CNN6(rngs=nnx.Rngs(0)))
        >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
        154266
    """

    def __init__(
        self, input_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10, *, rngs: nnx.Rngs
    ) -> None:
        height, width, features = input_shape
        layers = ((12, 4, 2, 2), (36, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1))
        for i, (out, size, stride, padding) in enumerate(layers):
            setattr(self, f"conv{i}", conv(features, out, size, stride=stride, padding=padding, bias=False, rngs=rngs))
            features = out
            height, width = ((n + 2 * padding - size) // stride + 1 for n in (height, width))
        self.head = linear(features * height * width, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        activation = functools.partial(jax.nn.leaky_relu, negative_slope=0.2)
        for i in range(6):
            x = activation(getattr(self, f"conv{i}")(x))
        return self.head(flatten(x, self.head))


class GroupNormNet(nnx.Module):
    """A network of four 3x3 convolutions of stride 1, 2, 1 and 2, each with group normalisation and ReLU.

    Group normalisation shares no statistics between examples. The network is for clients that clip or protect single
    examples, where batch normalisation has no meaning.

    Args:
        input_shape: Shape (h, w, c) of an image.
        num_classes: Number of classes, and so of logits.
        width: Number of features of the first two convolutions, a multiple of 8. The later two have twice as many.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Examples:
        The network holds no running statistics, unlike the ConvNet, which has a mean and a variance in each of 8
        layers:

        >>> import jax
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> for model in (models.GroupNormNet, models.ConvNet):
        ...     module = nnx.eval_shape(lambda: model(rngs=nnx.Rngs(0)))
        ...     len(jax.tree.leaves(nnx.state(module, nnx.BatchStat)))
        0
        16
    """

    def __init__(
        self, input_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10, *, width: int = 32, rngs: nnx.Rngs
    ) -> None:
        height, wide, features = input_shape
        for i, (out, stride) in enumerate(((width, 1), (width, 2), (2 * width, 1), (2 * width, 2))):
            setattr(self, f"conv{i}", conv(features, out, 3, stride=stride, rngs=rngs))
            setattr(self, f"norm{i}", group_norm(out, rngs=rngs))
            features = out
        self.head = linear(features * -(-height // 4) * -(-wide // 4), num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        for i in range(4):
            x = jax.nn.relu(getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x)))
        return self.head(flatten(x, self.head))
