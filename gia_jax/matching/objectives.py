"""Objectives, functions `(simulated, observed) -> distance` of two updates, whose result is a scalar.

A layer is one array (leaf) of the update. Sums run over all entries of all layers, in float32 or wider whatever their
type. `weighted` and `selected` change what a layer counts.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gia_jax import _check
from gia_jax.base import ObjectiveFn, Updates
from gia_jax.precision import wide_dtype, widened_tree, widening

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
def masked_cosine(simulated: Updates, observed: Updates, *, threshold: float = 1e-6) -> Float[Array, ""]:
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


def tag(*, scale: float = 0.1, layers: Sequence[str] | None = None) -> ObjectiveFn:
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


def linear_decay(layers: Sequence[str] | None = None) -> Callable[[Updates], Updates]:
    """Builds layer weights that fall linearly, (L - i) / L from 1 for layer i = 0 to 1 / L for layer i = L - 1.

    Args:
        layers: Top-level keys of the update from input to output, such as ["conv1", "conv2", "head"]. None takes the
            leaves in the order of `jax.tree`, which for dicts is alphabetical.

    Returns:
        Function `(update) -> weights` to a tree like the update with one weight for each leaf. It raises ValueError for
        a key that is not among `layers`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> weights = objectives.linear_decay(["conv", "head"])({"head": jnp.ones(3), "conv": jnp.ones(2)})
        >>> print(f"{weights['conv']:.2f} {weights['head']:.2f}")
        1.00 0.50
    """
    return _by_layer(layers, lambda i, count: 1 - i / count)


def exponential_decay(layers: Sequence[str] | None = None) -> Callable[[Updates], Updates]:
    """Builds layer weights that fall exponentially, exp(-i) for layer i = 0..L-1.

    Args:
        layers: Top-level keys of the update from input to output, such as ["conv1", "conv2", "head"]. None takes the
            leaves in the order of `jax.tree`, which for dicts is alphabetical.

    Returns:
        Function `(update) -> weights` to a tree like the update with one weight for each leaf. It raises ValueError for
        a key that is not among `layers`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> weights = objectives.exponential_decay(["conv", "head"])({"head": jnp.ones(3), "conv": jnp.ones(2)})
        >>> print(f"{weights['conv']:.2f} {weights['head']:.2f}")
        1.00 0.37
    """
    return _by_layer(layers, lambda i, _: math.exp(-i))


def _by_layer(layers: Sequence[str] | None, weight_fn: Callable[[int, int], float]) -> Callable[[Updates], Updates]:
    """Builds layer weights from a function `(place of the layer, number of layers) -> weight`."""

    def weights_fn(update: Updates) -> Updates:
        leaves, tree = jax.tree.flatten(update)
        if layers is None:
            places, count = range(len(leaves)), len(leaves)
        else:
            keys = [jax.tree_util.keystr(path[:1], simple=True) for path, _ in jax.tree.leaves_with_path(update)]
            for key in keys:
                if key not in layers:
                    raise ValueError(f"layers must name every top-level key of the update, {key!r} is not in {layers}")
            places, count = [list(layers).index(key) for key in keys], len(layers)
        dtypes = [wide_dtype(leaf.dtype) for leaf in leaves]
        weights = [jnp.asarray(weight_fn(i, count), dtype) for i, dtype in zip(places, dtypes, strict=True)]
        return jax.tree.unflatten(tree, weights)

    return weights_fn


def largest(count: int) -> Callable[[Updates], Updates]:
    """Builds layer weights that keep the layers of the largest observed norm and drop the others.

    Args:
        count: Number of layers that are kept, at least 1.

    Returns:
        Function `(observed) -> weights` to a tree like the update with weight 1 for each leaf that is kept and 0 for
        the others. It raises ValueError where the update has fewer than `count` leaves.

    Raises:
        ValueError: If `count` is not a positive integer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> weights = objectives.largest(1)({"conv": jnp.array([3.0]), "head": jnp.array([5.0])})
        >>> print(f"{weights['conv']:.2f} {weights['head']:.2f}")
        0.00 1.00
    """
    _check.integer(count=count)

    def weights_fn(observed: Updates) -> Updates:
        leaves, tree = jax.tree.flatten(widened_tree(observed))
        if count > len(leaves):
            raise ValueError(f"count must be at most the number of layers {len(leaves)}, got {count}")
        norms = jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in leaves])
        kept = jnp.zeros(len(leaves)).at[jax.lax.top_k(norms, count)[1]].set(1)
        return jax.tree.unflatten(tree, [k.astype(leaf.dtype) for k, leaf in zip(kept, leaves, strict=True)])

    return weights_fn


def weighted(objective_fn: ObjectiveFn, weights_fn: Callable[[Updates], Updates]) -> ObjectiveFn:
    """Gives every layer a weight in an objective.

    Each layer of both updates is multiplied by the square root of its weight, so that squared differences and inner
    products count `weight` times.

    Args:
        objective_fn: Objective `(simulated, observed) -> distance`, any of this module.
        weights_fn: Function that maps the observed update to a tree like it with one weight, at least 0, for each leaf,
            such as `linear_decay()`.

    Returns:
        The weighted objective.

    Examples:
        Only the larger layer counts:

        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> objective = objectives.weighted(objectives.euclidean, objectives.largest(1))
        >>> simulated = {"conv": jnp.array([0.0]), "head": jnp.array([3.0])}
        >>> observed = {"conv": jnp.array([3.0]), "head": jnp.array([5.0])}
        >>> print(f"{objective(simulated, observed):.2f}")
        4.00
    """

    @widening
    def weighted_objective_fn(simulated: Updates, observed: Updates) -> Float[Array, ""]:
        roots = jax.tree.map(jnp.sqrt, weights_fn(observed))
        return objective_fn(optax.tree.mul(simulated, roots), optax.tree.mul(observed, roots))

    return weighted_objective_fn


def selected(objective_fn: ObjectiveFn, keep_fn: Callable[[str], bool]) -> ObjectiveFn:
    """Restricts an objective to some of the layers.

    Args:
        objective_fn: Objective `(simulated, observed) -> distance`, any of this module.
        keep_fn: Function that says for the key path of a leaf, such as "['fc']['kernel']", whether the leaf counts.

    Returns:
        The objective. It raises ValueError if no layer is left.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.matching import objectives
        >>> objective = objectives.selected(objectives.l1, lambda path: "head" in path)
        >>> simulated = {"conv": jnp.array([0.0]), "head": jnp.array([3.0])}
        >>> observed = {"conv": jnp.array([3.0]), "head": jnp.array([5.0])}
        >>> print(f"{objective(simulated, observed):.2f}")
        2.00
    """

    def leaves(update: Updates) -> list[Array]:
        kept = [leaf for path, leaf in jax.tree.leaves_with_path(update) if keep_fn(jax.tree_util.keystr(path))]
        if not kept:
            raise ValueError(f"keep_fn must keep at least one layer, got none of {len(jax.tree.leaves(update))}")
        return kept

    return lambda simulated, observed: objective_fn(leaves(simulated), leaves(observed))


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
