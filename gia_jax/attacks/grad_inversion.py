"""GradInversion: Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov, See through Gradients, CVPR 2021."""

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
    learning_rate: float = 0.1,
    match_weight: float = 1e-3,
    total_variation_weight: float = 1e-4,
    norm_weight: float = 1e-6,
    statistics_weight: float = 0.1,
    consistency_weight: float = 0.01,
    noise_scale: float = 0.2,
    bounds: tuple[Float[ArrayLike, "..."], Float[ArrayLike, "..."]] | None = None,
    label_fn: LabelFn | None = None,
    init_fn: InitFn | None = None,
    objective_fn: ObjectiveFn = layerwise_euclidean,
    optimizer: optax.GradientTransformation | None = None,
) -> Attack:
    """Batches of images, by seeds that agree, whose gradient and feature statistics are the client's:

        x_s* = argmin  alpha_G D(d loss(x_s, y) / d theta, update)
                       + alpha_TV TV(x_s) + alpha_l2 |x_s|^2 + alpha_BN R_BN(x_s) + alpha_group |x_s - E(x)|

    for all seeds s at once, by Adam with a warm-up and a cosine decay of its rate; after each update the pixels get
    noise of standard deviation `noise_scale` times that rate. A weight of 0 takes a term out, and `consensus_fn`
    chooses E. The paper's ablation is four of these: the gradient alone, with the three terms of fidelity, with the
    group's plain `mean`, and with its `registered_mean()`.

    Threat model: an honest-but-curious server that knows the parameters, the update and the size of the batch, and
    feature statistics of one of these kinds, which are threat models of their own; say which beside every number:

    * exact: of the client's own batch, granted in the observation (`ThreatModel(statistics="exact")`);
    * inferred: computed by `gia_jax.models.inferred_statistics` from the running statistics before and after a client's
      one step in training mode, for a server that is sent both (`ThreatModel(statistics="inferred")`): they are to be
      matched by `batch_norm_inputs(module, batch_norm="training")`;
    * running: those of the model, which `known_statistics_fn` reads by `gia_jax.models.running_statistics`;
    * proxy: of images of the attacker's own, for which `known_statistics_fn` calls `statistics_fn`.

    Labels are read by `column_minimum`, which is right for distinct labels only. The order of the labels is what makes
    the images of two seeds comparable, so labels that are known must be distinct as well.

    Departures: the total variation is the mean over pixels and the norm the mean of x^2 / 2, so that they do not grow
    with the images; the statistics of the first layer weigh ten times (as in the authors' DeepInversion), which the
    paper does not say; registration is a circular shift (see `registered_mean`) and starts at once, every step. The
    weights are the authors', for ResNet-50 and images of 224 pixels; for other models and sizes choose them on images
    of one's own.

    Args:
        client_fn: The client the attacker assumes.
        classifier_fn: Picks the last layer, such as `gia_jax.labels.dense("head")`.
        statistics_fn: `(params, inputs) -> ` statistics of the features, by `gia_jax.models.batch_norm_inputs`; None
            for a model without batch normalisation, which leaves that term out.
        known_statistics_fn: Reads from the observation the statistics to match. Default: those the threat model grants.
        num_seeds: Seeds that run together, >= 1.
        consensus_fn: E, from the inputs of all seeds (s, b, h, w, c) to one batch. Default: `registered_mean()`.
        num_steps: Steps the schedule is made for, more than `num_warm_up_steps`.
        num_warm_up_steps: Steps in which the rate rises from 0, >= 0.
        learning_rate: Highest rate of Adam, > 0.
        match_weight: alpha_G, > 0.
        total_variation_weight: alpha_TV >= 0.
        norm_weight: alpha_l2 >= 0.
        statistics_weight: alpha_BN >= 0.
        consistency_weight: alpha_group >= 0.
        noise_scale: Standard deviation of the noise on the pixels, in units of the rate, >= 0.
        bounds: Darkest and brightest value of a pixel in the model's space; None for no box, as in the paper.
        label_fn: The label rule. Default: `column_minimum(classifier_fn)`.
        init_fn: Initialisation of one seed. Default: standard normal pixels.
        objective_fn: D. Default: the sum over layers of the L2 distances.
        optimizer: An optimiser in place of the paper's and of its noise.

    Returns:
        The attack; its candidate has a leading axis of seeds, its reconstruction is that of the lowest loss, and the
        losses of all are in `restart_losses`. Its `init` raises ValueError for labels that are known not to be
        distinct; its first step for statistics that do not fit the model's.

    Raises:
        ValueError: A count that is no integer in its range, no steps after the warm-up, a rate or weight that is out
            of its range or not finite, or bounds in the wrong order.
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
    weighted: list[tuple[float, PriorFn]] = [
        (total_variation_weight, priors.total_variation()),
        (norm_weight, priors.norm()),
        (consistency_weight, consistency),
    ]
    if statistics_fn is not None:
        weighted.append((statistics_weight, priors.batch_norm_statistics(statistics_fn, known_statistics_fn)))
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, num_warm_up_steps, num_steps)
    paper = optax.chain(optax.adam(rate), langevin_noise(lambda count: noise_scale * rate(count)))
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

    return group._replace(init=init)


def _check_distinct(labels: Any) -> None:
    are_classes = isinstance(labels, jax.Array) and labels.ndim == 1 and jnp.issubdtype(labels.dtype, jnp.integer)
    if are_classes and _check.is_concrete(labels) and len(np.unique(labels)) < len(labels):
        raise ValueError(f"labels must be distinct, or seeds order their images differently, got {labels.tolist()}")
