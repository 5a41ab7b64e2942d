"""Inverting Gradients: Geiping, Bauermeister, Droege, Moeller, Inverting Gradients, NeurIPS 2020."""

import optax
from jax.typing import ArrayLike
from jaxtyping import Float

from gia_jax import _check
from gia_jax.base import Attack, ClientFn, InitFn, LabelFn, ObjectiveFn
from gia_jax.matching import priors
from gia_jax.matching.initializations import normal
from gia_jax.matching.objectives import cosine, cosine_residuals
from gia_jax.matching.optimizers import step_schedule
from gia_jax.matching.solver import box, gradient_matching
from gia_jax.threat import granted_labels

NUM_STEPS = 4_800  # the authors' library; their command line runs 24,000


def inverting_gradients(
    client_fn: ClientFn,
    *,
    bounds: tuple[Float[ArrayLike, "..."], Float[ArrayLike, "..."]],
    num_steps: int = NUM_STEPS,
    total_variation_weight: float = 1e-2,
    label_fn: LabelFn = granted_labels,
    init_fn: InitFn | None = None,
    objective_fn: ObjectiveFn = cosine,
    optimizer: optax.GradientTransformation | None = None,
) -> Attack:
    """Images whose gradient has the direction of the observed one, and little total variation:

        x* = argmin over x in the pixel box of  1 - cos(d loss(x, y) / d theta, update) + alpha TV(x)       (equation 4)

    by Adam on the signs of the gradient, 0.1 a step and ten times less after 3/8, 5/8 and 7/8 of the steps.

    Threat model: an honest-but-curious server that knows the parameters, the update and the shape of the batch. The
    paper treats labels as known (they can be read from the gradient first: pass a rule of `gia_jax.labels`).

    Departures: alpha is 1e-2, the best of 1e-1, 1e-2, 1e-3 and 1e-4 for LeNet on 32 training images of CIFAR-10 (in
    benchmarks/results); the default of the authors' library is 1e-1, of their command line 1e-4. The optional median
    filter is left out.

    Args:
        client_fn: The client the attacker assumes.
        bounds: Darkest and brightest value of a pixel in the model's space, numbers or one a channel.
        num_steps: Steps the schedule is made for, >= 1.
        total_variation_weight: alpha >= 0.
        label_fn: Default: the labels the threat model grants.
        init_fn: Default: standard normal pixels.
        objective_fn: Default: the paper's; `gia_jax.matching.adaptive` has those for a defended client.
        optimizer: An optimiser in place of the paper's.

    Returns:
        The attack.

    Raises:
        ValueError: Bounds in the wrong order, a weight that is negative or not finite, or no steps.
    """
    _check.not_negative(total_variation_weight=total_variation_weight)
    _check.finite("total_variation_weight", total_variation_weight)
    paper = optax.chain(optax.scale_by_sign(), optax.adam(step_schedule(0.1, num_steps)))
    return gradient_matching(
        client_fn,
        init_fn=normal() if init_fn is None else init_fn,
        objective_fn=objective_fn,
        prior_fn=priors.combine((total_variation_weight, priors.total_variation())),
        label_fn=label_fn,
        project_fn=box(*bounds),
        optimizer=paper if optimizer is None else optimizer,
        residual_fn=cosine_residuals,
    )
