"""Networks described layer by layer (convolutions, dense layers, residual blocks), for attacks that walk over them."""

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
        fn: Function that applies the activation.
        inverse_fn: Function that inverts it on its range.
        is_homogeneous: Whether fn(s z) = s fn(z) for all s > 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import models
        >>> softplus = models.Activation(lambda z: jnp.log1p(jnp.exp(z)), lambda x: jnp.log(jnp.expm1(x)))
        >>> print(f"{softplus.inverse_fn(softplus.fn(jnp.array(2.0))):.2f}")
        2.00
    """

    fn: Callable[[Array], Array]
    inverse_fn: Callable[[Array], Array]
    is_homogeneous: bool = False


def leaky_relu(slope: float) -> Activation:
    """Builds the leaky ReLU, which is z for z > 0 and slope * z otherwise.

    Args:
        slope: Slope for negative values, above 0, or the activation has no inverse.

    Returns:
        The activation, which is homogeneous.

    Raises:
        ValueError: If `slope` is not above 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import models
        >>> activation = models.leaky_relu(0.5)
        >>> values = activation.fn(jnp.array([-2.0, 2.0]))
        >>> values.tolist(), activation.inverse_fn(values).tolist()
        ([-1.0, 2.0], [-2.0, 2.0])
    """
    _check.positive(slope=slope)
    return Activation(
        lambda z: jax.nn.leaky_relu(z, slope), lambda x: jax.nn.leaky_relu(x, 1 / slope), is_homogeneous=True
    )


# The logistic sigmoid, whose inverse is the logit.
sigmoid = Activation(jax.nn.sigmoid, lambda x: jnp.log(x) - jnp.log1p(-x))


class Convolution(NamedTuple):
    """A square convolution that is padded alike on all sides.

    Attributes:
        name: Name of the layer, its key in the parameters. They hold "kernel" of shape (size, size, inputs, features)
            and, if `bias`, "bias" of shape (features,).
        features: Number of channels of the output.
        size: Height and width of the kernel, in pixels.
        stride: Stride in both directions, in pixels.
        padding: Number of zeros on every side.
        bias: Whether the layer has a bias.

    Examples:
        >>> from gia_jax import models
        >>> from gia_jax.models.network import output_shape
        >>> output_shape(models.Convolution("conv", features=4, size=3, stride=2, padding=1), (8, 8, 3))
        (4, 4, 4)
    """

    name: str
    features: int
    size: int
    stride: int = 1
    padding: int = 0
    bias: bool = False


class FullyConnected(NamedTuple):
    """A dense layer, which flattens its inputs.

    Attributes:
        name: Name of the layer, its key in the parameters. They hold "kernel" of shape (inputs, features) and, if
            `bias`, "bias" of shape (features,).
        features: Number of outputs.
        bias: Whether the layer has a bias.

    Examples:
        >>> from gia_jax import models
        >>> from gia_jax.models.network import output_shape
        >>> output_shape(models.FullyConnected("dense", features=5), (4, 4, 2))
        (5,)
    """

    name: str
    features: int
    bias: bool = False


class Residual(NamedTuple):
    """A residual block, which computes second(activation(first(x))) + shortcut(x).

    Attributes:
        first: First convolution.
        second: Second convolution.
        shortcut: Convolution of the shortcut, or None for the identity.

    Examples:
        The identity adds its input to the output of the second convolution, so the shapes must be equal:

        >>> from gia_jax import models
        >>> from gia_jax.models.network import output_shape
        >>> first = models.Convolution("first", features=6, size=3, padding=1)
        >>> second = models.Convolution("second", features=2, size=3, padding=1)
        >>> output_shape(models.Residual(first, second), (4, 4, 2))
        (4, 4, 2)
    """

    first: Convolution
    second: Convolution
    shortcut: Convolution | None = None

    @property
    def name(self) -> str:
        """The names of the two convolutions with a plus between them."""
        return f"{self.first.name}+{self.second.name}"


Layer = Convolution | FullyConnected | Residual
Shape = tuple[int, ...]


class Network(NamedTuple):
    """A network of hidden layers, each followed by the activation, and a dense layer without one.

    Attributes:
        hidden: Hidden layers, from the input on.
        head: Last layer, whose outputs are the logits.
        activation: Activation after every hidden layer and inside of residual blocks.

    Examples:
        The convolution leaves 2x2 pixels with 2 features of 4x4 pixels. Here only shapes are computed:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import models
        >>> network = models.Network((models.Convolution("conv", 2, 3),), models.FullyConnected("head", 5))
        >>> params = jax.eval_shape(lambda key: network.init(key, (4, 4, 1)), jax.random.key(0))
        >>> params["head"]["kernel"].shape
        (8, 5)
        >>> jax.eval_shape(network.apply, params, jnp.zeros((3, 4, 4, 1))).shape
        (3, 5)
    """

    hidden: tuple[Layer, ...]
    head: FullyConnected
    activation: Activation = leaky_relu(0.2)

    def apply(self, params: Params, inputs: Float[Array, "b *d"]) -> Float[Array, "b *c"]:
        """Computes the logits of a batch.

        Args:
            params: Parameters of the network, as `init` returns them.
            inputs: Inputs, shape (b, *d).

        Returns:
            The logits, the outputs of the head.
        """
        for layer in self.hidden:
            inputs = self.activation.fn(apply_layer(layer, self.activation, params, inputs))
        return apply_layer(self.head, self.activation, params, inputs)

    def init(self, key: PRNGKeyArray, input_shape: Shape) -> Params:
        """Draws parameters from U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), the default of PyTorch's layers.

        Args:
            key: Random key of the parameters.
            input_shape: Shape of an example.

        Returns:
            The parameters, a dict with the "kernel" and, where there is one, the "bias" of every layer by its name.

        Raises:
            ValueError: If a layer, named in the message, cannot take the shape that it gets.
        """
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
    """Lists every layer that has parameters, with the shape of its input.

    Args:
        network: Network to walk over. Residual blocks are taken apart into their convolutions.
        input_shape: Shape of an example.

    Returns:
        Pairs of a layer and the shape of an example at its input, in the order of the forward pass.

    Raises:
        ValueError: If a layer, named in the message, cannot take the shape that it gets.
    """
    found: list[tuple[Convolution | FullyConnected, Shape]] = []
    for layer, shape in zip((*network.hidden, network.head), shapes(network, input_shape), strict=True):
        if isinstance(layer, Residual):
            found += [(layer.first, shape), (layer.second, output_shape(layer.first, shape))]
            found += [(layer.shortcut, shape)] if layer.shortcut is not None else []
        else:
            found.append((layer, shape))
    return found


def shapes(network: Network, input_shape: Shape) -> list[Shape]:
    """Lists the shape of an example at the input of every layer, the head's last.

    Args:
        network: Network to walk over.
        input_shape: Shape of an example.

    Returns:
        The shapes: one for each hidden layer and one for the head.

    Raises:
        ValueError: If a layer, named in the message, cannot take the shape that it gets.

    Examples:
        >>> from gia_jax import models
        >>> from gia_jax.models.network import shapes
        >>> network = models.Network((models.Convolution("conv", 2, 3),), models.FullyConnected("head", 5))
        >>> shapes(network, (4, 4, 1))
        [(4, 4, 1), (2, 2, 2)]
    """
    found = [tuple(input_shape)]
    for layer in network.hidden:
        found.append(output_shape(layer, found[-1]))
    return found


def output_shape(layer: Layer, shape: Shape) -> Shape:
    """Computes the shape of a layer's output for one example.

    Args:
        layer: Layer of the network.
        shape: Shape of the example at the layer's input.

    Returns:
        The shape of the example at the layer's output.

    Raises:
        ValueError: If the layer needs an input of shape (h, w, c) and gets another, its kernel is larger than the
            padded image, or it is a residual block whose two branches differ in shape.
    """
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
    """Computes the forward pass of one layer, before the activation that follows it.

    Args:
        layer: Layer of the network.
        activation: Activation of the network, which residual blocks apply inside.
        params: Parameters of the whole network.
        x: Inputs of the layer, shape (b, *d).

    Returns:
        The outputs of the layer.
    """
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
    """Describes CNN6 of R-GAP: six convolutions without bias, leaky ReLU of slope 0.2, and a dense layer.

    Args:
        num_outputs: Number of outputs. The default, 1, is the paper's binary classifier.
        bias: Whether the dense layer has a bias. With 10 outputs and a bias the network is `gia_jax.models.CNN6`.
        features: Numbers of features of the six convolutions. With 20 in the second place it is the paper's CNN6-d.

    Returns:
        The network, for inputs of any shape (h, w, c).

    Raises:
        ValueError: If `features` are not six.

    Examples:
        >>> from gia_jax import models
        >>> from gia_jax.models.network import shapes
        >>> network = models.cnn6()
        >>> len(network.hidden), shapes(network, (32, 32, 3))[-1]
        (6, (5, 5, 128))
    """
    geometry = ((4, 2, 2), (3, 2, 1), (3, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 1))
    convolutions = (
        Convolution(f"conv{i}", out, *rest) for i, (out, rest) in enumerate(zip(features, geometry, strict=True))
    )
    return Network(tuple(convolutions), FullyConnected("head", num_outputs, bias))
