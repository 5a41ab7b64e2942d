"""Gradient pruning: only the largest entries of an update are shared.

Aji and Heafield, Sparse Communication for Distributed Gradient Descent, EMNLP 2017, section 3 (threshold for each
tensor or for all, residuals kept). As a defense: Zhu et al., Deep Leakage from Gradients, NeurIPS 2019, section 5.2,
and Huang et al., Evaluating Gradient Inversion Attacks and Defenses in Federated Learning, NeurIPS 2021.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int

from gia_jax.base import Updates
from gia_jax.precision import cast_like, widened_tree

SCOPES = ("tensor", "global")


class PruneState(NamedTuple):
    """The state of `prune`.

    Attributes:
        residual: What was pruned and not yet shared, a tree like the update, in float32 or wider. It is () without
            error feedback.
    """

    residual: Any


def prune(ratio: float, *, scope: str = "tensor", error_feedback: bool = False) -> optax.GradientTransformation:
    """Sets the entries of least magnitude to zero.

    Of n entries exactly n - floor(ratio * n) are kept. `ratio` is read as the decimal that it is written as: 0.7 of 10
    is 7, although 0.7 * 10 is not in binary. Of entries of equal magnitude the first in the order of the tree, and of
    the flattened array, is kept. NaN counts as the largest magnitude: it is shared, not hidden. The mask is a constant
    under differentiation, so that the derivative is that of the entries kept.

    Args:
        ratio: Share of entries to prune, in [0, 1).
        scope: Where the share is taken: "tensor" prunes this share of each leaf, "global" of all leaves together.
        error_feedback: Whether what was pruned is added to the next update. It matters for a client that trains, and
            makes no difference to one that shares a single update.

    Returns:
        The transformation. Its state is empty, or the residual, a tree like the update. An attacker that knows the
        defense reads the support from the observation: it uses `matching.adaptive.pruned` on the undefended client.

    Raises:
        ValueError: If `ratio` is outside [0, 1), or `scope` is unknown.

    Examples:
        Half of the entries are shared:

        >>> import jax.numpy as jnp
        >>> from gia_jax import defenses
        >>> pruning = defenses.prune(0.5)
        >>> update = jnp.array([1.0, -4.0, 2.0, 3.0])
        >>> shared, _ = pruning.update(update, pruning.init(update))
        >>> shared.tolist()
        [0.0, -4.0, 0.0, 3.0]
    """
    exact = checked_ratio(ratio)
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")

    def init_fn(params: Updates) -> PruneState:
        return PruneState(optax.tree.zeros_like(widened_tree(params)) if error_feedback else ())

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        like = updates
        if error_feedback:
            updates = optax.tree.add(widened_tree(updates), state.residual)
        leaves, treedef = jax.tree.flatten(updates)
        if scope == "global":
            masks = largest(leaves, _kept(sum(leaf.size for leaf in leaves), exact))
        else:
            masks = [largest([leaf], _kept(leaf.size, exact))[0] for leaf in leaves]
        mask = jax.tree.unflatten(treedef, masks)
        shared = jax.tree.map(lambda kept, leaf: jnp.where(kept, leaf, 0), mask, updates)
        rest = jax.tree.map(lambda kept, leaf: jnp.where(kept, 0, leaf), mask, updates) if error_feedback else ()
        return cast_like(shared, like), PruneState(rest)

    return optax.GradientTransformation(init_fn, update_fn)


def top_k(ratio: float, *, error_feedback: bool = True) -> optax.GradientTransformation:
    """Shares only the largest entries of the whole update, with error feedback: `prune` with scope "global".

    Stich et al., Sparsified SGD with Memory, NeurIPS 2018, algorithm 1. The residual is of the update, before the
    learning rate.

    Args:
        ratio: Share of entries that are not sent, in [0, 1).
        error_feedback: Whether what was pruned is added to the next update.

    Returns:
        The transformation. Its state is the residual, a tree like the update, or empty without error feedback.

    Raises:
        ValueError: If `ratio` is outside [0, 1).

    Examples:
        The entry that was pruned in the first round is shared in the second:

        >>> import jax.numpy as jnp
        >>> from gia_jax import defenses
        >>> sparsification = defenses.top_k(0.5)
        >>> update = jnp.array([2.0, 3.0])
        >>> first, state = sparsification.update(update, sparsification.init(update))
        >>> second, _ = sparsification.update(update, state)
        >>> first.tolist(), second.tolist()
        ([0.0, 3.0], [4.0, 0.0])
    """
    return prune(ratio, scope="global", error_feedback=error_feedback)


def checked_ratio(ratio: float) -> Fraction:
    """Checks a share of entries, and returns it as the decimal that it is written as.

    Args:
        ratio: Share, a number in [0, 1).

    Returns:
        The share as an exact fraction: 7/10 for 0.7.

    Raises:
        ValueError: If `ratio` is outside [0, 1), or is no single number.
    """
    if isinstance(ratio, bool | str) or np.ndim(ratio) or not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), got {ratio!r}")
    return Fraction(str(ratio))


def _kept(size: int, ratio: Fraction) -> int:
    """Returns how many of `size` entries are kept."""
    return size - math.floor(ratio * size)


def largest(leaves: Sequence[Array], count: int) -> list[Bool[Array, "..."]]:
    """Marks the `count` entries of largest magnitude, all leaves together, and the first of equal ones.

    The bits of a magnitude, read as an integer, are in the order of magnitudes. The threshold is therefore found by
    bisection on integers, which counts entries in every step, and nothing is sorted.

    Args:
        leaves: Arrays of floating-point numbers, with fewer than 2^31 entries in all if any is left out.
        count: Number of entries to mark. All are marked where there are no more.

    Returns:
        A mask for each leaf, of its shape.

    Raises:
        ValueError: If there are 2^31 entries or more, and not all are marked.
    """
    total = sum(leaf.size for leaf in leaves)
    if count >= total:
        return [jnp.ones(leaf.shape, bool) for leaf in leaves]
    if total > jnp.iinfo(jnp.int32).max:
        raise ValueError(f"leaves must have fewer than 2^31 entries in all, got {total}")
    dtype = jnp.result_type(*leaves)
    # Flat, because counting along several axes takes a CPU twice as long.
    keys = [_ordered_bits(leaf.astype(dtype)).ravel() for leaf in leaves]
    zero = jnp.zeros((), keys[0].dtype)
    threshold, reached = _bisect(
        lambda t: _count([key >= t for key in keys]), count, zero, zero + jnp.iinfo(keys[0].dtype).max
    )
    # Of those that equal the threshold, the last ones that are too many go.
    ties = [key == threshold for key in keys]
    starts = np.cumsum([0] + [leaf.size for leaf in leaves[:-1]])
    places = [jnp.arange(start, start + leaf.size, dtype=jnp.int32) for start, leaf in zip(starts, leaves, strict=True)]
    excess = reached - count
    bound, _ = _bisect(
        lambda b: _count([tie & (place >= b) for tie, place in zip(ties, places, strict=True)]),
        excess,
        jnp.where(excess == 0, total, 0).astype(jnp.int32),
        jnp.int32(total),
    )
    return [
        ((key >= threshold) & ~(tie & (place >= bound))).reshape(leaf.shape)
        for leaf, key, tie, place in zip(leaves, keys, ties, places, strict=True)
    ]


def _ordered_bits(leaf: Array) -> Array:
    """Returns the bits of the magnitudes as integers, which have the same order as the magnitudes."""
    magnitude = jnp.abs(jax.lax.stop_gradient(leaf))
    return jax.lax.bitcast_convert_type(magnitude, f"int{8 * leaf.dtype.itemsize}")


def _count(masks: Sequence[Array]) -> Int[Array, ""]:
    """Counts the entries that are True in all masks together."""
    return sum((jnp.sum(mask, dtype=jnp.int32) for mask in masks), jnp.zeros((), jnp.int32))


def _bisect(
    count_fn: Callable[[Array], Array], target: int | Array, low: Array, high: Array
) -> tuple[Array, Int[Array, ""]]:
    """Finds where a non-increasing function of an integer is `target`, or the last argument where it is more.

    Args:
        count_fn: Function `(argument) -> count`, non-increasing.
        target: Count that is looked for.
        low: Least argument. The count there is at least `target`.
        high: Largest argument.

    Returns:
        The pair of the argument that was found and the count there.
    """

    def unsettled(bounds: tuple[Array, Array]) -> Array:
        return bounds[0] < bounds[1]

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = high - (high - low) // 2
        count = count_fn(middle)
        low = jnp.where(count >= target, middle, low)
        return low, jnp.where(count == target, middle, jnp.where(count > target, high, middle - 1))

    found, _ = jax.lax.while_loop(unsettled, halve, (low, high))
    return found, count_fn(found)
