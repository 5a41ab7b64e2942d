"""Objectives of an attacker that knows the defense, and what it reads of the defense's parameters from an update.

It never holds the client's key: what was drawn at random enters through a likelihood, not through a second draw.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import KeyPath
from jaxtyping import Array, Bool, Float

from gia_jax import _check
from gia_jax.base import ObjectiveFn, Updates
from gia_jax.matching.objectives import cosine, inverse_root
from gia_jax.precision import wide_dtype, widened_tree, widening

LEAST_MEAN = 1e-15  # of a tensor: the derivative of one over it is a number in float32
FLOOR = 1e-2  # a likelihood below this goes on along its tangent: a start outside of every interval has a derivative


def pruned(objective_fn: ObjectiveFn = cosine, *, weight: float = 1.0) -> ObjectiveFn:
    """For pruning and top-k: the objective on the observed support, and a penalty where a zero should have been seen:

        D(g on S, o) + weight * sum over i not in S of max(0, |g_i| - t)^2 / |o|^2,   S = {o_i != 0}.

    t is the least observed magnitude of the tensor (of the whole update, where a tensor has none): what was pruned was
    not larger. The share that was pruned need not be known.

    Args:
        objective_fn: D.
        weight: Weight of the penalty, >= 0 and finite; 0 gives what `masked_cosine` does.

    Returns:
        The objective.

    Raises:
        ValueError: If `weight` is negative or not finite.
    """
    _check.not_negative(weight=weight)
    _check.finite("weight", weight)

    @widening
    def objective(simulated: Updates, observed: Updates) -> Float[Array, ""]:
        least = jax.tree.map(lambda o: jnp.min(jnp.abs(o), initial=jnp.inf, where=o != 0), observed)
        overall = jnp.min(jnp.stack(jax.tree.leaves(least)))

        def excess(s: Array, o: Array, t: Array) -> Float[Array, ""]:
            limit = jnp.where(jnp.isfinite(t), t, overall)
            return jnp.sum(jnp.square(jnp.where(o == 0, jax.nn.relu(jnp.abs(s) - limit), 0)))

        over = jnp.asarray(optax.tree.sum(jax.tree.map(excess, simulated, observed, least)))
        matched = objective_fn(on_support(simulated, observed), observed)
        return matched + weight * over / _squared_norm(observed)

    return objective


def supported(objective_fn: ObjectiveFn = cosine, *, among: Callable[[str], bool] = lambda path: True) -> ObjectiveFn:
    """For Soteria: the objective on what is not zero in the observation, whatever was removed by a rule of its own.

    Args:
        objective_fn: Any objective.
        among: Says by the key path of a leaf, such as "['fc']['kernel']", whether what is zero there is left out; by
            default it is for all leaves. Choose fewer where `objective_fn` uses the zeros of the rest, as `pruned`
            does.

    Returns:
        The objective.
    """

    def support(path: KeyPath, s: Array, o: Array) -> Array:
        return on_support(s, o) if among(jax.tree_util.keystr(path)) else s

    return lambda s, o: objective_fn(jax.tree_util.tree_map_with_path(support, s, o), o)


def sign_hinge(*, margin: float = 0.01, zero_weight: float = 1.0) -> ObjectiveFn:
    """For signs: the mean over the entries that count, m the mean |g| of the entry's tensor, of

        max(0, margin - sign(o_i) g_i / m)  where o_i is not 0,  and  zero_weight |g_i| / m  where it is.

    Little is left of it at the truth, whose entries below the margin are charged, and a cosine with the signs is far
    from its least value there, which lies elsewhere. It does not depend on the length of any tensor of g: what it is
    after is signs, not the scale of a tensor that `defenses.sign` shares beside them. A tensor that is all 0 has every
    sign wrong, at 1 each.

    Args:
        margin: > 0; a large one asks more of an entry than its sign.
        zero_weight: >= 0. A gradient that is exactly 0, as of a feature that is not active, shares 0; 0 for a client
            that makes zeros of its own before it takes signs, and they do not count.

    Returns:
        The objective; 0 where every sign agrees by the margin, and nothing is where a zero was seen.

    Raises:
        ValueError: If `margin` is not positive, `zero_weight` negative, or one of them not finite.
    """
    _check.positive(margin=margin)
    _check.finite("margin", margin)
    _check.not_negative(zero_weight=zero_weight)
    _check.finite("zero_weight", zero_weight)

    def of_tensor(s: Array, o: Array) -> Float[Array, ""]:
        mean = jnp.mean(jnp.abs(s))
        exists = mean > LEAST_MEAN
        scaled = jnp.where(exists, s, 0) / jnp.where(exists, mean, 1)
        wrong = jnp.where(exists, jax.nn.relu(margin - jnp.sign(o) * scaled), 1)
        return jnp.sum(jnp.where(o != 0, wrong, zero_weight * jnp.abs(scaled)))

    def counted(o: Array) -> Float[Array, ""]:
        return jnp.sum(jnp.where(o != 0, 1.0, zero_weight))

    @widening
    def objective(simulated: Updates, observed: Updates) -> Float[Array, ""]:
        total = jnp.asarray(optax.tree.sum(jax.tree.map(of_tensor, simulated, observed)))
        number = jnp.asarray(optax.tree.sum(jax.tree.map(counted, observed)))
        return total / jnp.maximum(number, 1).astype(total.dtype)

    return objective


def rounding_likelihood(bits: int | np.integer) -> ObjectiveFn:
    """For `defenses.quantize` and, with 2 bits, `ternary`: minus the mean log-likelihood of an entry, in nats.

    Stochastic rounding between levels d apart gives o from g with probability 1 - |g - o| / d, and 0 beyond d. Below a
    probability of 1e-2 the logarithm goes on along its tangent.

    `protection` compares with the expectation instead, by the attack's own objective. Started from what that finds,
    this finds more at 2 bits (.2 to .7 dB in the benchmarks) and at 4 up to 2.1 dB less: its narrow intervals are not
    met, and it ends far above its value at the truth.

    Args:
        bits: An integer in [2, 16], as the defense's.

    Returns:
        The objective.

    Raises:
        ValueError: If `bits` is not an integer in [2, 16].
    """
    _check.integer(2, 16, bits=bits)
    levels = 2 ** (int(bits) - 1) - 1

    def of_tensor(s: Array, o: Array) -> Float[Array, ""]:
        step = jnp.max(jnp.abs(o), initial=0) / levels
        probability = 1 - jnp.abs(s - o) / jnp.where(step > 0, step, 1)
        tangent = math.log(FLOOR) + (probability - FLOOR) / FLOOR
        return -jnp.sum(jnp.where(probability > FLOOR, jnp.log(jnp.maximum(probability, FLOOR)), tangent))

    @widening
    def objective(simulated: Updates, observed: Updates) -> Float[Array, ""]:
        total = jnp.asarray(optax.tree.sum(jax.tree.map(of_tensor, simulated, observed)))
        return total / sum(leaf.size for leaf in jax.tree.leaves(observed))

    return objective


def relative(objective_fn: ObjectiveFn) -> ObjectiveFn:
    """The objective over its value at no update at all: of the size of a cosine, so that priors keep their weights.

    For Gaussian noise `relative(euclidean)`, for Laplace noise `relative(l1)`: the likelihood up to a factor.
    """

    @widening
    def objective(simulated: Updates, observed: Updates) -> Float[Array, ""]:
        nothing = objective_fn(optax.tree.zeros_like(observed), observed)
        return objective_fn(simulated, observed) / jnp.where(nothing > 0, nothing, 1)

    return objective


def rescaled(objective_fn: ObjectiveFn) -> ObjectiveFn:
    """The objective of the simulated update at the length of the observed one, both where the observed one is not 0.

    It compares directions, as a cosine does, and need not know a norm of clipping. An update of an image that the
    network has learned is short, and those of the images on the way to it are not: without this, an objective that is
    not a cosine leads to short updates first. `euclidean` becomes a multiple of the cosine, and behind noise the
    observed length is also the noise's, so that the truth is no longer the least.

    Args:
        objective_fn: An objective of two updates; the cosine compares directions already, and comes back as it is.

    Returns:
        The objective; the same for every positive multiple of a simulated update.
    """
    if objective_fn is cosine:
        return cosine

    @widening
    def objective(simulated: Updates, observed: Updates) -> Float[Array, ""]:
        ratio = estimated_norm(observed) * inverse_root(_squared_norm(on_support(simulated, observed)))
        return objective_fn(optax.tree.scale(ratio, simulated), observed)

    return objective


def on_support(simulated: Updates, observed: Updates) -> Updates:
    """The simulated update with zeros where the observed one has them."""
    return jax.tree.map(lambda s, o: jnp.where(o != 0, s, 0), simulated, observed)


def estimated_norm(observed: Updates) -> Float[Array, ""]:
    """The clipping norm, taken to be the norm of the update (Li et al., GGL, CVPR 2022): right where it was clipped."""
    return jnp.sqrt(_squared_norm(observed))


def estimated_sparsity(observed: Updates) -> Updates:
    """The share of zeros in each tensor, in [0, 1]: the ratio of pruning, where no entry was zero before."""
    return jax.tree.map(lambda leaf: jnp.mean(leaf == 0, dtype=wide_dtype(leaf.dtype)), observed)


def zeroed_features(kernel: Float[Array, "f c"]) -> Bool[Array, " f"]:
    """The features whose row of the last kernel's gradient is zero: pruned by Soteria, or dead."""
    return jnp.all(kernel == 0, axis=1)


def _squared_norm(update: Updates) -> Float[Array, ""]:
    return jnp.asarray(optax.tree.norm(widened_tree(update), squared=True))
