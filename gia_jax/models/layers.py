"""What several models share: PyTorch's initialisation, symmetric padding, and a pooling with second derivatives."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

# U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), the default of PyTorch's layers.
fan_in_uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# N(0, 2 / fan_out), the initialisation of residual networks.
fan_out_normal = jax.nn.initializers.variance_scaling(2, "fan_out", "normal")
GROUPS = 8  # of group normalisation: every number of features is a multiple of it


def symmetric_uniform(limit: float) -> jax.nn.initializers.Initializer:
    """Returns an initialiser that draws weights from U(-limit, limit).

    Args:
        limit: Largest absolute value of a weight.

    Returns:
        The initialiser, a function `(key, shape, dtype) -> weights`.

    Examples:
        >>> import jax
        >>> from gia_jax.models.layers import symmetric_uniform
        >>> weights = symmetric_uniform(0.5)(jax.random.key(0), (8,))
        >>> bool(abs(weights).max() <= 0.5)
        True
    """

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def conv(
    features_in: int,
    features: int,
    size: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    bias: bool = True,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Builds a square convolution that is padded alike on all sides and initialised as PyTorch does it.

    Args:
        features_in: Number of channels of the input.
        features: Number of channels of the output.
        size: Height and width of the kernel, in pixels.
        stride: Stride in both directions, in pixels.
        padding: Number of zeros on every side. By default half the size, rounded down.
        bias: Whether the layer has a bias.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Returns:
        The layer.
    """
    pad = size // 2 if padding is None else padding
    return nnx.Conv(
        features_in,
        features,
        (size, size),
        stride,
        padding=((pad, pad), (pad, pad)),
        use_bias=bias,
        kernel_init=fan_in_uniform,
        bias_init=symmetric_uniform((features_in * size * size) ** -0.5),
        rngs=rngs,
    )


def linear(features_in: int, features: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Builds a dense layer that is initialised as PyTorch does it.

    Args:
        features_in: Number of inputs.
        features: Number of outputs.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Returns:
        The layer.
    """
    limit = features_in**-0.5
    return nnx.Linear(features_in, features, kernel_init=fan_in_uniform, bias_init=symmetric_uniform(limit), rngs=rngs)


def batch_norm(features: int, *, epsilon: float = 1e-5, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Builds a batch normalisation with PyTorch's momentum 0.1 (0.9 as flax counts it) and a two-pass variance.

    Args:
        features: Number of features.
        epsilon: Number added to the variance, above 0.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Returns:
        The layer.
    """
    return nnx.BatchNorm(features, momentum=0.9, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def group_norm(features: int, *, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Builds a group normalisation with 8 groups and a two-pass variance.

    Args:
        features: Number of features, a multiple of 8.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Returns:
        The layer.
    """
    return nnx.GroupNorm(features, num_groups=GROUPS, use_fast_variance=False, rngs=rngs)


def max_pool(
    x: Float[Array, "b h w c"], size: int, *, stride: int | None = None, padding: int = 0
) -> Float[Array, "b i j c"]:
    """Takes the maximum over squares of `size` pixels and leaves incomplete squares out.

    It is a tree of pairwise maxima: the derivative of `jnp.max` divides by the number of maximal entries, and under jit
    the second derivative can find none.

    Args:
        x: Images or features, shape (b, h, w, c).
        size: Height and width of a square, in pixels.
        stride: Distance of a square to the next in pixels, at least 1. None takes `size`.
        padding: Number of pixels by which every side is extended, below `size`. They are never the maximum.

    Returns:
        The maxima, shape (b, i, j, c) with i = (h + 2 padding - size) // stride + 1, and so for j.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.models.layers import max_pool
        >>> max_pool(jnp.arange(9.0).reshape(1, 3, 3, 1), 2).ravel().tolist()
        [4.0]
    """
    stride = size if stride is None else stride
    if padding:
        widths = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        x = jnp.pad(x, widths, constant_values=-jnp.inf)
    height, width = ((length - size) // stride * stride for length in x.shape[1:3])
    parts = [x[:, i : i + height + 1 : stride, j : j + width + 1 : stride] for i in range(size) for j in range(size)]
    return functools.reduce(jnp.maximum, parts)


def flatten(x: Float[Array, "b *d"], into: nnx.Module | None = None) -> Float[Array, "b e"]:
    """Puts all axes but the first, that of the batch, into one.

    Args:
        x: Array of shape (b, *d).
        into: Dense layer that takes the result. None is for any number of values.

    Returns:
        The same values in shape (b, e), with e the product of d.

    Raises:
        ValueError: If `into` takes another number of values, as where images have another size than that for which a
            model was made.
    """
    flat = x.reshape(x.shape[0], -1)
    taken = getattr(into, "in_features", flat.shape[1])
    if flat.shape[1] != taken:
        raise ValueError(
            f"inputs must have the size that the model was made for: its dense layer takes {taken} values, got "
            f"{flat.shape[1]}"
        )
    return flat
