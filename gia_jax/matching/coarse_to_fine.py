"""Searches for an image at a fraction of its size first, and then at larger ones."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Attack, AttackInfo, AttackState, Batch, DecodeFn, InitFn, Observation, Reconstruction
from gia_jax.matching.initializations import given, near_grey
from gia_jax.matching.run import keep_best


class Staged(NamedTuple):
    """The candidate of an attack that goes from small images to large ones.

    Attributes:
        candidate: Candidate of the attack of the current stage, under `keep_best`.
        done: Number of steps that are done, of all stages together.
    """

    candidate: Any
    done: Int[Array, ""]


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
    one before found, with an optimizer that starts anew. The attack returns the best candidate of its latest stage.

    All stages are one program, which is compiled once: the unknowns have the full size in all of them, and a stage
    with the factor f reads every f-th pixel along both axes. The others have no gradient there.

    Args:
        attack_fn: Function `(init_fn, decode_fn) -> attack` that passes both to `gia_jax.gradient_matching`, or to an
            attack that takes them, such as `attacks.inverting_gradients`, without `keep_best`, which is applied here.
            Its optimizer and its `project_fn` must act on every pixel alone, as Adam and `box` do.
        shape: Shape (b, h, w, c) of the images.
        factors: Factors by which height and width are smaller in the stages before the last one, integers of at least
            2, falling, each a divisor of both. The last stage has images of the full size.
        num_steps: Number of steps of every stage but the last, at least 1.
        init_fn: Function `(key, observation) -> images` of the full size, whose small version the first stage starts
            from. By default they are near grey.

    Returns:
        The attack. Its first `len(factors) * num_steps` steps are those of the small images, and all others those of
        the last stage. Its `num_steps` is the sum of both where the attack of `attack_fn` has a number of its own.

    Raises:
        ValueError: If `shape` is not of four positive integers, `factors` is empty, does not fall, or one of them is
            below 2 or no divisor of height and width, or `num_steps` is no positive integer.

    Examples:
        A client whose gradient is its image is attacked for 40 steps at a half of the size and then for one as a whole:

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
        >>> found = jax.jit(lambda key: run(attack, key, seen, num_steps=41)[0])(jax.random.key(0))
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
    every = (*found, 1)

    def enlarged(factor: int) -> Callable[[Array], Array]:
        return lambda z: resized(z[:, ::factor, ::factor], height, width)

    def spread(images: Array, factor: int) -> Array:
        """Unknowns of the full size whose every `factor`-th pixels are a small version of the images."""
        small = resized(images, height // factor, width // factor)
        return jnp.zeros(size, small.dtype).at[:, ::factor, ::factor].set(small)

    def larger(before: int, after: int) -> Callable[[Array], Array]:
        return lambda z: spread(z[:, ::before, ::before], after)

    def attack_at(stage: Array, init_fn: InitFn) -> Attack:
        def decode_fn(z: Array, labels: Any) -> Batch:
            return Batch(jax.lax.switch(stage, [enlarged(factor) for factor in every], z), labels)

        return keep_best(attack_fn(init_fn, decode_fn))

    def stage_after(done: Array) -> Array:
        return jnp.minimum(done // num_steps, len(found))

    def first(key: PRNGKeyArray, observation: Observation) -> Array:
        return spread(jnp.asarray(draw_fn(key, observation)), found[0])

    def init(key: PRNGKeyArray, observation: Observation) -> AttackState:
        done = jnp.asarray(0)
        candidate, memory = attack_at(stage_after(done), first).init(key, observation)
        return AttackState(Staged(candidate, done), memory)

    def step(key: PRNGKeyArray, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
        (candidate, done), memory = state
        stage = stage_after(done)

        def renewed() -> AttackState:
            enlarge = [larger(before, after) for before, after in itertools.pairwise(every)]
            z = jax.lax.switch(stage - 1, enlarge, candidate.best.variables)
            return attack_at(stage, given(z)).init(key, observation)

        starts = (done > 0) & (done == stage * num_steps)
        current = jax.lax.cond(starts, renewed, lambda: AttackState(candidate, memory))
        (candidate, memory), info = attack_at(stage, first).step(key, current, observation)
        return AttackState(Staged(candidate, done + 1), memory), info

    def finalize(staged: Staged, observation: Observation) -> Reconstruction:
        stage = stage_after(jnp.maximum(staged.done - 1, 0))
        return attack_at(stage, first).finalize(staged.candidate, observation)

    last = attack_at(jnp.asarray(len(found)), first).num_steps
    return Attack(init, step, finalize, num_steps=None if last is None else last + len(found) * num_steps)
