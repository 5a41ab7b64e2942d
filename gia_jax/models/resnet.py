"""Residual networks (He et al., CVPR 2016), with the stem of CIFAR for small images or that of ImageNet."""

import re
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gia_jax.models.layers import GROUPS, batch_norm, fan_out_normal, group_norm, linear, max_pool

Stem = Literal["cifar", "imagenet"]
Norm = Literal["batch", "group"]
STEMS = {"cifar": (3, 1, False), "imagenet": (7, 2, True)}  # size and stride of the convolution; whether it pools
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

    `blocks=(2, 2, 2, 2), width=64` is ResNet-18 (11,173,962 parameters for 10 classes; with the stem of ImageNet and
    1,000 classes 11,689,512, as in torchvision, whose weights `resnet_names` reads), `(3, 3, 3), width=16` is ResNet-20
    with projections for shortcuts (272,474), `(3, 3, 3), width=64` the ResNet20-4 and `(5, 5, 5), width=160` the
    ResNet32-10 of Inverting Gradients. Both normalisations have as many parameters.

    Args:
        input_shape: Shape (h, w, c) of an image.
        num_classes: Number of classes, and so of logits.
        blocks: Number of blocks in each stage. Every stage but the first halves the image and doubles the features.
        width: Number of features of the first stage. With group normalisation it is a multiple of 8.
        norm: Normalisation after every convolution. "batch" is that of the paper. "group" is group normalisation with 8
            groups, which shares no statistics between examples, for clients that clip or protect single examples.
        stem: First layers: "cifar", a 3x3 convolution that keeps the size of the image, or "imagenet", a 7x7
            convolution and a maximum over 3x3 pixels, which halve it each.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Raises:
        ValueError: If `norm` or `stem` is another one, or `width` is no positive multiple of 8 with group
            normalisation.

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
        stem: Stem = "cifar",
        rngs: nnx.Rngs,
    ) -> None:
        if stem not in STEMS:
            raise ValueError(f"stem must be 'cifar' or 'imagenet', got {stem!r}")
        if norm not in _NORMS:
            raise ValueError(f"norm must be 'batch' or 'group', got {norm!r}")
        if norm == "group" and (width <= 0 or width % GROUPS):
            raise ValueError(f"width must be a positive multiple of {GROUPS} with norm='group', got {width}")
        size, stride, self.pools = STEMS[stem]
        self.stem, self.stem_norm = _conv(input_shape[-1], width, size, stride, rngs), _NORMS[norm](width, rngs=rngs)
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
        x = max_pool(x, 3, stride=2, padding=1) if self.pools else x
        for name in self.names:
            x = getattr(self, name)(x)
        return self.head(jnp.mean(x, (1, 2)))


def resnet_names(prefix: str) -> str | None:
    """Translates the names of torchvision's ResNet-18 and ResNet-34, for `interop.load_torch(names=)`.

    Args:
        prefix: Name of a layer there, such as "layer2.0.downsample.1".

    Returns:
        Path of the same layer of `ResNet(..., stem="imagenet")`, such as "stage1_block0.shortcut_norm", or None for
        another name.

    Examples:
        >>> from gia_jax import models
        >>> models.resnet_names("layer2.0.downsample.1")
        'stage1_block0.shortcut_norm'
        >>> models.resnet_names("fc")
        'head'
    """
    outer = {"conv1": "stem", "bn1": "stem_norm", "fc": "head"}
    inner = {
        "conv1": "conv1",
        "bn1": "norm1",
        "conv2": "conv2",
        "bn2": "norm2",
        "downsample.0": "shortcut",
        "downsample.1": "shortcut_norm",
    }
    found = re.fullmatch(r"layer([1-4])\.(\d+)\.(.+)", prefix)
    if found and found[3] in inner:
        return f"stage{int(found[1]) - 1}_block{found[2]}.{inner[found[3]]}"
    return outer.get(prefix)
