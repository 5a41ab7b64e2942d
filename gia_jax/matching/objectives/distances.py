"""The distances of two updates, and the residuals whose squares they are."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gia_jax import _check
from gia_jax.base import ObjectiveFn, Scalar, Updates
from gia_jax.matching.objectives.layers import linear_decay
from gia_jax.precision import widening

# An update whose squared norm is at most this has no direction: its cosine with anything is 0, as is the derivative.
TINY = 1e-30


@widening
def euclidean(simulated: Updates, observed: Updates) -> Float[Array, ""]:
    """Computes the sum of squared differences (Zhu et al., DLG, NeurIPS 2019, equation 4).

    Args:
        simulated: Update that the dummy data yield.
        observed: Update that the client shared, a tree like `simulated`.

    Returns:
        The sum, at least 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> simulated, observed = {"w": jnp.array([4.0, 4.0])}, {"w": jnp.array([1.0, 0.0])}
        >>> print(f"{objectives.euclidean(simulated, observed):.2f}")
        25.00
    """
    return jnp.asarray(optax.tree.norm(optax.tree.sub(simulated, observed), squared=True))


@widening
def layerwise_euclidean(simulated: Updates, observed: Updates) -> Float[Array, ""]:
    """Computes the sum over layers of the L2 distance, which is not squared (Yin et al., GradInversion, CVPR 2021).

    Args:
        simulated: Update that the dummy data yield.
        observed: Update that the client shared, a tree like `simulated`.

    Returns:
        The sum, at least 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> simulated = {"w": jnp.array([4.0, 4.0]), "b": jnp.array([2.0])}
        >>> observed = {"w": jnp.array([1.0, 0.0]), "b": jnp.array([0.0])}
        >>> print(f"{objectives.layerwise_euclidean(simulated, observed):.2f}")
        7.00
    """
    distances = jax.tree.map(lambda s, o: optax.safe_norm(s - o, 1e-12), simulated, observed)
    return jnp.asarray(optax.tree.sum(distances))


@widening
def l1(simulated: Updates, observed: Updates) -> Float[Array, ""]:
    """Computes the sum of absolute differences.

    Args:
        simulated: Update that the dummy data yield.
        observed: Update that the client shared, a tree like `simulated`.

    Returns:
        The sum, at least 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> simulated, observed = {"w": jnp.array([4.0, 4.0])}, {"w": jnp.array([1.0, 0.0])}
        >>> print(f"{objectives.l1(simulated, observed):.2f}")
        7.00
    """
    return jnp.asarray(optax.tree.norm(optax.tree.sub(simulated, observed), ord=1))


@widening
def cosine(simulated: Updates, observed: Updates) -> Float[Array, ""]:
    """Computes one minus the cosine of the two updates, each taken as one vector
    (Geiping et al., Inverting Gradients, NeurIPS 2020, equation 4).

    Args:
        simulated: Update that the dummy data yield.
        observed: Update that the client shared, a tree like `simulated`.

    Returns:
        The distance, in [0, 2]. An update with a squared norm of at most 1e-30 has no direction, and the distance is 1.

    Examples:
        Orthogonal updates are at distance 1:

        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> print(f"{objectives.cosine({'w': jnp.array([2.0, 0.0])}, {'w': jnp.array([0.0, 3.0])}):.2f}")
        1.00
    """
    return 1 - _cosine(simulated, observed)


@widening
def layerwise_cosine(simulated: Updates, observed: Updates) -> Float[Array, ""]:
    """Computes the sum over layers of one minus the layer's cosine.

    Args:
        simulated: Update that the dummy data yield.
        observed: Update that the client shared, a tree like `simulated`.

    Returns:
        The sum over the L layers, in [0, 2 L].

    Examples:
        One layer is orthogonal, the other is opposite:

        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> simulated = {"w": jnp.array([2.0, 0.0]), "b": jnp.array([1.0])}
        >>> observed = {"w": jnp.array([0.0, 3.0]), "b": jnp.array([-1.0])}
        >>> print(f"{objectives.layerwise_cosine(simulated, observed):.2f}")
        3.00
    """
    layers = jax.tree.map(lambda s, o: 1 - _cosine(s, o), simulated, observed)
    return jnp.asarray(optax.tree.sum(layers))


@widening
def angular(simulated: Updates, observed: Updates) -> Float[Array, ""]:
    """Computes the angle between the two updates, divided by pi.

    The cosine is clipped to [-1 + 1e-7, 1 - 1e-7], because the derivative of the angle is infinite at its ends.

    Args:
        simulated: Update that the dummy data yield.
        observed: Update that the client shared, a tree like `simulated`.

    Returns:
        The angle over pi, in [0, 1].

    Examples:
        An angle of 45 degrees is a quarter of pi:

        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> print(f"{objectives.angular({'w': jnp.array([1.0, 1.0])}, {'w': jnp.array([0.0, 3.0])}):.2f}")
        0.25
    """
    return jnp.arccos(jnp.clip(_cosine(simulated, observed), -1 + 1e-7, 1 - 1e-7)) / jnp.pi


@widening
def masked_cosine(simulated: Updates, observed: Updates, *, threshold: Scalar = 1e-6) -> Float[Array, ""]:
    """Computes the `cosine` distance on the entries that a pruned observation kept.

    Args:
        simulated: Update that the dummy data yield.
        observed: Update that the client shared, a tree like `simulated`.
        threshold: Magnitude of an observed entry, at least 0, above which the entry counts.

    Returns:
        The distance, in [0, 2].

    Raises:
        ValueError: If `threshold` is negative.

    Examples:
        The pruned entry does not count:

        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> simulated, observed = {"w": jnp.array([4.0, 3.0, 9.0])}, {"w": jnp.array([4.0, 3.0, 0.0])}
        >>> bool(abs(objectives.masked_cosine(simulated, observed)) < 1e-6)
        True
    """
    _check.not_negative(threshold=threshold)

    def kept(update: Updates) -> Updates:
        return jax.tree.map(lambda leaf, o: jnp.where(jnp.abs(o) <= threshold, 0, leaf), update, observed)

    return cosine(kept(simulated), kept(observed))


def tag(*, scale: Scalar = 0.1, layers: Sequence[str] | None = None) -> ObjectiveFn:
    """Builds the objective of TAG, half the squared plus weighted absolute differences
    (Deng et al., TAG, EMNLP Findings 2021, equation 3).

    Args:
        scale: Weight of the absolute differences of the first layer, at least 0 and finite. It falls linearly to scale
            / L in the last of L layers. The paper does not fix the layer weights: a linear decay is what
            re-implementations use.
        layers: Top-level keys of the update in the order of the network, from input to output. None takes the leaves in
            the order of `jax.tree`, which for dicts is alphabetical.

    Returns:
        The objective. It raises ValueError for an update with a top-level key that is not among `layers`.

    Raises:
        ValueError: If `scale` is negative or not finite.

    Examples:
        The only layer has weight 1, so the value is (3^2 + 4^2 + 0.1 (3 + 4)) / 2:

        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> simulated, observed = {"w": jnp.array([4.0, 4.0])}, {"w": jnp.array([1.0, 0.0])}
        >>> print(f"{objectives.tag(scale=0.1)(simulated, observed):.2f}")
        12.85
    """
    _check.not_negative(scale=scale)
    _check.finite("scale", scale)
    weights_fn = linear_decay(layers)

    @widening
    def objective_fn(simulated: Updates, observed: Updates) -> Float[Array, ""]:
        difference = optax.tree.sub(simulated, observed)
        weights = weights_fn(observed)
        absolute = optax.tree.sum(jax.tree.map(lambda d, w: w * jnp.sum(jnp.abs(d)), difference, weights))
        return 0.5 * (optax.tree.norm(difference, squared=True) + scale * absolute)

    return objective_fn


def gaussian_likelihood(scale: float | Updates) -> ObjectiveFn:
    """Builds minus the log-likelihood, up to a constant, of an update with Gaussian noise added
    (Balunovic et al., Bayesian Framework for Gradient Leakage, ICLR 2022, section 4).

    Args:
        scale: Standard deviation of the noise, positive and finite: one number, or a tree like the update.

    Returns:
        The objective, in nats.

    Raises:
        ValueError: If `scale` is not positive or not finite.

    Examples:
        A difference of two standard deviations costs 2^2 / 2 nats:

        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> objective = objectives.gaussian_likelihood(0.5)
        >>> print(f"{objective({'w': jnp.array([2.0])}, {'w': jnp.array([1.0])}):.2f}")
        2.00
    """
    _check.positive(scale=scale)
    _check.finite("scale", scale)

    @widening
    def objective_fn(simulated: Updates, observed: Updates) -> Float[Array, ""]:
        return 0.5 * euclidean(_divide(simulated, scale), _divide(observed, scale))

    return objective_fn


def laplace_likelihood(scale: float | Updates) -> ObjectiveFn:
    """Builds minus the log-likelihood, up to a constant, of an update with Laplace noise added.

    Args:
        scale: Scale b of the noise, positive and finite: one number, or a tree like the update.

    Returns:
        The objective, in nats.

    Raises:
        ValueError: If `scale` is not positive or not finite.

    Examples:
        A difference of 4 b costs 4 nats:

        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> objective = objectives.laplace_likelihood(0.25)
        >>> print(f"{objective({'w': jnp.array([2.0])}, {'w': jnp.array([1.0])}):.2f}")
        4.00
    """
    _check.positive(scale=scale)
    _check.finite("scale", scale)

    @widening
    def objective_fn(simulated: Updates, observed: Updates) -> Float[Array, ""]:
        return l1(_divide(simulated, scale), _divide(observed, scale))

    return objective_fn


@widening
def euclidean_residuals(simulated: Updates, observed: Updates) -> Updates:
    """Computes residuals whose sum of squares is `euclidean`, for a least-squares solver.

    Args:
        simulated: Update that the dummy data yield.
        observed: Update that the client shared, a tree like `simulated`.

    Returns:
        The differences, a tree like the updates.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> simulated, observed = {"w": jnp.array([4.0, 4.0])}, {"w": jnp.array([1.0, 0.0])}
        >>> objectives.euclidean_residuals(simulated, observed)["w"].tolist()
        [3.0, 4.0]
    """
    return optax.tree.sub(simulated, observed)


@widening
def cosine_residuals(simulated: Updates, observed: Updates) -> Updates:
    """Computes residuals whose sum of squares is `cosine`: the difference of the two unit vectors over the root of 2.

    Args:
        simulated: Update that the dummy data yield.
        observed: Update that the client shared, a tree like `simulated`.

    Returns:
        The residuals, a tree like the updates.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> residuals = objectives.cosine_residuals({"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 3.0])})
        >>> print(f"{(residuals['w'] ** 2).sum():.2f}")
        1.00
    """
    return optax.tree.scale(0.5**0.5, optax.tree.sub(_unit(simulated), _unit(observed)))


def _cosine(a: Updates, b: Updates) -> Float[Array, ""]:
    """Returns the cosine of two updates, each taken as one vector."""
    highest = jax.lax.Precision.HIGHEST
    vdot = functools.partial(jnp.vdot, precision=highest)
    layers = [jax.tree.leaves(jax.tree.map(vdot, x, y)) for x, y in ((a, a), (b, b), (a, b))]
    # The sums over layers are a matrix product, because XLA fuses a chain of additions into each of its readers: every
    # element of the derivative is scaled by these sums, and would add up all layers again.
    products = jnp.stack([jnp.stack(row) for row in layers])
    aa, bb, ab = jnp.matmul(products, jnp.ones(products.shape[1], products.dtype), precision=highest)
    return ab * (inverse_root(aa) * inverse_root(bb))


def _unit(update: Updates) -> Updates:
    """Scales an update to length 1; an update too short to have a direction becomes 0."""
    return optax.tree.scale(inverse_root(jnp.asarray(optax.tree.norm(update, squared=True))), update)


def inverse_root(squared: Float[Array, ""]) -> Float[Array, ""]:
    """Computes one over the norm from the squared norm.

    Args:
        squared: Squared norm.

    Returns:
        The inverse of the norm. It is 0, and so is its derivative, where the squared norm is at most 1e-30, too small
        to divide by.
    """
    return jax.lax.rsqrt(jnp.where(squared > TINY, squared, jnp.inf))


def _divide(update: Updates, scale: float | Updates) -> Updates:
    """Divides an update by one number, or by a tree like it."""
    if jax.tree.structure(scale) != jax.tree.structure(update):
        scale = jax.tree.map(lambda _: scale, update)
    return optax.tree.div(update, scale)
