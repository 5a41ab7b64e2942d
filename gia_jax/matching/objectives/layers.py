"""What a layer counts in an objective: weights, and a choice of layers."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gia_jax import _check
from gia_jax.base import ObjectiveFn, Updates
from gia_jax.precision import wide_dtype, widened_tree, widening


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
        objective_fn: Objective `(simulated, observed) -> distance`, any of `objectives`.
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
        objective_fn: Objective `(simulated, observed) -> distance`, any of `objectives`.
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
