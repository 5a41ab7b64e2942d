"""Models that the field attacks, in flax.nnx, and functions that turn any module into a function of its parameters.

Every classifier ends in a dense layer called `head`. `Network` describes a network layer by layer, for attacks that
walk over its layers.
"""

import functools
from collections.abc import Callable

from flax import nnx

from gia_jax.models.convnet import CNN6, ConvNet, GroupNormNet
from gia_jax.models.denoiser import FFDNet
from gia_jax.models.efficientnet import EfficientNetLite0, efficientnet_lite0_names
from gia_jax.models.functional import (
    batch_norm_inputs,
    functional,
    headless,
    inferred_statistics,
    running_statistics,
    stochastic,
)
from gia_jax.models.generator import Decoder, VariationalAutoencoder, load_decoder, save_decoder
from gia_jax.models.graph import (
    GCN,
    GIN,
    GRAPH_MODELS,
    GraphNetwork,
    GraphSAGE,
    neighbour_average,
    normalized_adjacency,
)
from gia_jax.models.lenet import LeNet
from gia_jax.models.mlp import MLP
from gia_jax.models.network import Activation, Convolution, FullyConnected, Network, Residual, cnn6, leaky_relu, sigmoid
from gia_jax.models.resnet import ResNet, resnet_names
from gia_jax.models.vit import ViT

# The models that the command line knows by name, each a function `(input_shape, num_classes, rngs=) -> module`.
MODELS: dict[str, Callable[..., nnx.Module]] = {
    "cnn6": CNN6,
    "convnet": ConvNet,
    "efficientnet_lite0": EfficientNetLite0,
    "groupnorm_net": GroupNormNet,
    "lenet": LeNet,
    "linear": functools.partial(MLP, hidden=()),
    "mlp": MLP,
    "resnet18": ResNet,
    "resnet18_imagenet": functools.partial(ResNet, stem="imagenet"),
    "resnet20": functools.partial(ResNet, blocks=(3, 3, 3), width=16),
    "resnet20_group": functools.partial(ResNet, blocks=(3, 3, 3), width=16, norm="group"),
    "resnet20_4": functools.partial(ResNet, blocks=(3, 3, 3)),
    "resnet32_10": functools.partial(ResNet, blocks=(5, 5, 5), width=160),
    "vit": ViT,
    "vit_april": functools.partial(ViT, first_block="plain"),
}

__all__ = [
    "CNN6",
    "GCN",
    "GIN",
    "GRAPH_MODELS",
    "MLP",
    "MODELS",
    "Activation",
    "ConvNet",
    "Convolution",
    "Decoder",
    "EfficientNetLite0",
    "FFDNet",
    "FullyConnected",
    "GraphNetwork",
    "GraphSAGE",
    "GroupNormNet",
    "LeNet",
    "Network",
    "ResNet",
    "Residual",
    "VariationalAutoencoder",
    "ViT",
    "batch_norm_inputs",
    "cnn6",
    "efficientnet_lite0_names",
    "functional",
    "headless",
    "inferred_statistics",
    "leaky_relu",
    "load_decoder",
    "neighbour_average",
    "normalized_adjacency",
    "resnet_names",
    "running_statistics",
    "save_decoder",
    "sigmoid",
    "stochastic",
]
