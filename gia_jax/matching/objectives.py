"""How far a simulated update is from the observed one: `(simulated, observed) -> ` scalar, lower is closer.

Sums run over all entries of all layers, in float32 or wider whatever their type; `weighted` and `selected` change what
a layer counts.
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

# An update of a squared norm below this has no direction: its cosine with anything is 0, and so is its derivative.
TINY = 1e-30


@widening
def euclidean(simulated: Updates, observed: Updates) -> Float[Array, ""]:
    """Sum of squared differences (Zhu et al., DLG, NeurIPS 2019, equation 4)."""
    return jnp.asarray(optax.tree.norm(optax.tree.sub(simulated, observed), squared=True))


@widening
def layerwise_euclidean(simulated: Updates, observed: Updates) -> Float[Array, ""]:
    """The sum over layers of the L2 distance, not squared (Yin et al., GradInversion, CVPR 2021)."""
    distances = jax.tree.map(lambda s, o: optax.safe_norm(s - o, 1e-12), simulated, observed)
    return jnp.asarray(optax.tree.sum(distances))


@widening
def l1(simulated: Updates, observed: Updates) -> Float[Array, ""]:
    """Sum of absolute differences."""
    return jnp.asarray(optax.tree.norm(optax.tree.sub(simulated, observed), ord=1))


@widening
def cosine(simulated: Updates, observed: Updates) -> Float[Array, ""]:
    """One minus the cosine of the two updates, each taken as one vector, in [0, 2]
    (Geiping et al., Inverting Gradients, NeurIPS 2020, equation 4).
    """
    return 1 - _cosine(simulated, observed)


@widening
def layerwise_cosine(simulated: Updates, observed: Updates) -> Float[Array, ""]:
    """The sum over layers of one minus the layer's cosine, in [0, 2 L]."""
    layers = jax.tree.map(lambda s, o: 1 - _cosine(s, o), simulated, observed)
    return jnp.asarray(optax.tree.sum(layers))


@widening
def angular(simulated: Updates, observed: Updates) -> Float[Array, ""]:
    """The angle between the two updates over pi, in [0, 1]; clipped where its derivative is infinite."""
    return jnp.arccos(jnp.clip(_cosine(simulated, observed), -1 + 1e-7, 1 - 1e-7)) / jnp.pi


@widening
def masked_cosine(simulated: Updates, observed: Updates, *, threshold: float = 1e-6) -> Float[Array, ""]:
    """`cosine` on the entries the observation kept, |observed| > `threshold` >= 0: for pruned updates."""
    _check.not_negative(threshold=threshold)

    def kept(update: Updates) -> Updates:
        return jax.tree.map(lambda leaf, o: jnp.where(jnp.abs(o) <= threshold, 0, leaf), update, observed)

    return cosine(kept(simulated), kept(observed))


def tag(*, scale: float = 0.1, layers: Sequence[str] | None = None) -> ObjectiveFn:
    """Half squared plus weighted absolute differences (Deng et al., TAG, EMNLP Findings 2021, equation 3).

    Args:
        scale: Weight of the absolute differences of the first layer, >= 0; it falls linearly to scale / L in the last.
            The paper does not fix the layer weights; a linear decay is what re-implementations use.
        layers: Names of the layers in the order of the network, as for `linear_decay`.

    Returns:
        The objective.
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
    """Minus the log-likelihood, up to a constant, of an update with Gaussian noise added
    (Balunovic et al., Bayesian Framework for Gradient Leakage, ICLR 2022, section 4).

    Args:
        scale: Standard deviation of the noise, > 0 and finite; one number, or a tree like the update.

    Returns:
        The objective, in nats.
    """
    _check.positive(scale=scale)
    _check.finite("scale", scale)

    @widening
    def objective_fn(simulated: Updates, observed: Updates) -> Float[Array, ""]:
        return 0.5 * euclidean(_divide(simulated, scale), _divide(observed, scale))

    return objective_fn


def laplace_likelihood(scale: float | Updates) -> ObjectiveFn:
    """Minus the log-likelihood, up to a constant, of an update with Laplace noise of that scale b, in nats."""
    _check.positive(scale=scale)
    _check.finite("scale", scale)

    @widening
    def objective_fn(simulated: Updates, observed: Updates) -> Float[Array, ""]:
        return l1(_divide(simulated, scale), _divide(observed, scale))

    return objective_fn


def linear_decay(layers: Sequence[str] | None = None) -> Callable[[Updates], Updates]:
    """Layer weights (L - i) / L for i = 0..L-1: 1 for the first layer, 1 / L for the last.

    Args:
        layers: The top-level keys of the update from input to output, such as ["conv1", "conv2", "head"]; None takes
            the leaves in the order of `jax.tree`, which for dicts is the alphabet's.

    Returns:
        `(update) -> ` a tree like it, one weight a leaf; it raises ValueError for a key that is not among `layers`.
    """
    return _by_layer(layers, lambda i, count: 1 - i / count)


def exponential_decay(layers: Sequence[str] | None = None) -> Callable[[Updates], Updates]:
    """Layer weights exp(-i) for i = 0..L-1; `layers` as for `linear_decay`."""
    return _by_layer(layers, lambda i, _: math.exp(-i))


def _by_layer(layers: Sequence[str] | None, weight_fn: Callable[[int, int], float]) -> Callable[[Updates], Updates]:
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
    """Layer weights that keep the `count` layers of the largest observed norm and drop the others."""
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
    """The objective with a weight for every layer.

    Args:
        objective_fn: Any objective of this module.
        weights_fn: Makes from the observed update a tree like it with one weight >= 0 a leaf, such as `linear_decay()`.

    Returns:
        The objective of layers multiplied by the square root of their weight: squared differences and inner products
        count `weight` times.
    """

    @widening
    def weighted_objective_fn(simulated: Updates, observed: Updates) -> Float[Array, ""]:
        roots = jax.tree.map(jnp.sqrt, weights_fn(observed))
        return objective_fn(optax.tree.mul(simulated, roots), optax.tree.mul(observed, roots))

    return weighted_objective_fn


def selected(objective_fn: ObjectiveFn, keep_fn: Callable[[str], bool]) -> ObjectiveFn:
    """The objective on some of the layers.

    Args:
        objective_fn: Any objective of this module.
        keep_fn: Says by the key path of a leaf, such as "['fc']['kernel']", whether it counts.

    Returns:
        The objective; when called it raises ValueError if no layer is left.
    """

    def leaves(update: Updates) -> list[Array]:
        kept = [leaf for path, leaf in jax.tree.leaves_with_path(update) if keep_fn(jax.tree_util.keystr(path))]
        if not kept:
            raise ValueError(f"keep_fn must keep at least one layer, got none of {len(jax.tree.leaves(update))}")
        return kept

    return lambda simulated, observed: objective_fn(leaves(simulated), leaves(observed))


@widening
def euclidean_residuals(simulated: Updates, observed: Updates) -> Updates:
    """Residuals whose sum of squares is `euclidean`."""
    return optax.tree.sub(simulated, observed)


@widening
def cosine_residuals(simulated: Updates, observed: Updates) -> Updates:
    """Residuals whose sum of squares is `cosine`: the difference of the two unit vectors over the root of 2."""
    return optax.tree.scale(0.5**0.5, optax.tree.sub(_unit(simulated), _unit(observed)))


def _cosine(a: Updates, b: Updates) -> Float[Array, ""]:
    highest = jax.lax.Precision.HIGHEST
    vdot = functools.partial(jnp.vdot, precision=highest)
    layers = [jax.tree.leaves(jax.tree.map(vdot, x, y)) for x, y in ((a, a), (b, b), (a, b))]
    # The sums over layers are a matrix product, because XLA fuses a chain of additions into each of its readers: every
    # element of the derivative is scaled by these sums, and would add up all layers again.
    products = jnp.stack([jnp.stack(row) for row in layers])
    aa, bb, ab = jnp.matmul(products, jnp.ones(products.shape[1], products.dtype), precision=highest)
    return ab * (inverse_root(aa) * inverse_root(bb))


def _unit(update: Updates) -> Updates:
    return optax.tree.scale(inverse_root(jnp.asarray(optax.tree.norm(update, squared=True))), update)


def inverse_root(squared: Float[Array, ""]) -> Float[Array, ""]:
    """One over the norm; 0 where that is too small to divide by, and so is the derivative."""
    return jax.lax.rsqrt(jnp.where(squared > TINY, squared, jnp.inf))


def _divide(update: Updates, scale: float | Updates) -> Updates:
    if jax.tree.structure(scale) != jax.tree.structure(update):
        scale = jax.tree.map(lambda _: scale, update)
    return optax.tree.div(update, scale)
