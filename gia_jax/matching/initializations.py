"""Where the dummy inputs start: `(key, observation) -> ` inputs of the shape that the threat model grants.

They are unknowns in float32 or wider, because descent moves them by less than half precision can resolve. A client sees
them in its own type, by `as_granted`.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from gia_jax import _check
from gia_jax.base import InitFn, Observation
from gia_jax.precision import wide_dtype, widened
from gia_jax.threat import granted


def granted_dtype(observation: Observation) -> jnp.dtype:
    """The type of the client's inputs where their shape is granted, and of its parameters where it is not.

    Raises:
        ValueError: If the inputs are integers: there is nothing between them for descent, or a quotient, to end in.
    """
    like = observation.extra.get("inputs_like")
    if like is None:
        leaves = [leaf for leaf in jax.tree.leaves(observation.params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return jnp.result_type(*leaves) if leaves else jnp.result_type(float)
    if not jnp.issubdtype(like.dtype, jnp.floating):
        raise ValueError(
            f"observation.extra['inputs_like'] must be floating point to be searched by descent or solved for, got "
            f"{like.dtype}: scale pixels to floats, or attack the embeddings of tokens"
        )
    return like.dtype


def as_granted(inputs: Float[Array, "*shape"], observation: Observation) -> Float[Array, "*shape"]:
    """The inputs in the type in which the client computes with its own."""
    return inputs.astype(granted_dtype(observation))


def granted_like(observation: Observation) -> Float[Array, "b *d"]:
    """The granted zeros of the batch's shape; raises ValueError where they are not granted, or are integers."""
    like = granted(observation, "inputs_like")
    granted_dtype(observation)
    return like


def _like(observation: Observation, shape: Sequence[int] | None) -> jax.ShapeDtypeStruct:
    wanted = granted_like(observation).shape if shape is None else tuple(shape)
    return jax.ShapeDtypeStruct(wanted, wide_dtype(granted_dtype(observation)))


def _check_shape(shape: Sequence[int] | None) -> None:
    if shape is not None:
        for size in shape:
            _check.integer(shape=size)
        _check.fits(math.prod(shape), shape=tuple(shape))


def normal(*, scale: float = 1.0, mean: float = 0.0, shape: Sequence[int] | None = None) -> InitFn:
    """Independent normal pixels.

    Args:
        scale: Standard deviation, >= 0 and finite.
        mean: Mean of every pixel; with a small `scale`, 0 is near-grey for inputs normalised by the data's mean.
        shape: Shape of the inputs (b, *d), for an adversary to whom the batch's shape is not granted but guessed.

    Returns:
        The initialisation.

    Raises:
        ValueError: A scale that is negative or not finite, a mean that is not finite, or a shape that is not of
            positive integers or does not fit into memory.
    """
    _check.not_negative(scale=scale)
    _check.finite("scale", scale)
    _check.finite("mean", mean)
    _check_shape(shape)

    def init_fn(key: PRNGKeyArray, observation: Observation) -> Float[Array, "b *d"]:
        like = _like(observation, shape)
        return mean + scale * jax.random.normal(key, like.shape, like.dtype)

    return init_fn


def near_grey(*, scale: float = 0.1, shape: Sequence[int] | None = None) -> InitFn:
    """Normal pixels of a small standard deviation `scale` around 0, the grey of normalised inputs."""
    return normal(scale=scale, shape=shape)


def truncated_normal(*, scale: float = 0.1, limit: float = 0.1, shape: Sequence[int] | None = None) -> InitFn:
    """Normal pixels of standard deviation `scale`, clipped to [-limit, limit]."""
    _check.not_negative(scale=scale, limit=limit)
    _check.finite("scale", scale)
    _check.finite("limit", limit)
    _check_shape(shape)

    def init_fn(key: PRNGKeyArray, observation: Observation) -> Float[Array, "b *d"]:
        like = _like(observation, shape)
        return jnp.clip(scale * jax.random.normal(key, like.shape, like.dtype), -limit, limit)

    return init_fn


def uniform(*, low: float = -1.0, high: float = 1.0, shape: Sequence[int] | None = None) -> InitFn:
    """Independent uniform pixels in [low, high)."""
    _check.finite("low", low)
    _check.finite("high", high)
    _check_shape(shape)
    if not low < high:
        raise ValueError(f"low must be below high={high}, got {low}")

    def init_fn(key: PRNGKeyArray, observation: Observation) -> Float[Array, "b *d"]:
        like = _like(observation, shape)
        return jax.random.uniform(key, like.shape, like.dtype, low, high)

    return init_fn


def constant(value: float | Sequence[float] = 0.0, *, shape: Sequence[int] | None = None) -> InitFn:
    """One value, or one value a channel (the last axis), everywhere. Every restart is the same."""
    _check.finite("value", np.asarray(value))
    _check_shape(shape)

    def init_fn(key: PRNGKeyArray, observation: Observation) -> Float[Array, "b *d"]:
        del key
        like = _like(observation, shape)
        pixel = jnp.asarray(value, like.dtype)
        if pixel.ndim and pixel.shape != like.shape[-1:]:
            raise ValueError(f"value must be a number or one a channel, {like.shape[-1]}, got shape {pixel.shape}")
        return jnp.broadcast_to(pixel, like.shape)

    return init_fn


def patterned(size: int = 4, *, scale: float = 1.0, shape: Sequence[int] | None = None) -> InitFn:
    """A square of normal pixels, `size` wide, tiled over each image
    (Wei et al., A Framework for Evaluating Gradient Leakage Attacks, ESORICS 2020).
    """
    _check.integer(size=size)
    _check.not_negative(scale=scale)
    _check.finite("scale", scale)
    _check_shape(shape)

    def init_fn(key: PRNGKeyArray, observation: Observation) -> Float[Array, "b h w c"]:
        like = _like(observation, shape)
        if len(like.shape) != 4:
            raise ValueError(f"patterned needs images of shape (b, h, w, c), got {like.shape}")
        b, h, w, c = like.shape
        _check.fits(b * size * size * c, size=size)
        seed = scale * jax.random.normal(key, (b, size, size, c), like.dtype)
        return jnp.tile(seed, (1, -(-h // size), -(-w // size), 1))[:, :h, :w]

    return init_fn


def given(inputs: Shaped[Array, "b *d"]) -> InitFn:
    """Starts from these inputs: the end of another attack, an auxiliary image. Every restart is the same."""
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise ValueError(f"inputs must be floating point to be searched by descent, got {inputs.dtype}")

    def init_fn(key: PRNGKeyArray, observation: Observation) -> Float[Array, "b *d"]:
        del key
        granted_dtype(observation)  # refuses integers
        like = observation.extra.get("inputs_like", inputs)
        if inputs.shape != like.shape:
            raise ValueError(f"inputs must have the granted shape {like.shape}, got {inputs.shape}")
        return widened(inputs)

    return init_fn
