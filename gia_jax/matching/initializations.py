"""Initialisations: where the dummy inputs start, `(key, observation) -> inputs`.

The inputs have the shape that the threat model grants. Where that is a tree of arrays, every array is drawn on its own.
They are unknowns in float32 or wider, because descent moves them by less than half precision can resolve. A client sees
them in its own type, by `as_granted`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Shaped

from gia_jax import _check
from gia_jax.base import InitFn, Observation, Scalar
from gia_jax.precision import cast_like, wide_dtype, widened_tree
from gia_jax.threat import granted


def granted_dtype(observation: Observation) -> jnp.dtype:
    """Finds the type of the client's inputs where their shape is granted, and of its parameters where it is not.

    Args:
        observation: Observation of the attack. observation.extra["inputs_like"] has the type of the client's inputs.

    Returns:
        The floating-point type; of a tree of inputs, the one that all of its types are promoted to.

    Raises:
        ValueError: If granted inputs are integers. Neither descent nor a quotient can end between two integers.
    """
    like = observation.extra.get("inputs_like")
    if like is None:
        leaves = [leaf for leaf in jax.tree.leaves(observation.params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return jnp.result_type(*leaves) if leaves else jnp.result_type(float)
    for path, leaf in jax.tree.leaves_with_path(like):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"observation.extra['inputs_like']{jax.tree_util.keystr(path)} must be floating point to be searched "
                f"by descent or solved for, got {leaf.dtype}: scale pixels to floats, or attack the embeddings of "
                "tokens or the probabilities of categories"
            )
    return jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(like)))


def as_granted(inputs: PyTree[Float[Array, "..."]], observation: Observation) -> PyTree[Float[Array, "..."]]:
    """Casts the inputs to the type in which the client computes with its own.

    Args:
        inputs: Dummy inputs, in float32 or wider, an array or a tree of arrays.
        observation: Observation of the attack.

    Returns:
        The inputs in the type that `granted_dtype` finds, or those of a tree each in its own granted type.

    Raises:
        ValueError: If the inputs are another tree than the granted ones.
    """
    dtype, like = granted_dtype(observation), observation.extra.get("inputs_like")
    if like is None:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), inputs)
    found, wanted = jax.tree.structure(inputs), jax.tree.structure(like)
    if found != wanted:
        raise ValueError(f"inputs must be a tree like the granted inputs, {wanted}, got {found}")
    return cast_like(inputs, like)


def granted_like(observation: Observation) -> Float[Array, "b *d"]:
    """Returns the granted zeros that have the shape and the type of the client's batch, where this is one array.

    Args:
        observation: Observation of the attack.

    Returns:
        Zeros of shape (b, *d).

    Raises:
        ValueError: If the shape of the batch is not granted, or the inputs are integers or a tree of arrays.
    """
    like = granted(observation, "inputs_like")
    _check.one_array("observation.extra['inputs_like']", like)
    granted_dtype(observation)
    return like


def _like(observation: Observation, shape: Sequence[int] | None) -> PyTree[jax.ShapeDtypeStruct]:
    """Returns the shape of the dummy inputs, granted unless it is given, with their type, float32 or wider."""
    dtype = granted_dtype(observation)
    if shape is not None:
        return jax.ShapeDtypeStruct(tuple(shape), wide_dtype(dtype))
    like = granted(observation, "inputs_like")
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, wide_dtype(leaf.dtype)), like)


def _drawn(
    key: PRNGKeyArray, like: PyTree[jax.ShapeDtypeStruct], draw_fn: Callable[[PRNGKeyArray, Any], Array]
) -> PyTree[Array]:
    """Draws every array of a tree with a key of its own; a single array is drawn with the key itself."""
    leaves, tree = jax.tree.flatten(like)
    keys = [key] if len(leaves) == 1 else list(jax.random.split(key, len(leaves)))
    return jax.tree.unflatten(tree, [draw_fn(own, leaf) for own, leaf in zip(keys, leaves, strict=True)])


def _check_shape(shape: Sequence[int] | None) -> None:
    """Raises ValueError for a given shape that is not of positive integers or does not fit into memory."""
    if shape is not None:
        for size in shape:
            _check.integer(shape=size)
        _check.fits(math.prod(shape), shape=tuple(shape))


def normal(*, scale: Scalar = 1.0, mean: Scalar = 0.0, shape: Sequence[int] | None = None) -> InitFn:
    """Starts from independent normal pixels.

    Args:
        scale: Standard deviation of every pixel, at least 0 and finite.
        mean: Mean of every pixel. With a small `scale`, 0 is near-grey for inputs normalised by the data's mean.
        shape: Shape (b, *d) of the inputs, for an adversary that guesses the shape of the batch. By default the shape
            that the threat model grants.

    Returns:
        The initialisation.

    Raises:
        ValueError: If `scale` is negative or not finite, `mean` is not finite, or `shape` is not of positive integers
            or does not fit into memory.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import Observation
        >>> from gia_jax.matching import initializations
        >>> observation = Observation({}, {}, {"inputs_like": jnp.zeros((2, 4, 4, 3))})
        >>> initializations.normal()(jax.random.key(0), observation).shape
        (2, 4, 4, 3)
    """
    _check.not_negative(scale=scale)
    _check.finite("scale", scale)
    _check.finite("mean", mean)
    _check_shape(shape)

    def init_fn(key: PRNGKeyArray, observation: Observation) -> PyTree[Float[Array, "b ..."]]:
        return _drawn(
            key,
            _like(observation, shape),
            lambda own, like: mean + scale * jax.random.normal(own, like.shape, like.dtype),
        )

    return init_fn


def near_grey(*, scale: Scalar = 0.1, shape: Sequence[int] | None = None) -> InitFn:
    """Starts from normal pixels of a small standard deviation around 0, the grey of normalised inputs.

    Args:
        scale: Standard deviation of every pixel, at least 0 and finite.
        shape: Shape (b, *d) of the inputs. By default the shape that the threat model grants.

    Returns:
        The initialisation.

    Raises:
        ValueError: If `scale` is negative or not finite, or `shape` is not of positive integers or does not fit into
            memory.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import Observation
        >>> from gia_jax.matching import initializations
        >>> observation = Observation({}, {}, {"inputs_like": jnp.zeros((2, 4, 4, 3))})
        >>> bool(initializations.near_grey(scale=0.1)(jax.random.key(0), observation).std() < 0.2)
        True
    """
    return normal(scale=scale, shape=shape)


def truncated_normal(*, scale: Scalar = 0.1, limit: Scalar = 0.1, shape: Sequence[int] | None = None) -> InitFn:
    """Starts from normal pixels that are clipped to [-limit, limit].

    Args:
        scale: Standard deviation of every pixel before the clipping, at least 0 and finite.
        limit: Largest absolute value of a pixel, at least 0 and finite.
        shape: Shape (b, *d) of the inputs. By default the shape that the threat model grants.

    Returns:
        The initialisation.

    Raises:
        ValueError: If `scale` or `limit` is negative or not finite, or `shape` is not of positive integers or does not
            fit into memory.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import Observation
        >>> from gia_jax.matching import initializations
        >>> observation = Observation({}, {}, {"inputs_like": jnp.zeros((2, 4, 4, 3))})
        >>> inputs = initializations.truncated_normal(scale=1.0, limit=0.5)(jax.random.key(0), observation)
        >>> print(f"{abs(inputs).max():.1f}")
        0.5
    """
    _check.not_negative(scale=scale, limit=limit)
    _check.finite("scale", scale)
    _check.finite("limit", limit)
    _check_shape(shape)

    def init_fn(key: PRNGKeyArray, observation: Observation) -> PyTree[Float[Array, "b ..."]]:
        return _drawn(
            key,
            _like(observation, shape),
            lambda own, like: jnp.clip(scale * jax.random.normal(own, like.shape, like.dtype), -limit, limit),
        )

    return init_fn


def uniform(*, low: Scalar = -1.0, high: Scalar = 1.0, shape: Sequence[int] | None = None) -> InitFn:
    """Starts from independent uniform pixels in [low, high).

    Args:
        low: Least value of a pixel, finite.
        high: Limit above the values of a pixel, finite and above `low`.
        shape: Shape (b, *d) of the inputs. By default the shape that the threat model grants.

    Returns:
        The initialisation.

    Raises:
        ValueError: If `low` is not below `high`, one of them is not finite, or `shape` is not of positive integers or
            does not fit into memory.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import Observation
        >>> from gia_jax.matching import initializations
        >>> observation = Observation({}, {}, {"inputs_like": jnp.zeros((2, 4, 4, 3))})
        >>> inputs = initializations.uniform(low=0.0, high=1.0)(jax.random.key(0), observation)
        >>> bool((inputs >= 0).all() and (inputs < 1).all())
        True
    """
    _check.finite("low", low)
    _check.finite("high", high)
    _check_shape(shape)
    if _check.is_concrete((low, high)) and not low < high:
        raise ValueError(f"low must be below high={high}, got {low}")

    def init_fn(key: PRNGKeyArray, observation: Observation) -> PyTree[Float[Array, "b ..."]]:
        return _drawn(
            key,
            _like(observation, shape),
            lambda own, like: jax.random.uniform(own, like.shape, like.dtype, low, high),
        )

    return init_fn


def constant(value: float | Sequence[float] = 0.0, *, shape: Sequence[int] | None = None) -> InitFn:
    """Starts from one value, or one value per channel, everywhere. Every restart is the same.

    Args:
        value: Finite value of every pixel, or a sequence of values, one for each channel (the last axis).
        shape: Shape (b, *d) of the inputs. By default the shape that the threat model grants.

    Returns:
        The initialisation. It raises ValueError if `value` is neither one number nor one number per channel.

    Raises:
        ValueError: If a value is not finite, or `shape` is not of positive integers or does not fit into memory.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import Observation
        >>> from gia_jax.matching import initializations
        >>> observation = Observation({}, {}, {"inputs_like": jnp.zeros((1, 2, 2, 3))})
        >>> initializations.constant([1.0, 0.0, 0.5])(jax.random.key(0), observation)[0, 1, 1].tolist()
        [1.0, 0.0, 0.5]
    """
    _check.finite("value", np.asarray(value))
    _check_shape(shape)

    def of_one(like: jax.ShapeDtypeStruct) -> Float[Array, "..."]:
        pixel = jnp.asarray(value, like.dtype)
        if pixel.ndim and pixel.shape != like.shape[-1:]:
            raise ValueError(f"value must be a number or one a channel, {like.shape[-1]}, got shape {pixel.shape}")
        return jnp.broadcast_to(pixel, like.shape)

    def init_fn(key: PRNGKeyArray, observation: Observation) -> PyTree[Float[Array, "b ..."]]:
        del key
        return jax.tree.map(of_one, _like(observation, shape))

    return init_fn


def patterned(size: int = 4, *, scale: Scalar = 1.0, shape: Sequence[int] | None = None) -> InitFn:
    """Starts from a square of normal pixels that is tiled over each image
    (Wei et al., A Framework for Evaluating Gradient Leakage Attacks, ESORICS 2020).

    Args:
        size: Height and width of the square, in pixels, at least 1.
        scale: Standard deviation of every pixel, at least 0 and finite.
        shape: Shape (b, h, w, c) of the inputs. By default the shape that the threat model grants.

    Returns:
        The initialisation. It raises ValueError for inputs that are not images, or a square that does not fit into
        memory.

    Raises:
        ValueError: If `size` is not a positive integer, `scale` is negative or not finite, or `shape` is not of
            positive integers or does not fit into memory.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import Observation
        >>> from gia_jax.matching import initializations
        >>> observation = Observation({}, {}, {"inputs_like": jnp.zeros((1, 6, 6, 1))})
        >>> inputs = initializations.patterned(2)(jax.random.key(0), observation)
        >>> bool((inputs[:, :2, :2] == inputs[:, 4:, 4:]).all())
        True
    """
    _check.integer(size=size)
    _check.not_negative(scale=scale)
    _check.finite("scale", scale)
    _check_shape(shape)

    def init_fn(key: PRNGKeyArray, observation: Observation) -> Float[Array, "b h w c"]:
        like = _like(observation, shape)
        _check.one_array("observation.extra['inputs_like']", like)
        if len(like.shape) != 4:
            raise ValueError(f"patterned needs images of shape (b, h, w, c), got {like.shape}")
        b, h, w, c = like.shape
        _check.fits(b * size * size * c, size=size)
        seed = scale * jax.random.normal(key, (b, size, size, c), like.dtype)
        return jnp.tile(seed, (1, -(-h // size), -(-w // size), 1))[:, :h, :w]

    return init_fn


def given(inputs: PyTree[Shaped[Array, "b ..."]]) -> InitFn:
    """Starts from given inputs, such as the end of another attack or an auxiliary image. Every restart is the same.

    Args:
        inputs: Inputs of shape (b, *d), or a tree of such arrays, floating point.

    Returns:
        The initialisation. It raises ValueError where the threat model grants another shape.

    Raises:
        ValueError: If `inputs` are not floating point.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import Observation
        >>> from gia_jax.matching import initializations
        >>> observation = Observation({}, {}, {"inputs_like": jnp.zeros((1, 2))})
        >>> initializations.given(jnp.array([[0.5, 1.0]]))(jax.random.key(0), observation).tolist()
        [[0.5, 1.0]]
    """
    for leaf in jax.tree.leaves(inputs):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"inputs must be floating point to be searched by descent, got {leaf.dtype}")
    found = jax.tree.map(jnp.shape, inputs)

    def init_fn(key: PRNGKeyArray, observation: Observation) -> PyTree[Float[Array, "b ..."]]:
        del key
        granted_dtype(observation)  # refuses integers
        wanted = jax.tree.map(jnp.shape, observation.extra.get("inputs_like", inputs))
        if found != wanted:
            raise ValueError(f"inputs must have the granted shape {wanted}, got {found}")
        return widened_tree(inputs)

    return init_fn
