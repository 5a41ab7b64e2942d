"""Gradient matching: the one place where a client's gradient is differentiated with respect to dummy data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import (
    Attack,
    AttackInfo,
    AttackState,
    Batch,
    ClientFn,
    InitFn,
    LabelFn,
    ObjectiveFn,
    Observation,
    PriorFn,
    Reconstruction,
    Updates,
)
from gia_jax.matching.initializations import as_granted, granted_dtype, normal
from gia_jax.matching.objectives import euclidean, euclidean_residuals
from gia_jax.precision import widened_tree, widening
from gia_jax.threat import granted_labels


class Candidate(NamedTuple):
    """The unknowns, and the labels that the label rule gave, () where they are among the unknowns."""

    variables: PyTree[Array]
    labels: PyTree[Array]


def gradient_matching(
    client_fn: ClientFn,
    *,
    init_fn: InitFn | None = None,
    objective_fn: ObjectiveFn = euclidean,
    prior_fn: PriorFn | None = None,
    label_fn: LabelFn | None = granted_labels,
    decode_fn: Callable[[PyTree[Array], Any], Batch] = Batch,
    project_fn: Callable[[PyTree[Array]], PyTree[Array]] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    residual_fn: Callable[[Updates, Updates], Updates] = euclidean_residuals,
) -> Attack:
    """The attack that searches data whose update, by the client it assumes, looks like the observed one:

        min over z of  D(client(params, decode(z)), update) + prior(decode(z)).

    The unknowns, the updates that D compares, and the loss are float32 or wider. The client sees inputs in the type of
    the granted ones, or of the parameters where none are, and the reconstructed inputs have that type.

    Args:
        client_fn: What the attacker believes the client did; for a defended client, the defended `client_fn`.
        init_fn: `(key, observation) -> z`, the unknowns. Default: normal pixels.
        objective_fn: D, `(simulated, observed) -> ` scalar.
        prior_fn: `(batch, observation) -> ` scalar; None for none.
        label_fn: `(observation) -> labels`, called once in `init`; None where the labels are among the unknowns.
            Default: the labels the threat model grants, whatever targets these are.
        decode_fn: `(z, labels) -> Batch`. Default: z are the inputs.
        project_fn: `z -> z` after every update, such as a box.
        optimizer: Optimiser of z. Default: Adam at 0.1. It is passed `key`, `value`, `grad`, `value_fn` and
            `residual_fn`.
        residual_fn: `(simulated, observed) -> ` tree whose sum of squares is D, for solvers of least squares.

    Returns:
        The attack. Its `init` raises ValueError where the observation's update does not fit its parameters, a grant is
        missing, or granted inputs are integers.
    """
    init_fn = normal() if init_fn is None else init_fn
    optimizer = optax.with_extra_args_support(optax.adam(0.1) if optimizer is None else optimizer)
    objective_fn, residual_fn = widening(objective_fn), widening(residual_fn)

    def simulated(batch: Batch, observation: Observation) -> Updates:
        return client_fn(observation.params, batch._replace(inputs=as_granted(batch.inputs, observation)))

    def losses(variables: PyTree[Array], labels: Any, observation: Observation) -> tuple[Array, Array]:
        batch = decode_fn(variables, labels)
        match = objective_fn(simulated(batch, observation), observation.update)
        loss = match if prior_fn is None else match + prior_fn(batch, observation)
        return loss, match

    def init(key: PRNGKeyArray, observation: Observation) -> AttackState:
        _check.same_structure("update", observation.update, "params", observation.params)
        granted_dtype(observation)  # refuses integers
        variables = widened_tree(init_fn(key, observation))
        labels = () if label_fn is None else label_fn(observation)
        return AttackState(Candidate(variables, labels), optimizer.init(variables))

    def step(key: PRNGKeyArray, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
        (variables, labels), opt_state = state

        def loss_fn(z: PyTree[Array]) -> tuple[Array, Array]:
            return losses(z, labels, observation)

        def value_fn(z: PyTree[Array], key: Any = None, residual_fn: Any = None) -> Array:
            del key, residual_fn  # optax's line search passes on all that it was passed, and refuses what is not taken
            return loss_fn(z)[0]

        def residuals(z: PyTree[Array]) -> Updates:
            return residual_fn(simulated(decode_fn(z, labels), observation), observation.update)

        (loss, match), grad = jax.value_and_grad(loss_fn, has_aux=True)(variables)
        updates, opt_state = optimizer.update(
            grad,
            opt_state,
            variables,
            key=key,
            value=loss,
            grad=grad,
            value_fn=value_fn,
            residual_fn=residuals,
        )
        variables = optax.apply_updates(variables, updates)
        variables = variables if project_fn is None else project_fn(variables)
        info = AttackInfo(loss, match, optax.tree.norm(grad))
        return AttackState(Candidate(variables, labels), opt_state), info

    def finalize(candidate: Candidate, observation: Observation) -> Reconstruction:
        loss, _ = losses(*candidate, observation)
        batch = decode_fn(*candidate)
        batch = batch._replace(inputs=as_granted(batch.inputs, observation))
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(batch)]
        return Reconstruction(batch, loss, jnp.isfinite(loss) & jnp.all(jnp.stack(finite)))

    return Attack(init, step, finalize)


def box(low: Float[ArrayLike, "..."], high: Float[ArrayLike, "..."]) -> Callable[[Array], Array]:
    """The projection onto pixels between `low` and `high`, numbers or arrays that broadcast (one a channel).

    Raises:
        ValueError: A concrete `low` that is not below `high`, or a NaN.
    """
    if _check.is_concrete((low, high)):
        lows, highs = np.broadcast_arrays(np.asarray(low), np.asarray(high))
        wrong = ~(lows < highs)  # NaN as well
        if np.any(wrong):
            raise ValueError(f"low must be below high={highs[wrong].flat[0]}, got {lows[wrong].flat[0]}")
    return lambda inputs: optax.projections.projection_box(inputs, low, high).astype(inputs.dtype)
