"""Step III of CAFE: the images whose features and gradients are those that steps I and II found."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import _check
from gia_jax.attacks.cafe.records import FeaturesFn
from gia_jax.base import Batch, ClientFn, Observation, Params, Updates
from gia_jax.matching import priors
from gia_jax.matching.initializations import near_grey
from gia_jax.matching.run import keep_best, run
from gia_jax.matching.solver import box, gradient_matching
from gia_jax.precision import widening
from gia_jax.threat import granted_labels

InvertFn = Callable[[PRNGKeyArray, Params, Sequence[Array], Batch, Updates], Array]


def feature_matching(
    features_fn: FeaturesFn,
    *,
    bounds: tuple[Float[ArrayLike, "..."], Float[ArrayLike, "..."]],
    client_fn: ClientFn | None = None,
    total_variation_weight: float = 0.0,
    num_steps: int = 2_000,
    optimizer: optax.GradientTransformation | None = None,
) -> InvertFn:
    """Builds step III of `cafe`, which searches the images in the pixel box that have the known features and gradients.

    It descends on the sum over records, workers and tensors of the squared distances relative to what is known, which
    steps I and II found for every record exactly.

    Args:
        features_fn: Function `(params, images) -> features` that computes the input of every worker's first fully
            connected layer, one array of shape (n, d) each.
        bounds: Darkest and brightest value of a pixel in the model's space, as two numbers or two arrays with one value
            for each channel.
        client_fn: Function `(params, records) -> gradients` that computes the gradient of every record alone, such as
            `clients.per_example(loss_fn)`. None leaves gradients out. They say more than H does where layers with
            weights come before it, such as convolutions.
        total_variation_weight: Weight beta of the total variation in the loss, at least 0 and finite.
        num_steps: Number of optimiser steps, at least 1.
        optimizer: Optimiser of the images. By default it is Adam, whose rate goes from 0.1 down to 0 along a cosine.

    Returns:
        The `invert_fn` of `cafe`, which keeps the best step.

    Raises:
        ValueError: If `total_variation_weight` is negative or not finite, `num_steps` is not a positive integer, or the
            bounds are in the wrong order.

    Examples:
        The features are twice the pixels, and the pixels are found from them:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch
        >>> from gia_jax.attacks.cafe import feature_matching
        >>> def features_fn(params, images):
        ...     return [2 * images.reshape(len(images), -1)]
        >>> invert_fn = feature_matching(features_fn, bounds=(0.0, 1.0), num_steps=100)
        >>> images = jnp.array([0.25, 0.75]).reshape(1, 1, 2, 1)
        >>> records = Batch(jnp.zeros_like(images), jnp.array([0]))
        >>> found = jax.jit(lambda key: invert_fn(key, {}, features_fn({}, images), records, ()))(jax.random.key(0))
        >>> bool(jnp.all(jnp.abs(found - images) < 0.01))
        True
    """
    _check.weight(total_variation_weight=total_variation_weight)
    _check.integer(num_steps=num_steps)
    _check.limits("bounds", bounds)
    project_fn = box(*bounds)

    def invert_fn(
        key: PRNGKeyArray, params: Params, features: Sequence[Array], records: Batch, gradients: Updates
    ) -> Array:
        def known(inputs: Array) -> Any:
            batch = Batch(inputs, records.labels)
            return tuple(features_fn(params, inputs)), () if client_fn is None else client_fn(params, batch)

        # What is matched stands in place of an update, and no parameter is read but in `known`.
        wanted = tuple(features), () if client_fn is None else gradients
        attack = gradient_matching(
            lambda _, batch: known(batch.inputs),
            init_fn=near_grey(),
            objective_fn=recordwise,
            prior_fn=priors.combine((total_variation_weight, priors.total_variation())),
            label_fn=granted_labels,
            project_fn=project_fn,
            optimizer=optax.adam(optax.cosine_decay_schedule(0.1, num_steps)) if optimizer is None else optimizer,
        )
        extra = {"inputs_like": records.inputs, "labels": records.labels}
        observation = Observation(wanted, wanted, extra)
        return run(keep_best(attack), key, observation, num_steps=num_steps)[0].batch.inputs

    return invert_fn


@widening
def recordwise(simulated: Updates, observed: Updates) -> Float[Array, ""]:
    """Computes the sum over leaves and records of |s - o|^2 / |o|^2.

    A record whose o is zero in a leaf does not count there.

    Args:
        simulated: Simulated gradients s of single records, leaves of shape (n, ...).
        observed: Known gradients o of the same records, a tree like `simulated`.

    Returns:
        The sum, a scalar of at least 0.

    Examples:
        The first record is all wrong, the second is right, and the third does not count:

        >>> import jax.numpy as jnp
        >>> from gia_jax.attacks.cafe import recordwise
        >>> observed = jnp.array([[3.0, 4.0], [1.0, 2.0], [0.0, 0.0]])
        >>> print(f"{recordwise(jnp.array([[0.0, 0.0], [1.0, 2.0], [5.0, 5.0]]), observed):.2f}")
        1.00
    """

    def of_leaf(s: Array, o: Array) -> Float[Array, ""]:
        axes = tuple(range(1, o.ndim))
        length = jnp.sum(jnp.square(o), axes)
        missed = jnp.sum(jnp.square(s - o), axes)
        return jnp.sum(jnp.where(length > 0, missed / jnp.where(length > 0, length, 1), 0))

    return jnp.asarray(optax.tree.sum(jax.tree.map(of_leaf, simulated, observed)))
