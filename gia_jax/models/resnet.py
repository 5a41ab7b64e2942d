"""Residual networks for small images (He et al., CVPR 2016), with the 3x3 stem of CIFAR."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gia_jax.models.layers import GROUPS, batch_norm, fan_out_normal, group_norm, linear

Norm = Literal["batch", "group"]
_NORMS: dict[str, Callable[..., nnx.Module]] = {"batch": batch_norm, "group": group_norm}


def _conv(features_in: int, features: int, size: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    """Builds a square convolution without bias, padded by half its size, as residual networks initialise it."""
    pad = ((size // 2, size // 2),) * 2
    return nnx.Conv(
        features_in, features, (size, size), stride, padding=pad, use_bias=False, kernel_init=fan_out_normal, rngs=rngs
    )


class BasicBlock(nnx.Module):
    """A residual block of two 3x3 convolutions and a shortcut, which is a 1x1 convolution where shapes differ.

    Args:
        features_in: Number of channels of the input.
        features: Number of channels of the output.
        stride: Stride of the first convolution in both directions, in pixels.
        norm: Normalisation after every convolution, "batch" or "group", as `ResNet` explains it.
        rngs: Random streams of the initial weights (`nnx.Rngs`).
    """

    def __init__(self, features_in: int, features: int, stride: int, *, norm: Norm = "batch", rngs: nnx.Rngs) -> None:
        normalization = _NORMS[norm]
        self.conv1, self.norm1 = _conv(features_in, features, 3, stride, rngs), normalization(features, rngs=rngs)
        self.conv2, self.norm2 = _conv(features, features, 3, 1, rngs), normalization(features, rngs=rngs)
        self.projects = stride != 1 or features_in != features
        if self.projects:
            self.shortcut = _conv(features_in, features, 1, stride, rngs)
            self.shortcut_norm = normalization(features, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return jax.nn.relu(y + (self.shortcut_norm(self.shortcut(x)) if self.projects else x))


class ResNet(nnx.Module):
    """A residual network of basic blocks, with an average over all pixels before the dense layer.

    `blocks=(2, 2, 2, 2), width=64` is ResNet-18 (11,173,962 parameters for 10 classes), `(3, 3, 3), width=16` is
    ResNet-20 with projections for shortcuts (272,474), `(3, 3, 3), width=64` the ResNet20-4 and `(5, 5, 5), width=160`
    the ResNet32-10 of Inverting Gradients. Both normalisations have as many parameters.

    Args:
        input_shape: Shape (h, w, c) of an image.
        num_classes: Number of classes, and so of logits.
        blocks: Number of blocks in each stage. Every stage but the first halves the image and doubles the features.
        width: Number of features of the first stage. With group normalisation it is a multiple of 8.
        norm: Normalisation after every convolution. "batch" is that of the paper. "group" is group normalisation with 8
            groups, which shares no statistics between examples, for clients that clip or protect single examples.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Raises:
        ValueError: If `norm` is another one, or `width` is no positive multiple of 8 with group normalisation.

    Examples:
        The parameters are counted without computing them:

        >>> import jax
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> module = nnx.eval_shape(lambda: models.ResNet(rngs=nnx.Rngs(0)))
        >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
        11173962
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int] = (32, 32, 3),
        num_classes: int = 10,
        *,
        blocks: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        norm: Norm = "batch",
        rngs: nnx.Rngs,
    ) -> None:
        if norm not in _NORMS:
            raise ValueError(f"norm must be 'batch' or 'group', got {norm!r}")
        if norm == "group" and (width <= 0 or width % GROUPS):
            raise ValueError(f"width must be a positive multiple of {GROUPS} with norm='group', got {width}")
        self.stem, self.stem_norm = _conv(input_shape[-1], width, 3, 1, rngs), _NORMS[norm](width, rngs=rngs)
        self.names = tuple(f"stage{s}_block{b}" for s, count in enumerate(blocks) for b in range(count))
        features = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                out = width * 2**stage
                setattr(self, f"stage{stage}_block{block}", BasicBlock(features, out, stride, norm=norm, rngs=rngs))
                features = out
        self.head = linear(features, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        x = jax.nn.relu(self.stem_norm(self.stem(x)))
        for name in self.names:
            x = getattr(self, name)(x)
        return self.head(jnp.mean(x, (1, 2)))
