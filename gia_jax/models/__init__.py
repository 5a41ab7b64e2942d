"""Models of the field, in flax.nnx; every one ends in a dense layer called `head`."""

import functools
from collections.abc import Callable

from flax import nnx

from gia_jax.models.convnet import CNN6, ConvNet, GroupNormNet
from gia_jax.models.functional import batch_norm_inputs, functional, headless, running_statistics
from gia_jax.models.lenet import LeNet
from gia_jax.models.mlp import MLP
from gia_jax.models.resnet import ResNet

# The names of the command line: `(input_shape, num_classes, rngs=) -> module`.
MODELS: dict[str, Callable[..., nnx.Module]] = {
    "cnn6": CNN6,
    "convnet": ConvNet,
    "groupnorm_net": GroupNormNet,
    "lenet": LeNet,
    "linear": functools.partial(MLP, hidden=()),
    "mlp": MLP,
    "resnet18": ResNet,
    "resnet20_4": functools.partial(ResNet, blocks=(3, 3, 3)),
    "resnet32_10": functools.partial(ResNet, blocks=(5, 5, 5), width=160),
}

__all__ = [
    "CNN6",
    "MLP",
    "MODELS",
    "ConvNet",
    "GroupNormNet",
    "LeNet",
    "ResNet",
    "batch_norm_inputs",
    "functional",
    "headless",
    "running_statistics",
]
