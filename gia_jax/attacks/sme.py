"""SME, which takes many local steps for one gradient.

Zhu, Yao, Blaschko, Surrogate Model Extension (SME): A Fast and Accurate Weight Update Attack on Federated Learning,
ICML 2023.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from gia_jax import _check
from gia_jax.base import (
    Attack,
    Batch,
    ClientFn,
    InitFn,
    LabelFn,
    ObjectiveFn,
    Observation,
    Params,
    Scalar,
    Updates,
)
from gia_jax.clients.unknown import UnknownClient
from gia_jax.matching import priors
from gia_jax.matching.initializations import normal
from gia_jax.matching.objectives import cosine, cosine_residuals
from gia_jax.matching.optimizers import step_schedule
from gia_jax.matching.solver import Unknowns, box, gradient_matching
from gia_jax.precision import cast_like, wide_dtype, widened_tree
from gia_jax.threat import granted_labels

NUM_STEPS = 1_000
Bounds = tuple[Float[ArrayLike, "..."], Float[ArrayLike, "..."]]


def sme(
    client_fn: ClientFn,
    *,
    scale: Scalar,
    bounds: Bounds | None = None,
    num_steps: int = NUM_STEPS,
    learning_rate: Scalar = 1.0,
    alpha: Scalar = 0.5,
    alpha_learning_rate: Scalar = 1e-3,
    total_variation_weight: Scalar = 1e-2,
    label_fn: LabelFn = granted_labels,
    init_fn: InitFn | None = None,
    objective_fn: ObjectiveFn = cosine,
) -> Attack:
    """Builds the SME attack, which takes the whole change of a client's parameters for one gradient of its loss, at a
    surrogate model between the parameters before and after:

        x*, alpha* = argmin over x and 0 <= alpha <= 1 of
                     D(grad loss((1 - alpha) theta_0 + alpha theta_T; x), theta_0 - theta_T) + lambda TV(x)

    Both are searched for by Adam, each with a learning rate of its own, which is ten times lower after each of 3/8, 5/8
    and 7/8 of the steps. No local step is simulated: a step costs one gradient of the whole batch, whatever the number
    of local steps. The surrogate is exact for one local step (alpha = 0), and where the local gradients change along a
    line, as for a loss that is quadratic in the parameters with equal curvature in the directions that move.

    Threat model: an honest-but-curious server that knows the parameters before and after the local training, the
    number of examples and the labels. It knows neither the local learning rate, nor the number of steps, nor their
    minibatches. An observation holds the update u = (theta_0 - theta_T) / scale, so the server's own `scale` leads back
    to theta_T. It is the number that the change was divided by: the number of steps times the learning rate for
    `federated_averaging` and `interop.pseudo_gradient`, or the `divisor`. Nothing else uses it. For an update that was
    divided by a number that is not known, give an upper bound of it: alpha is then smaller by the same factor.

    Args:
        client_fn: Client of one step on the whole batch, `federated_sgd` of the client's loss.
        scale: Number that times the observed update is the change theta_0 - theta_T, above 0 and finite.
        bounds: Darkest and brightest value of a pixel in the model's space. None means no box.
        num_steps: Number of steps that the schedules are made for, at least 1.
        learning_rate: First learning rate of the inputs, above 0 and finite.
        alpha: First place of the surrogate between the parameters before (0) and after (1).
        alpha_learning_rate: First learning rate of alpha, at least 0 and finite. With 0 alpha stays where it is.
        total_variation_weight: Weight lambda of the total variation, at least 0 and finite. With 0 the inputs need not
            be images.
        label_fn: Function `(observation) -> labels` that the attacker uses to find the labels. By default it takes
            those that the threat model grants.
        init_fn: Function `(key, observation) -> inputs` that draws the first dummy inputs. By default they are standard
            normal.
        objective_fn: Function D `(simulated, observed) -> distance` that compares two updates. By default it is the
            paper's cosine distance, which does not depend on the scale.

    Returns:
        The attack. Its reconstruction's `client` is {"alpha": the place that it found}.

    Raises:
        ValueError: If `scale` or a learning rate is out of its range, `alpha` is not in [0, 1], a weight is negative or
            not finite, `num_steps` is no positive integer, or the bounds are in the wrong order.

    Examples:
        The client took two steps. The attack simulates none:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, observe, run
        >>> loss_fn = clients.cross_entropy(lambda params, x: x.reshape(len(x), -1) @ params["kernel"])
        >>> victim_fn = jax.jit(clients.federated_averaging(loss_fn, learning_rate=0.1, local_epochs=2))
        >>> batch = Batch(jnp.full((1, 2, 2, 1), 0.5), jnp.array([2]))
        >>> seen = observe(jax.random.key(0), ThreatModel(labels=True), victim_fn, {"kernel": jnp.eye(4, 3)}, batch)
        >>> attack = attacks.sme(clients.federated_sgd(loss_fn), scale=2 * 0.1, bounds=(0.0, 1.0), num_steps=3)
        >>> found = jax.jit(lambda key: run(attack, key, seen)[0])(jax.random.key(1))
        >>> found.batch.inputs.shape, bool(0 <= found.client["alpha"] <= 1)
        ((1, 2, 2, 1), True)
    """
    check_alpha(alpha)

    def surrogate_fn(unknowns: PyTree[Array], params: Params, change: Updates) -> Params:
        return jax.tree.map(lambda p, c: p - unknowns["alpha"] * c, params, change)

    def first_fn(observation: Observation) -> PyTree[Array]:
        return {"alpha": jnp.asarray(alpha, update_dtype(observation))}

    return surrogate_attack(
        client_fn,
        scale=scale,
        surrogate_fn=surrogate_fn,
        first_fn=first_fn,
        report_fn=lambda unknowns: unknowns,
        bounds=bounds,
        num_steps=num_steps,
        learning_rates={"data": learning_rate, "alpha": alpha_learning_rate},
        total_variation_weight=total_variation_weight,
        label_fn=label_fn,
        init_fn=init_fn,
        objective_fn=objective_fn,
    )


def surrogate_attack(
    client_fn: ClientFn,
    *,
    scale: Scalar,
    surrogate_fn: Callable[[PyTree[Array], Params, Updates], Params],
    first_fn: Callable[[Observation], dict[str, PyTree[Array]]],
    report_fn: Callable[[PyTree[Array]], PyTree[Array]],
    bounds: Bounds | None,
    num_steps: int,
    learning_rates: dict[str, Scalar],
    total_variation_weight: Scalar,
    label_fn: LabelFn,
    init_fn: InitFn | None,
    objective_fn: ObjectiveFn,
    penalty_fn: Callable[[PyTree[Array]], Float[Array, ""]] | None = None,
) -> Attack:
    """Builds an attack that matches an update as one gradient at a surrogate model, whose unknowns it searches for.

    Args:
        client_fn: Client of one step on the whole batch.
        scale: Number that times the observed update is the change theta_0 - theta_T, above 0 and finite.
        surrogate_fn: Function `(unknowns, theta_0, theta_0 - theta_T) -> parameters` of the surrogate model.
        first_fn: Function `(observation) -> unknowns`, a dict. "alpha" among them stays in [0, 1].
        report_fn: Function of the unknowns that returns what is reported of them.
        bounds: Darkest and brightest value of a pixel, or None.
        num_steps: Number of steps that the schedules are made for.
        learning_rates: First learning rate of the inputs, "data", and of each of the unknowns by name.
        total_variation_weight: Weight of the total variation.
        label_fn: Function that finds the labels.
        init_fn: Function that draws the first inputs; None draws them from the standard normal distribution.
        objective_fn: Function that compares two updates.
        penalty_fn: Penalty of the unknowns, or None.

    Returns:
        The attack.

    Raises:
        ValueError: As `sme` does.
    """
    _check.scalar(scale=scale)
    _check.positive(scale=scale, learning_rate=learning_rates["data"])
    _check.finite("scale", scale)
    for name, rate in learning_rates.items():
        _check.weight(**{"learning_rate" if name == "data" else f"{name}_learning_rate": rate})
    _check.integer(num_steps=num_steps)
    _check.weight(total_variation_weight=total_variation_weight)
    if bounds is not None:
        _check.limits("bounds", bounds)

    def client_at(unknowns: PyTree[Array], observation: Observation) -> ClientFn:
        change = jax.tree.map(lambda u: scale * u, widened_tree(observation.update))

        def at_surrogate_fn(params: Params, batch: Batch) -> Updates:
            return client_fn(cast_like(surrogate_fn(unknowns, widened_tree(params), change), params), batch)

        return at_surrogate_fn

    def project_fn(unknowns: dict[str, PyTree[Array]]) -> dict[str, PyTree[Array]]:
        return {**unknowns, "alpha": jnp.clip(unknowns["alpha"], 0, 1)}

    surrogate = UnknownClient(
        client_fn,
        init_fn=lambda key, observation: first_fn(observation),
        client_fn=client_at,
        report_fn=report_fn,
        project_fn=project_fn,
        penalty_fn=penalty_fn,
    )
    variation = None if _check.is_zero(total_variation_weight) else priors.total_variation()
    own = {name: name for name in learning_rates if name != "data"}
    attack = gradient_matching(
        surrogate,
        init_fn=normal() if init_fn is None else init_fn,
        objective_fn=objective_fn,
        prior_fn=None if variation is None else priors.combine((total_variation_weight, variation)),
        label_fn=label_fn,
        project_fn=None if bounds is None else box(*bounds),
        optimizer=optax.partition(
            {name: _adam(rate, num_steps) for name, rate in learning_rates.items()}, Unknowns("data", own)
        ),
        residual_fn=cosine_residuals,
    )
    return attack._replace(num_steps=num_steps)


def check_alpha(alpha: Scalar) -> None:
    """Raises ValueError for a place of the surrogate that is known not to be from 0 to 1."""
    _check.weight(alpha=alpha)
    if _check.is_concrete(alpha) and alpha > 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")


def _adam(rate: Scalar, num_steps: int) -> optax.GradientTransformation:
    """Builds Adam with the steps of Inverting Gradients, or nothing that moves for a rate of 0."""
    return optax.set_to_zero() if _check.is_zero(rate) else optax.adam(step_schedule(rate, num_steps))


def update_dtype(observation: Observation) -> jnp.dtype:
    """Returns the type in which the unknowns of a surrogate are searched for: that of the update, float32 or wider."""
    return wide_dtype(jnp.result_type(*jax.tree.leaves(observation.update)))
