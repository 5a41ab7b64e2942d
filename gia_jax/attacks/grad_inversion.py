"""GradInversion, seeds that agree: Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov, See through Gradients, CVPR 2021."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import _check
from gia_jax.base import (
    Attack,
    AttackState,
    ClientFn,
    InitFn,
    LabelFn,
    ObjectiveFn,
    Observation,
    Params,
    PriorFn,
    Scalar,
    Statistics,
)
from gia_jax.labels import ClassifierFn, column_minimum
from gia_jax.matching import priors
from gia_jax.matching.group import ConsensusFn, consistency, registered_mean, together
from gia_jax.matching.initializations import normal
from gia_jax.matching.objectives import layerwise_euclidean
from gia_jax.matching.optimizers import langevin_noise
from gia_jax.matching.solver import box, gradient_matching

NUM_STEPS = 20_000
NUM_SEEDS = 8


def grad_inversion(
    client_fn: ClientFn,
    classifier_fn: ClassifierFn,
    *,
    statistics_fn: Callable[[Params, Float[Array, "b *d"]], Statistics] | None,
    known_statistics_fn: Callable[[Observation], Statistics] | None = None,
    num_seeds: int = NUM_SEEDS,
    consensus_fn: ConsensusFn | None = None,
    num_steps: int = NUM_STEPS,
    num_warm_up_steps: int = 50,
    learning_rate: Scalar = 0.1,
    match_weight: Scalar = 1e-3,
    total_variation_weight: Scalar = 1e-4,
    norm_weight: Scalar = 1e-6,
    statistics_weight: Scalar = 0.1,
    consistency_weight: Scalar = 0.01,
    noise_scale: Scalar = 0.2,
    bounds: tuple[Float[ArrayLike, "..."], Float[ArrayLike, "..."]] | None = None,
    label_fn: LabelFn | None = None,
    init_fn: InitFn | None = None,
    objective_fn: ObjectiveFn = layerwise_euclidean,
    optimizer: optax.GradientTransformation | None = None,
) -> Attack:
    """Builds the GradInversion attack, which finds batches of images by seeds that agree, and whose gradient and
    feature statistics are the client's:

        x_s* = argmin  alpha_G D(d loss(x_s, y) / d theta, update)
                       + alpha_TV TV(x_s) + alpha_l2 |x_s|^2 + alpha_BN R_BN(x_s) + alpha_group |x_s - E(x)|

    The seeds s are searched all at once, by Adam with a warm-up and a cosine decay of its rate. After each update the
    pixels get noise of standard deviation `noise_scale` times that rate. A weight of 0 takes a term out, and
    `consensus_fn` chooses E. The paper's ablation is four of these: the gradient alone, with the three terms of
    fidelity, with the group's plain `mean`, and with its `registered_mean()`.

    Threat model: an honest-but-curious server that knows the parameters, the update and the size of the batch, and
    feature statistics of one of these kinds. Each kind is a threat model of its own, so say which it is beside every
    number:

    * exact: of the client's own batch, granted in the observation (`ThreatModel(statistics="exact")`);
    * inferred: computed by `gia_jax.models.inferred_statistics` from the running statistics before and after a client's
      one step in training mode, for a server that is sent both (`ThreatModel(statistics="inferred")`). They are to be
      matched by `batch_norm_inputs(module, batch_norm="training")`;
    * running: those of the model, which `known_statistics_fn` reads by `gia_jax.models.running_statistics`;
    * proxy: of images of the attacker's own, for which `known_statistics_fn` calls `statistics_fn`.

    Labels are read by `column_minimum`, which is right for distinct labels only. The order of the labels is what makes
    the images of two seeds comparable, so labels that are known must be distinct as well.

    Departures: the total variation is the mean over pixels and the norm the mean of x^2 / 2, so that they do not grow
    with the images. The statistics of the first layer weigh ten times as much (as in the authors' DeepInversion), which
    the paper does not say. Registration is a circular shift (see `registered_mean`), and takes place at every step from
    the first on. The weights are the authors', for ResNet-50 and images of 224 pixels. For other models and sizes
    choose them on images of your own.

    Args:
        client_fn: Client function `(params, batch) -> update` that the attacker assumes.
        classifier_fn: Function `(update) -> Dense` that picks the last layer, such as `gia_jax.labels.dense("head")`.
        statistics_fn: Function `(params, inputs) -> statistics` that computes feature statistics, made by
            `gia_jax.models.batch_norm_inputs`. None is for a model without batch normalisation and leaves that term
            out.
        known_statistics_fn: Function `(observation) -> statistics` that reads the statistics to match. By default it
            takes those that the threat model grants.
        num_seeds: Number of seeds that run together, at least 1.
        consensus_fn: Function E that maps the inputs of all seeds, shape (s, b, h, w, c), to one batch. By default it
            is `registered_mean()`.
        num_steps: Number of steps that the learning rate's schedule is made for, more than `num_warm_up_steps`.
        num_warm_up_steps: Number of steps in which the rate rises from 0, at least 0.
        learning_rate: Highest learning rate of Adam, above 0 and finite.
        match_weight: Weight alpha_G of the distance of gradients, above 0 and finite.
        total_variation_weight: Weight alpha_TV of the total variation, at least 0 and finite.
        norm_weight: Weight alpha_l2 of the pixels' squared norm, at least 0 and finite.
        statistics_weight: Weight alpha_BN of the distance of feature statistics, at least 0 and finite.
        consistency_weight: Weight alpha_group of the distance from the consensus, at least 0 and finite.
        noise_scale: Standard deviation of the noise on the pixels, in units of the rate, at least 0 and finite.
        bounds: Darkest and brightest value of a pixel in the model's space. None means no box, as in the paper.
        label_fn: Function `(observation) -> labels` that the attacker uses to find the labels. By default it is
            `column_minimum(classifier_fn)`.
        init_fn: Function `(key, observation) -> images` that draws the first images of one seed. By default their
            pixels are standard normal.
        objective_fn: Function D `(simulated, observed) -> distance` that compares two updates. By default it is the sum
            over layers of the L2 distances.
        optimizer: Optimiser that replaces the paper's, together with its noise.

    Returns:
        The attack. Its candidate has a leading axis of seeds. Its reconstruction is that of the lowest loss, and the
        losses of all seeds are in `restart_losses`. Its `init` raises ValueError for labels that are known not to be
        distinct, and its first step for statistics that do not fit the model's.

    Raises:
        ValueError: If a count is not an integer in its range, no steps are left after the warm-up, a rate or weight is
            out of its range or not finite, or the bounds are in the wrong order.

    Examples:
        The labels are read from the gradient, and each of the two seeds has a loss:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, labels, observe, run
        >>> def apply_fn(params, inputs):
        ...     return inputs.reshape(len(inputs), -1) @ params["head"]["kernel"]
        >>> client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
        >>> batch = Batch(jnp.eye(2, 4).reshape(2, 2, 2, 1), jnp.array([2, 0]))
        >>> seen = observe(jax.random.key(0), ThreatModel(), client_fn, {"head": {"kernel": jnp.zeros((4, 3))}}, batch)
        >>> settings = {"statistics_fn": None, "num_seeds": 2, "num_steps": 2, "num_warm_up_steps": 0}
        >>> attack = attacks.grad_inversion(client_fn, labels.dense("head"), **settings)
        >>> solve = jax.jit(lambda key: run(attack, key, seen, num_steps=2)[0])
        >>> found = solve(jax.random.key(1))
        >>> sorted(found.batch.labels.tolist()), found.restart_losses.shape
        ([0, 2], (2,))
    """
    _check.integer(num_seeds=num_seeds, num_steps=num_steps)
    _check.integer(0, num_warm_up_steps=num_warm_up_steps)
    _check.positive(learning_rate=learning_rate, match_weight=match_weight)
    weights = {
        "total_variation_weight": total_variation_weight,
        "norm_weight": norm_weight,
        "statistics_weight": statistics_weight,
        "consistency_weight": consistency_weight,
        "noise_scale": noise_scale,
    }
    _check.not_negative(**weights)
    for name, value in {"learning_rate": learning_rate, "match_weight": match_weight, **weights}.items():
        _check.finite(name, value)
    if num_steps <= num_warm_up_steps:
        raise ValueError(f"num_steps must be above num_warm_up_steps={num_warm_up_steps}, got {num_steps}")
    weighted: list[tuple[Scalar, PriorFn]] = [
        (total_variation_weight, priors.total_variation()),
        (norm_weight, priors.norm()),
        (consistency_weight, consistency),
    ]
    if statistics_fn is not None:
        weighted.append((statistics_weight, priors.batch_norm_statistics(statistics_fn, known_statistics_fn)))
    share = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, num_warm_up_steps, num_steps
    )  # share of the rate, which may be traced
    noise = langevin_noise(lambda count: noise_scale * learning_rate * share(count))
    paper = optax.chain(optax.adam(lambda count: learning_rate * share(count)), noise)
    one_seed = gradient_matching(
        client_fn,
        init_fn=normal() if init_fn is None else init_fn,
        objective_fn=lambda simulated, observed: match_weight * objective_fn(simulated, observed),
        prior_fn=priors.combine(*weighted),
        label_fn=column_minimum(classifier_fn) if label_fn is None else label_fn,
        project_fn=None if bounds is None else box(*bounds),
        optimizer=paper if optimizer is None else optimizer,
    )
    group = together(one_seed, num_seeds, registered_mean() if consensus_fn is None else consensus_fn)

    def init(key: PRNGKeyArray, observation: Observation) -> AttackState:
        state = group.init(key, observation)
        _check_distinct(jax.tree.map(lambda leaf: leaf[0], state.candidate.labels))
        return state

    return group._replace(init=init, num_steps=num_steps if optimizer is None else None)


def _check_distinct(labels: Any) -> None:
    """Raises ValueError for concrete class indices of which two are the same."""
    are_classes = isinstance(labels, jax.Array) and labels.ndim == 1 and jnp.issubdtype(labels.dtype, jnp.integer)
    if are_classes and _check.is_concrete(labels) and len(np.unique(labels)) < len(labels):
        raise ValueError(f"labels must be distinct, or seeds order their images differently, got {labels.tolist()}")
