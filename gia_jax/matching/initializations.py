"""Where the dummy inputs start: `(key, observation) -> ` inputs of the shape that the threat model grants."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import InitFn, Observation
from gia_jax.threat import granted


def _like(observation: Observation, shape: Sequence[int] | None) -> jax.ShapeDtypeStruct:
    if shape is None:
        like = granted(observation, "inputs_like")
        return jax.ShapeDtypeStruct(like.shape, like.dtype)
    dtype = jnp.result_type(*jax.tree.leaves(observation.params))
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def normal(*, scale: float = 1.0, mean: float = 0.0, shape: Sequence[int] | None = None) -> InitFn:
    """Independent normal pixels.

    Args:
        scale: Standard deviation, >= 0.
        mean: Of every pixel; with a small `scale`, 0 is near-grey for inputs normalised by the data's mean.
        shape: Of the inputs (b, *d), for an adversary to whom the batch's shape is not granted but guessed.

    Returns:
        The initialisation.
    """
    _check.not_negative(scale=scale)

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

    def init_fn(key: PRNGKeyArray, observation: Observation) -> Float[Array, "b *d"]:
        like = _like(observation, shape)
        return jnp.clip(scale * jax.random.normal(key, like.shape, like.dtype), -limit, limit)

    return init_fn


def uniform(*, low: float = -1.0, high: float = 1.0, shape: Sequence[int] | None = None) -> InitFn:
    """Independent uniform pixels in [low, high)."""
    if not low < high:
        raise ValueError(f"low must be below high={high}, got {low}")

    def init_fn(key: PRNGKeyArray, observation: Observation) -> Float[Array, "b *d"]:
        like = _like(observation, shape)
        return jax.random.uniform(key, like.shape, like.dtype, low, high)

    return init_fn


def constant(value: float | Sequence[float] = 0.0, *, shape: Sequence[int] | None = None) -> InitFn:
    """One value, or one value a channel (the last axis), everywhere. Every restart is the same."""

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
    _check.positive(size=size)
    _check.not_negative(scale=scale)

    def init_fn(key: PRNGKeyArray, observation: Observation) -> Float[Array, "b h w c"]:
        like = _like(observation, shape)
        if len(like.shape) != 4:
            raise ValueError(f"patterned needs images of shape (b, h, w, c), got {like.shape}")
        b, h, w, c = like.shape
        seed = scale * jax.random.normal(key, (b, size, size, c), like.dtype)
        return jnp.tile(seed, (1, -(-h // size), -(-w // size), 1))[:, :h, :w]

    return init_fn


def given(inputs: Float[Array, "b *d"]) -> InitFn:
    """Start from these inputs: the end of another attack, an auxiliary image. Every restart is the same."""

    def init_fn(key: PRNGKeyArray, observation: Observation) -> Float[Array, "b *d"]:
        del key
        like = observation.extra.get("inputs_like", inputs)
        if inputs.shape != like.shape:
            raise ValueError(f"inputs must have the granted shape {like.shape}, got {inputs.shape}")
        return inputs

    return init_fn
