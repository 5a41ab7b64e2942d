"""Seeds of one attack that run together, each kept near what all of them agree on: group consistency.

Yin et al., See through Gradients: Image Batch Recovery via GradInversion, CVPR 2021. Seeds end in different images,
moved by some pixels among other things; each is pulled towards the mean of all, which are laid onto each other first.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Attack, AttackInfo, AttackState, Batch, Observation, Reconstruction
from gia_jax.matching.run import choose
from gia_jax.precision import widened
from gia_jax.threat import granted

ConsensusFn = Callable[[Float[Array, "s b *d"]], Float[Array, "b *d"]]


def together(attack: Attack, num_seeds: int, consensus_fn: ConsensusFn) -> Attack:
    """`num_seeds` seeds of an attack as one attack, whose candidate has a leading axis of seeds.

    Before every step each seed is told what all of them agree on, as observation.extra["consensus"], for a prior such
    as `consistency`. To a step the consensus is a constant: no derivative goes through it.

    Args:
        attack: The attack of one seed, by `gradient_matching`; its unknowns are the inputs, or pass through
            `consensus_fn`.
        num_seeds: Number s of seeds, at least 1.
        consensus_fn: Maps the unknowns of all seeds to what they agree on: `mean` or `registered_mean()`.

    Returns:
        The attack. Its info is that of the seed of the lowest finite loss, and its reconstruction is that seed's, with
        the losses of all in `restart_losses`.

    Raises:
        ValueError: `num_seeds` is no positive integer, or (from `init`) more seeds than fit into memory.
    """
    _check.integer(num_seeds=num_seeds)

    def told(candidate: Any, observation: Observation) -> Observation:
        consensus = jax.lax.stop_gradient(consensus_fn(candidate.variables))
        return observation._replace(extra={**observation.extra, "consensus": consensus})

    def init(key: PRNGKeyArray, observation: Observation) -> AttackState:
        # Every seed simulates an update of its own, all of them at once.
        size = sum(leaf.size for leaf in jax.tree.leaves(observation.params))
        _check.fits(num_seeds * (size + 2), num_seeds=num_seeds)
        return jax.vmap(attack.init, (0, None))(jax.random.split(key, num_seeds), observation)

    def step(key: PRNGKeyArray, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
        keys, known = jax.random.split(key, num_seeds), told(state.candidate, observation)
        state, info = jax.vmap(attack.step, (0, 0, None))(keys, state, known)
        best = jnp.argmin(jnp.where(jnp.isfinite(info.loss), info.loss, jnp.inf))
        return state, jax.tree.map(lambda leaf: leaf[best], info)

    def finalize(candidate: Any, observation: Observation) -> Reconstruction:
        return choose(jax.vmap(attack.finalize, (0, None))(candidate, told(candidate, observation)))

    return Attack(init, step, finalize)


def consistency(batch: Batch, observation: Observation) -> Float[Array, ""]:
    """L2 distance of a seed's inputs from what the group agrees on: a prior, inside of `together`."""
    return optax.safe_norm(widened(batch.inputs) - widened(granted(observation, "consensus")), 1e-12)


def mean(inputs: Float[Array, "s b *d"]) -> Float[Array, "b *d"]:
    """The mean of the seeds; one that is not finite does not take part."""
    finite = jnp.all(jnp.isfinite(inputs), range(1, inputs.ndim), keepdims=True)
    return jnp.mean(widened(inputs), 0, where=jnp.broadcast_to(finite, inputs.shape)).astype(inputs.dtype)


def registered_mean(*, flips: bool = False) -> ConsensusFn:
    """The mean of the seeds after each image was moved onto the seeds' plain mean.

    Departure: the paper registers by RANSAC-flow, a trained network for homographies; here by `register`, the circular
    shift of highest phase correlation.

    Args:
        flips: Whether an image may also be mirrored, left to right.

    Returns:
        The consensus, of images only: when called it raises ValueError for other inputs.
    """

    def consensus_fn(inputs: Float[Array, "s b *d"]) -> Float[Array, "b *d"]:
        if inputs.ndim != 5:
            raise ValueError(f"registered_mean needs images of shape (b, h, w, c), got {inputs.shape[1:]}")
        over_images = jax.vmap(lambda moving, fixed: register(moving, fixed, flips=flips))
        return mean(jax.vmap(over_images, (0, None))(inputs, mean(inputs)))

    return consensus_fn


def register(
    moving: Float[Array, "h w c"], fixed: Float[Array, "h w c"], *, flips: bool = False
) -> Float[Array, "h w c"]:
    """`moving`, shifted circularly, and mirrored left to right if `flips` allows, to where it lies best on `fixed`.

    Args:
        moving: An image.
        fixed: The image it is moved onto.
        flips: Whether it may be mirrored.

    Returns:
        The moved image. Exact where `moving` is a shifted (mirrored) copy of `fixed`.
    """
    candidates = jnp.stack([moving, moving[:, ::-1]]) if flips else moving[None]
    correlation = jax.vmap(phase_correlation, (0, None))(candidates, fixed)
    flipped, *shift = jnp.unravel_index(jnp.argmax(correlation), correlation.shape)
    return jnp.roll(candidates[flipped], jnp.stack(shift), (0, 1))


def phase_correlation(moving: Float[Array, "h w c"], fixed: Float[Array, "h w c"]) -> Float[Array, "h w"]:
    """How well `moving`, rolled by (i, j) pixels, lies on `fixed`, for all (i, j): a spike of 1 for a shifted copy
    (Kuglin and Hines, The phase correlation image alignment method, 1975).

    The channels share one shift: their cross-power spectra are added before each frequency is divided by its magnitude.
    """
    moving_spectrum, fixed_spectrum = (jnp.fft.fft2(widened(image), axes=(0, 1)) for image in (moving, fixed))
    power = jnp.sum(fixed_spectrum * jnp.conj(moving_spectrum), -1)
    magnitude = jnp.abs(power)
    # A frequency that is rounding has no phase.
    usable = magnitude > jnp.finfo(magnitude.dtype).eps * jnp.max(magnitude)
    return jnp.fft.ifft2(jnp.where(usable, power / jnp.where(usable, magnitude, 1), 0)).real
