"""Searches for an image at a fraction of its size first, and then at larger ones."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Attack, Batch, DecodeFn, InitFn, Observation
from gia_jax.matching.initializations import near_grey
from gia_jax.matching.run import continued, keep_best


def resized(images: Float[Array, "b h w c"], height: int, width: int) -> Float[Array, "b i j c"]:
    """Changes the size of images by linear interpolation, over larger areas where they become smaller.

    Args:
        images: Images, shape (b, h, w, c).
        height: New height in pixels, at least 1.
        width: New width in pixels, at least 1.

    Returns:
        The images, shape (b, height, width, c).

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.matching.coarse_to_fine import resized
        >>> resized(jnp.arange(4.0).reshape(1, 2, 2, 1), 1, 1).ravel().tolist()
        [1.5]
    """
    return jax.image.resize(images, (images.shape[0], height, width, images.shape[3]), "linear")


def coarse_to_fine(
    attack_fn: Callable[[InitFn, DecodeFn], Attack],
    shape: Sequence[int],
    *,
    factors: Sequence[int] = (8, 4, 2),
    num_steps: int,
    init_fn: InitFn | None = None,
) -> Attack:
    """Builds an attack that first searches for small images, which are enlarged before the client sees them.

    A large image has so many pixels that an attack on all of them paints fine noise. Its small version has few: the
    first stage finds colours and shapes, and every later stage starts from the candidate of the lowest loss that the
    one before found. The attack returns that of the last stage.

    Args:
        attack_fn: Function `(init_fn, decode_fn) -> attack` that passes both to `gia_jax.gradient_matching`, or to an
            attack that takes them, such as `attacks.inverting_gradients`, without `keep_best`, which is applied here.
            It is called once for each stage.
        shape: Shape (b, h, w, c) of the images.
        factors: Factors by which height and width are smaller in the stages before the last one, integers of at least
            2, falling, each a divisor of both. The last stage has images of the full size.
        num_steps: Number of steps of every stage but the last, at least 1. They are done inside `init`.
        init_fn: Function `(key, observation) -> images` of the full size, whose small version the first stage starts
            from. By default they are near grey.

    Returns:
        The attack. Its number of steps and its info are those of the last stage.

    Raises:
        ValueError: If `shape` is not of four positive integers, `factors` is empty, does not fall, or one of them is
            below 2 or no divisor of height and width, or `num_steps` is no positive integer.

    Examples:
        A client whose gradient is its image is attacked at a half of the size and then as a whole:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import gradient_matching, observed, run
        >>> from gia_jax.matching import coarse_to_fine
        >>> def client_fn(params, batch):
        ...     return {"image": batch.inputs.mean(0)}
        >>> image = {"image": jnp.linspace(-1.0, 1.0, 16).reshape(4, 4, 1)}
        >>> seen = observed(image, image, inputs_like=jnp.zeros((1, 4, 4, 1)), labels=jnp.array([0]))
        >>> def attack_fn(init_fn, decode_fn):
        ...     return gradient_matching(client_fn, init_fn=init_fn, decode_fn=decode_fn)
        >>> attack = coarse_to_fine(attack_fn, (1, 4, 4, 1), factors=(2,), num_steps=40)
        >>> found = jax.jit(lambda key: run(attack, key, seen, num_steps=1)[0])(jax.random.key(0))
        >>> found.batch.inputs.shape, bool(jnp.abs(found.batch.inputs[0] - image["image"]).max() < 0.3)
        ((1, 4, 4, 1), True)
    """
    _check.integer(num_steps=num_steps)
    size = _check.sizes("shape", shape)
    if len(size) != 4:
        raise ValueError(f"shape must be (b, h, w, c), got {size}")
    _, height, width, _ = size
    found = tuple(factors)
    for factor in found:
        _check.integer(2, factors=factor)
        if height % factor or width % factor:
            raise ValueError(f"factors must divide the height and the width of {size}, got {factor}")
    if not found or any(before <= after for before, after in itertools.pairwise(found)):
        raise ValueError(f"factors must be at least one and fall, got {found}")
    draw_fn = near_grey(shape=size) if init_fn is None else init_fn

    def enlarged(z: Array, labels: Array) -> Batch:
        return Batch(resized(z, height, width), labels)

    def at(factor: int) -> Attack:
        def small(key: PRNGKeyArray, observation: Observation) -> Array:
            return resized(jnp.asarray(draw_fn(key, observation)), height // factor, width // factor)

        return attack_fn(small, enlarged) if factor > 1 else attack_fn(draw_fn, Batch)

    attack = keep_best(at(found[0]))
    for factor in (*found[1:], 1):

        def larger(z: Array, factor: int = factor) -> Array:
            return resized(z, height // factor, width // factor)

        attack = keep_best(continued(attack, at(factor), num_steps=num_steps, hand_over_fn=larger))
    return attack
