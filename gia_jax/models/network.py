"""Networks described layer by layer, for attacks that walk over them: convolutions, dense layers, residual blocks."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Params
from gia_jax.models.layers import fan_in_uniform, flatten


class Activation(NamedTuple):
    """An invertible activation, applied to single values.

    Attributes:
        fn: The activation.
        inverse_fn: Its inverse on its range.
        is_homogeneous: Whether fn(s z) = s fn(z) for all s > 0.
    """

    fn: Callable[[Array], Array]
    inverse_fn: Callable[[Array], Array]
    is_homogeneous: bool = False


def leaky_relu(slope: float) -> Activation:
    """The activation z for z > 0 and slope * z otherwise; ValueError unless slope > 0, or it has no inverse."""
    _check.positive(slope=slope)
    return Activation(
        lambda z: jax.nn.leaky_relu(z, slope), lambda x: jax.nn.leaky_relu(x, 1 / slope), is_homogeneous=True
    )


sigmoid = Activation(jax.nn.sigmoid, lambda x: jnp.log(x) - jnp.log1p(-x))


class Convolution(NamedTuple):
    """A square convolution, padded alike on all sides.

    Attributes:
        name: Its key in the parameters, which hold "kernel" of shape (size, size, inputs, features) and, if `bias`,
            "bias" of shape (features,).
        features: Channels of the output.
        size: Height and width of the kernel.
        stride: In both directions.
        padding: Zeros on every side.
        bias: Whether there is one.
    """

    name: str
    features: int
    size: int
    stride: int = 1
    padding: int = 0
    bias: bool = False


class FullyConnected(NamedTuple):
    """A dense layer; it flattens what it gets.

    Attributes:
        name: Its key in the parameters, which hold "kernel" of shape (inputs, features) and, if `bias`, "bias".
        features: Outputs.
        bias: Whether there is one.
    """

    name: str
    features: int
    bias: bool = False


class Residual(NamedTuple):
    """second(activation(first(x))) + shortcut(x).

    Attributes:
        first: The first convolution.
        second: The second.
        shortcut: A convolution, or None for the identity.
    """

    first: Convolution
    second: Convolution
    shortcut: Convolution | None = None

    @property
    def name(self) -> str:
        """Of the two convolutions."""
        return f"{self.first.name}+{self.second.name}"


Layer = Convolution | FullyConnected | Residual
Shape = tuple[int, ...]


class Network(NamedTuple):
    """Hidden layers, each followed by the activation, and a dense layer.

    Attributes:
        hidden: From the input on.
        head: The last layer.
        activation: After every hidden layer, and inside residual blocks.
    """

    hidden: tuple[Layer, ...]
    head: FullyConnected
    activation: Activation = leaky_relu(0.2)

    def apply(self, params: Params, inputs: Float[Array, "b *d"]) -> Float[Array, "b *c"]:
        """The forward pass up to the logits."""
        for layer in self.hidden:
            inputs = self.activation.fn(apply_layer(layer, self.activation, params, inputs))
        return apply_layer(self.head, self.activation, params, inputs)

    def init(self, key: PRNGKeyArray, input_shape: Shape) -> Params:
        """Parameters from U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), the default of PyTorch's layers."""
        params = {}
        for i, (layer, shape) in enumerate(parameter_layers(self, input_shape)):
            key_kernel, key_bias = jax.random.split(jax.random.fold_in(key, i))
            if isinstance(layer, Convolution):
                kernel = fan_in_uniform(key_kernel, (layer.size, layer.size, shape[-1], layer.features))
            else:
                kernel = fan_in_uniform(key_kernel, (math.prod(shape), layer.features))
            limit = (kernel.size / layer.features) ** -0.5
            bias = jax.random.uniform(key_bias, (layer.features,), minval=-limit, maxval=limit)
            params[layer.name] = {"kernel": kernel} | ({"bias": bias} if layer.bias else {})
        return params


def parameter_layers(network: Network, input_shape: Shape) -> list[tuple[Convolution | FullyConnected, Shape]]:
    """Every layer that has parameters, with the shape of its input."""
    found: list[tuple[Convolution | FullyConnected, Shape]] = []
    for layer, shape in zip((*network.hidden, network.head), shapes(network, input_shape), strict=True):
        if isinstance(layer, Residual):
            found += [(layer.first, shape), (layer.second, output_shape(layer.first, shape))]
            found += [(layer.shortcut, shape)] if layer.shortcut is not None else []
        else:
            found.append((layer, shape))
    return found


def shapes(network: Network, input_shape: Shape) -> list[Shape]:
    """The shape of an example at the input of every layer, the head's last.

    Raises:
        ValueError: A layer, by its name, that cannot take what it gets.
    """
    found = [tuple(input_shape)]
    for layer in network.hidden:
        found.append(output_shape(layer, found[-1]))
    return found


def output_shape(layer: Layer, shape: Shape) -> Shape:
    """The shape of a layer's output for an example of the given shape."""
    if isinstance(layer, FullyConnected):
        return (layer.features,)
    if len(shape) != 3:
        raise ValueError(f"layer {layer.name!r} needs an input of shape (h, w, c), got {shape}")
    if isinstance(layer, Residual):
        main = output_shape(layer.second, output_shape(layer.first, shape))
        short = shape if layer.shortcut is None else output_shape(layer.shortcut, shape)
        if main != short:
            raise ValueError(f"layer {layer.name!r} adds shapes {main} and {short}")
        return main
    height, width = ((n + 2 * layer.padding - layer.size) // layer.stride + 1 for n in shape[:2])
    if min(height, width) < 1:
        raise ValueError(f"layer {layer.name!r} leaves nothing of an input of shape {shape}")
    return (height, width, layer.features)


def apply_layer(layer: Layer, activation: Activation, params: Params, x: Float[Array, "b *d"]) -> Float[Array, "b *e"]:
    """The forward pass of one layer, before the activation that follows it."""
    if isinstance(layer, Residual):
        hidden = activation.fn(apply_layer(layer.first, activation, params, x))
        short = x if layer.shortcut is None else apply_layer(layer.shortcut, activation, params, x)
        return apply_layer(layer.second, activation, params, hidden) + short
    kernel, bias = params[layer.name]["kernel"], params[layer.name].get("bias", 0)
    if isinstance(layer, FullyConnected):
        return flatten(x) @ kernel + bias
    padding = ((layer.padding, layer.padding),) * 2
    strides = (layer.stride, layer.stride)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias


def cnn6(num_outputs: int = 1, *, bias: bool = False, features: tuple[int, ...] = (12, 36, 36, 36, 64, 128)) -> Network:
    """CNN6 of R-GAP: six convolutions without bias, leaky ReLU of slope 0.2, a dense layer.

    Args:
        num_outputs: 1 for the paper's binary classifier.
        bias: Of the dense layer; with 10 outputs and a bias it is `gia_jax.models.CNN6`.
        features: Of the convolutions; 20 in the second place is the paper's CNN6-d.

    Returns:
        The network, for inputs of any shape (h, w, c).
    """
    geometry = ((4, 2, 2), (3, 2, 1), (3, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 1))
    convolutions = (
        Convolution(f"conv{i}", out, *rest) for i, (out, rest) in enumerate(zip(features, geometry, strict=True))
    )
    return Network(tuple(convolutions), FullyConnected("head", num_outputs, bias))
