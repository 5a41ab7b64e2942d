"""Group consistency: seeds of one attack run together, and each is kept near what all of them agree on.

Yin et al., See through Gradients: Image Batch Recovery via GradInversion, CVPR 2021. Seeds end in different images,
which differ, among other things, by a shift of some pixels. Each seed is pulled towards the mean of all seeds, after
the images were aligned with each other.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import Attack, AttackInfo, AttackState, Batch, Observation, Reconstruction
from gia_jax.matching.run import choose
from gia_jax.matching.solver import Unknowns
from gia_jax.precision import widened
from gia_jax.threat import granted

ConsensusFn = Callable[[Float[Array, "s b *d"]], Float[Array, "b *d"]]


def together(attack: Attack, num_seeds: int, consensus_fn: ConsensusFn) -> Attack:
    """Runs several seeds of an attack as one attack, whose candidate has a leading axis of seeds.

    Before every step each seed is told what all of them agree on, as observation.extra["consensus"], for a prior such
    as `consistency`. To a step the consensus is a constant: no derivative goes through it.

    Args:
        attack: Attack of one seed, by `gradient_matching`. Its unknowns are the inputs, or whatever `consensus_fn`
            accepts.
        num_seeds: Number s of seeds, at least 1.
        consensus_fn: Function that maps the stacked unknowns of all seeds to what they agree on: `mean` or
            `registered_mean()`.

    Returns:
        The attack. The info of a step is that of the seed of the lowest finite loss. The reconstruction is also that of
        the seed of the lowest finite loss, with the losses of all seeds in `restart_losses`.

    Raises:
        ValueError: If `num_seeds` is no positive integer, or (from `init`) if more seeds are asked for than fit into
            memory.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, clients, gradient_matching, observe, run
        >>> from gia_jax.matching import group
        >>> def apply_fn(params, inputs):
        ...     return inputs @ params["kernel"]
        >>> client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
        >>> params, batch = {"kernel": jnp.ones((3, 2))}, Batch(jnp.ones((1, 3)), jnp.array([1]))
        >>> observation = observe(jax.random.key(0), ThreatModel(labels=True), client_fn, params, batch)
        >>> attack = group.together(gradient_matching(client_fn, prior_fn=group.consistency), 4, group.mean)
        >>> attack_fn = jax.jit(lambda key: run(attack, key, observation, num_steps=2))
        >>> reconstruction, _ = attack_fn(jax.random.key(1))
        >>> reconstruction.batch.inputs.shape, reconstruction.restart_losses.shape
        ((1, 3), (4,))
    """
    _check.integer(num_seeds=num_seeds)

    def told(candidate: Any, observation: Observation) -> Observation:
        variables = candidate.variables
        data = variables.data if isinstance(variables, Unknowns) else variables
        consensus = jax.lax.stop_gradient(consensus_fn(data))
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

    return Attack(init, step, finalize, num_steps=attack.num_steps)


def consistency(batch: Batch, observation: Observation) -> Float[Array, ""]:
    """Computes the L2 distance of a seed's inputs from what the group agrees on, a prior for attacks inside `together`.

    Args:
        batch: Dummy batch of one seed.
        observation: Observation with the consensus of the seeds in observation.extra["consensus"].

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: If the observation has no consensus, because the attack does not run inside `together`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, Observation
        >>> from gia_jax.matching import group
        >>> batch = Batch(jnp.array([[3.0, 4.0]]), jnp.array([0]))
        >>> print(f"{group.consistency(batch, Observation({}, {}, {'consensus': jnp.zeros((1, 2))})):.2f}")
        5.00
    """
    consensus = granted(observation, "consensus")
    apart = jax.tree.map(lambda a, b: (widened(a) - widened(b)).ravel(), batch.inputs, consensus)
    return optax.safe_norm(jnp.concatenate(jax.tree.leaves(apart)), 1e-12)


def mean(inputs: PyTree[Float[Array, "s ..."]]) -> PyTree[Float[Array, "..."]]:
    """Averages the inputs of the seeds, without those seeds that are not finite.

    Args:
        inputs: Inputs of s seeds, shape (s, b, *d), or a tree of such arrays, each of which is averaged on its own.

    Returns:
        The mean over the seeds, shape (b, *d). It is NaN where no seed is finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import group
        >>> group.mean(jnp.array([[[1.0, 2.0]], [[3.0, 4.0]], [[jnp.nan, 0.0]]])).tolist()
        [[2.0, 3.0]]
    """

    def of_one(leaf: Float[Array, "s *d"]) -> Float[Array, "*d"]:
        finite = jnp.all(jnp.isfinite(leaf), range(1, leaf.ndim), keepdims=True)
        return jnp.mean(widened(leaf), 0, where=jnp.broadcast_to(finite, leaf.shape)).astype(leaf.dtype)

    return jax.tree.map(of_one, inputs)


def registered_mean(*, flips: bool = False) -> ConsensusFn:
    """Builds the consensus that averages the seeds after each image was moved onto the seeds' plain mean.

    Departure: the paper registers by RANSAC-flow, a trained network for homographies. Here `register` does it, by the
    circular shift of highest phase correlation.

    Args:
        flips: Whether an image may also be mirrored, left to right. By default it may not.

    Returns:
        The consensus function `(inputs of all seeds) -> inputs`, for images only. It raises ValueError for other
        inputs.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import group
        >>> image = jax.random.normal(jax.random.key(0), (1, 4, 4, 1))
        >>> seeds = jnp.stack([image, image, jnp.roll(image, 1, axis=2)])
        >>> bool(jnp.allclose(jax.jit(group.registered_mean())(seeds), image, atol=1e-5))
        True
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
    """Aligns an image with another one by a circular shift, and by mirroring left to right if that is allowed.

    Args:
        moving: Image that is moved.
        fixed: Image onto which it is moved.
        flips: Whether the image may be mirrored as well. By default it may not.

    Returns:
        The moved image, where it lies best on `fixed`. It is exact where `moving` is a shifted (and, if `flips`,
        mirrored) copy of `fixed`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import group
        >>> fixed = jax.random.normal(jax.random.key(0), (4, 5, 1))
        >>> moving = jnp.roll(fixed, (1, 2), axis=(0, 1))
        >>> bool((jax.jit(group.register)(moving, fixed) == fixed).all())
        True
    """
    candidates = jnp.stack([moving, moving[:, ::-1]]) if flips else moving[None]
    correlation = jax.vmap(phase_correlation, (0, None))(candidates, fixed)
    flipped, *shift = jnp.unravel_index(jnp.argmax(correlation), correlation.shape)
    return jnp.roll(candidates[flipped], jnp.stack(shift), (0, 1))


def phase_correlation(moving: Float[Array, "h w c"], fixed: Float[Array, "h w c"]) -> Float[Array, "h w"]:
    """Computes how well an image lies on another one after each circular shift
    (Kuglin and Hines, The phase correlation image alignment method, 1975).

    The channels share one shift: their cross-power spectra are added before each frequency is divided by its magnitude.

    Args:
        moving: Image that is shifted.
        fixed: Image with which it is compared.

    Returns:
        The correlation, shape (h, w). Entry (i, j) belongs to `moving` rolled by i pixels down and j pixels to the
        right. It is a spike of 1 where `moving` is a shifted copy.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import group
        >>> fixed = jax.random.normal(jax.random.key(0), (4, 5, 1))
        >>> correlation = jax.jit(group.phase_correlation)(jnp.roll(fixed, (-1, -2), axis=(0, 1)), fixed)
        >>> print(divmod(int(correlation.argmax()), 5), f"{correlation.max():.2f}")
        (1, 2) 1.00
    """
    moving_spectrum, fixed_spectrum = (jnp.fft.fft2(widened(image), axes=(0, 1)) for image in (moving, fixed))
    power = jnp.sum(fixed_spectrum * jnp.conj(moving_spectrum), -1)
    magnitude = jnp.abs(power)
    # A frequency whose magnitude is rounding error has no phase.
    usable = magnitude > jnp.finfo(magnitude.dtype).eps * jnp.max(magnitude)
    return jnp.fft.ifft2(jnp.where(usable, power / jnp.where(usable, magnitude, 1), 0)).real
