"""NL-SME, which is SME with a surrogate model on a curve.

Xia, Yu, Liu, Huang, Tang, Liu, Non-Linear Trajectory Modeling for Multi-Step Gradient Inversion Attacks in Federated
Learning, arXiv 2509.22082, 2025.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gia_jax import _check
from gia_jax.attacks.sme import NUM_STEPS, Bounds, check_alpha, surrogate_attack, update_dtype
from gia_jax.base import Attack, ClientFn, InitFn, LabelFn, ObjectiveFn, Observation, Params, Scalar, Updates
from gia_jax.matching.objectives import cosine
from gia_jax.threat import granted_labels


def nl_sme(
    client_fn: ClientFn,
    *,
    scale: Scalar,
    bounds: Bounds | None = None,
    num_steps: int = NUM_STEPS,
    learning_rate: Scalar = 1.0,
    alpha: Scalar = 0.5,
    alpha_learning_rate: Scalar = 1e-3,
    control_learning_rate: Scalar = 1e-3,
    control_weight: Scalar = 1e-2,
    total_variation_weight: Scalar = 1e-2,
    label_fn: LabelFn = granted_labels,
    init_fn: InitFn | None = None,
    objective_fn: ObjectiveFn = cosine,
) -> Attack:
    """Builds the NL-SME attack: `sme` with the surrogate model on a quadratic Bezier curve between the parameters,

        theta(alpha) = (1 - alpha)^2 theta_0 + 2 alpha (1 - alpha) p + alpha^2 theta_T,

    whose control point p is unknown as well, an array for each of the model's. It starts at the midpoint, where the
    curve is the line of SME at the same alpha. With d the root of the mean square of theta_0 - theta_T in an array,

        p = (theta_0 + theta_T) / 2 + d c,   and   control_weight * mean c^2

    is added to the loss. As many unknowns as parameters can match any update by a surrogate that has nothing to do with
    the client's path: a low loss is not a good reconstruction here, and the weight holds the curve near the line.

    Threat model: that of `sme`.

    Departures: the paper scales the control point by a vector of its own ("dvec") and has weights for it, which are not
    reproduced here. The scale d and the penalty above are this library's.

    Args:
        client_fn: Client of one step on the whole batch, `federated_sgd` of the client's loss.
        scale: Number that times the observed update is the change theta_0 - theta_T, above 0 and finite.
        bounds: Darkest and brightest value of a pixel in the model's space. None means no box.
        num_steps: Number of steps that the schedules are made for, at least 1.
        learning_rate: First learning rate of the inputs, above 0 and finite.
        alpha: First place of the surrogate on the curve, from the parameters before (0) to those after (1).
        alpha_learning_rate: First learning rate of alpha, at least 0 and finite. With 0 alpha stays where it is.
        control_learning_rate: First learning rate of c, at least 0 and finite. With 0 the curve stays a line.
        control_weight: Weight of the penalty of c, at least 0 and finite.
        total_variation_weight: Weight of the total variation, at least 0 and finite. With 0 the inputs need not be
            images.
        label_fn: Function `(observation) -> labels` that the attacker uses to find the labels. By default it takes
            those that the threat model grants.
        init_fn: Function `(key, observation) -> inputs` that draws the first dummy inputs. By default they are standard
            normal.
        objective_fn: Function `(simulated, observed) -> distance` that compares two updates. By default it is the
            cosine distance.

    Returns:
        The attack. Its reconstruction's `client` is {"alpha": the place that it found}.

    Raises:
        ValueError: If `scale` or a learning rate is out of its range, `alpha` is not in [0, 1], a weight is negative or
            not finite, `num_steps` is no positive integer, or the bounds are in the wrong order.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, observe, run
        >>> loss_fn = clients.cross_entropy(lambda params, x: x.reshape(len(x), -1) @ params["kernel"])
        >>> victim_fn = jax.jit(clients.federated_averaging(loss_fn, learning_rate=0.1, local_epochs=2))
        >>> batch = Batch(jnp.full((1, 2, 2, 1), 0.5), jnp.array([2]))
        >>> seen = observe(jax.random.key(0), ThreatModel(labels=True), victim_fn, {"kernel": jnp.eye(4, 3)}, batch)
        >>> attack = attacks.nl_sme(clients.federated_sgd(loss_fn), scale=2 * 0.1, bounds=(0.0, 1.0), num_steps=3)
        >>> found = jax.jit(lambda key: run(attack, key, seen)[0])(jax.random.key(1))
        >>> found.batch.inputs.shape, sorted(found.client)
        ((1, 2, 2, 1), ['alpha'])
    """
    _check.weight(control_weight=control_weight)
    check_alpha(alpha)

    def surrogate_fn(unknowns: PyTree[Array], params: Params, change: Updates) -> Params:
        t = unknowns["alpha"]

        def on_curve(p: Array, delta: Array, c: Array) -> Array:
            size = jnp.sqrt(jnp.mean(jnp.square(delta)))
            return p - t * delta + 2 * t * (1 - t) * size * c

        return jax.tree.map(on_curve, params, change, unknowns["control"])

    def first_fn(observation: Observation) -> dict[str, PyTree[Array]]:
        dtype = update_dtype(observation)
        control = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), observation.params)
        return {"alpha": jnp.asarray(alpha, dtype), "control": control}

    def penalty_fn(unknowns: PyTree[Array]) -> Float[Array, ""]:
        leaves = jax.tree.leaves(unknowns["control"])
        total = sum(jnp.sum(jnp.square(leaf)) for leaf in leaves)
        return control_weight * jnp.asarray(total) / sum(leaf.size for leaf in leaves)

    return surrogate_attack(
        client_fn,
        scale=scale,
        surrogate_fn=surrogate_fn,
        first_fn=first_fn,
        report_fn=lambda unknowns: {"alpha": unknowns["alpha"]},
        bounds=bounds,
        num_steps=num_steps,
        learning_rates={"data": learning_rate, "alpha": alpha_learning_rate, "control": control_learning_rate},
        total_variation_weight=total_variation_weight,
        label_fn=label_fn,
        init_fn=init_fn,
        objective_fn=objective_fn,
        penalty_fn=penalty_fn,
    )
