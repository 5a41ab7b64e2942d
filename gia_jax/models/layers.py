"""What several models share: PyTorch's initialisation, symmetric padding, a pooling with second derivatives."""

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


def symmetric_uniform(limit: float) -> jax.nn.initializers.Initializer:
    """U(-limit, limit)."""

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
    """A square convolution, padded alike on all sides (by half its size by default), initialised as PyTorch does."""
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
    """A dense layer initialised as PyTorch does."""
    limit = features_in**-0.5
    return nnx.Linear(features_in, features, kernel_init=fan_in_uniform, bias_init=symmetric_uniform(limit), rngs=rngs)


def batch_norm(features: int, *, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Batch normalisation with PyTorch's momentum 0.1 (0.9 as flax counts it) and a two-pass variance."""
    return nnx.BatchNorm(features, momentum=0.9, use_fast_variance=False, rngs=rngs)


def max_pool(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b i j c"]:
    """Maximum over squares of `size` pixels, incomplete ones left out.

    A tree of pairwise maxima: the derivative of `jnp.max` divides by the number of maximal entries, and under jit the
    second derivative can find none.
    """
    height, width = x.shape[1] // size * size, x.shape[2] // size * size
    parts = [x[:, i:height:size, j:width:size] for i in range(size) for j in range(size)]
    return functools.reduce(jnp.maximum, parts)


def flatten(x: Float[Array, "b *d"]) -> Float[Array, "b e"]:
    """Everything but the batch in one axis."""
    return x.reshape(x.shape[0], -1)
