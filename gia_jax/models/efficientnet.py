"""EfficientNet-Lite0 (Tan and Le, EfficientNet, ICML 2019; the Lite form has ReLU6 and no squeeze-and-excitation)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gia_jax import _check
from gia_jax.models.layers import batch_norm, fan_out_normal, linear

EPSILON = 1e-3  # of the batch normalisation


class Stage(NamedTuple):
    """A group of inverted residual blocks.

    Attributes:
        repeats: Number of blocks.
        size: Height and width of the depthwise kernel, in pixels.
        stride: Stride of the first block, in pixels.
        expansion: Factor by which a block widens its input.
        features: Number of channels of the output.
    """

    repeats: int
    size: int
    stride: int
    expansion: int
    features: int


STEM, LAST = 32, 1280  # features of the first and the last convolution
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def _conv(features_in: int, features: int, size: int, stride: int, rngs: nnx.Rngs, groups: int = 1) -> nnx.Conv:
    """Builds a square convolution without bias, padded as in TensorFlow, where a stride of 2 pads one side more."""
    return nnx.Conv(
        features_in,
        features,
        (size, size),
        stride,
        padding="SAME",
        use_bias=False,
        feature_group_count=groups,
        kernel_init=fan_out_normal,
        rngs=rngs,
    )


class InvertedResidual(nnx.Module):
    """A block that widens its input, filters each channel by itself, narrows it, and adds the input where shapes agree.

    Args:
        features_in: Number of channels of the input.
        features: Number of channels of the output.
        size: Height and width of the depthwise kernel, in pixels.
        stride: Stride of the depthwise convolution, in pixels.
        expansion: Factor by which the input is widened. With 1 it is not.
        rngs: Random streams of the initial weights (`nnx.Rngs`).
    """

    def __init__(
        self, features_in: int, features: int, size: int, stride: int, expansion: int, *, rngs: nnx.Rngs
    ) -> None:
        wide = features_in * expansion
        self.expands, self.adds = expansion != 1, stride == 1 and features_in == features
        if self.expands:
            self.expand, self.expand_norm = _conv(features_in, wide, 1, 1, rngs), _norm(wide, rngs)
        self.depthwise, self.depthwise_norm = _conv(wide, wide, size, stride, rngs, wide), _norm(wide, rngs)
        self.project, self.project_norm = _conv(wide, features, 1, 1, rngs), _norm(features, rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        y = jax.nn.relu6(self.expand_norm(self.expand(x))) if self.expands else x
        y = jax.nn.relu6(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.adds else y


def _norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return batch_norm(features, epsilon=EPSILON, rngs=rngs)


class EfficientNetLite0(nnx.Module):
    """EfficientNet-Lite0, a network for photographs with 4,652,008 parameters for 1,000 classes.

    Trained on ImageNet it expects images of 224 x 224 pixels, (pixel - 0.498) / 0.502 for pixels in [0, 1]. Weights of
    PyTorch are put in by `interop.load_torch(module, tensors, names=models.efficientnet_lite0_names)`.

    Args:
        input_shape: Shape (h, w, c) of an image, of any size: pixels are averaged at the end.
        num_classes: Number of classes, and so of logits.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Raises:
        ValueError: If `input_shape` is not of three positive integers, or `num_classes` no positive integer.

    Examples:
        The parameters are counted without computing them:

        >>> import jax
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> module = nnx.eval_shape(lambda: models.EfficientNetLite0(rngs=nnx.Rngs(0)))
        >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
        4652008
    """

    def __init__(
        self, input_shape: tuple[int, int, int] = (224, 224, 3), num_classes: int = 1000, *, rngs: nnx.Rngs
    ) -> None:
        _check.integer(num_classes=num_classes)
        if len(_check.sizes("input_shape", input_shape)) != 3:
            raise ValueError(f"input_shape must be (h, w, c), got {input_shape}")
        self.stem, self.stem_norm = _conv(input_shape[-1], STEM, 3, 2, rngs), _norm(STEM, rngs)
        features, blocks = STEM, 0
        for stage in STAGES:
            for i in range(stage.repeats):
                stride = stage.stride if i == 0 else 1
                block = InvertedResidual(features, stage.features, stage.size, stride, stage.expansion, rngs=rngs)
                setattr(self, f"block{blocks}", block)
                features, blocks = stage.features, blocks + 1
        self.blocks = blocks
        self.last, self.last_norm = _conv(features, LAST, 1, 1, rngs), _norm(LAST, rngs)
        self.head = linear(LAST, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        x = jax.nn.relu6(self.stem_norm(self.stem(x)))
        for i in range(self.blocks):
            x = getattr(self, f"block{i}")(x)
        x = jax.nn.relu6(self.last_norm(self.last(x)))
        return self.head(jnp.mean(x, (1, 2)))


def efficientnet_lite0_names(prefix: str) -> str | None:
    """Translates the names of the PyTorch package efficientnet-lite-pytorch, for `interop.load_torch(names=)`.

    Args:
        prefix: Name of a layer there, such as "_blocks.3._bn1".

    Returns:
        Path of the same layer of `EfficientNetLite0`, such as "block3.depthwise_norm", or None for another name.

    Examples:
        >>> from gia_jax import models
        >>> models.efficientnet_lite0_names("_blocks.3._bn1")
        'block3.depthwise_norm'
        >>> models.efficientnet_lite0_names("_fc")
        'head'
    """
    outer = {"_conv_stem": "stem", "_bn0": "stem_norm", "_conv_head": "last", "_bn1": "last_norm", "_fc": "head"}
    inner = {
        "_expand_conv": "expand",
        "_bn0": "expand_norm",
        "_depthwise_conv": "depthwise",
        "_bn1": "depthwise_norm",
        "_project_conv": "project",
        "_bn2": "project_norm",
    }
    parts = prefix.split(".")
    if len(parts) == 3 and parts[0] == "_blocks" and parts[2] in inner:
        return f"block{parts[1]}.{inner[parts[2]]}"
    return outer.get(prefix)
