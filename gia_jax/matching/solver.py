"""Gradient matching: the search for data whose simulated update is close to the observed one."""

import functools
import operator
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
    DecodeFn,
    InitFn,
    LabelFn,
    ObjectiveFn,
    Observation,
    PriorFn,
    ProjectFn,
    Reconstruction,
    Updates,
)
from gia_jax.clients.unknown import UnknownClient
from gia_jax.matching.initializations import as_granted, granted_dtype, normal
from gia_jax.matching.objectives import euclidean, euclidean_residuals
from gia_jax.precision import widened_tree, widening
from gia_jax.threat import granted_labels


class Unknowns(NamedTuple):
    """The unknowns of an attack that searches for something of the client as well, by an `UnknownClient`.

    Attributes:
        data: Unknowns of the data, a tree of arrays.
        client: Unknowns of the client, a tree of arrays.
    """

    data: PyTree[Array]
    client: PyTree[Array]


class Candidate(NamedTuple):
    """The point that a gradient-matching attack has reached.

    Attributes:
        variables: Unknowns that the attack optimises, a tree of arrays.
        labels: Labels that the label rule returned. It is the empty tuple where labels are among the unknowns.
    """

    variables: PyTree[Array]
    labels: PyTree[Array]


def gradient_matching(
    client_fn: ClientFn,
    *,
    init_fn: InitFn | None = None,
    objective_fn: ObjectiveFn = euclidean,
    prior_fn: PriorFn | None = None,
    label_fn: LabelFn | None = granted_labels,
    decode_fn: DecodeFn = Batch,
    project_fn: ProjectFn | None = None,
    optimizer: optax.GradientTransformation | None = None,
    residual_fn: Callable[[Updates, Updates], Updates] = euclidean_residuals,
) -> Attack:
    """Builds an attack that searches for data whose simulated update is close to the observed one.

    With unknowns z, an objective D and a prior, it minimises

        D(client(params, decode(z)), update) + prior(decode(z))  over z.

    The unknowns, the updates that D compares, and the loss are float32 or wider. The client sees inputs of the type of
    `extra["inputs_like"]`, or of the parameters where that is not granted, and the reconstructed inputs have that type.

    Args:
        client_fn: Client that the attacker assumes, a function `(params, batch) -> update`. To attack a defended
            client with knowledge of its defense, pass the defended one. With a `clients.UnknownClient` the attack also
            searches for what is unknown of the client: the unknowns are then `Unknowns(data, client)`, of which all
            arguments below but the optimizer see those of the data.
        init_fn: Function `(key, observation) -> z` that returns the first unknowns. By default every input is drawn
            from the standard normal distribution.
        objective_fn: Objective D, a function `(simulated, observed) -> distance` of two updates that returns a scalar.
        prior_fn: Function `(batch, observation) -> penalty` that returns a scalar, which is added to the objective.
            None adds nothing.
        label_fn: Function `(observation) -> labels` by which the attacker finds the labels, called once in `init`. By
            default it is given the labels by the threat model. None is for labels that are among the unknowns.
        decode_fn: Function `(z, labels) -> Batch` that makes the dummy batch from the unknowns. By default z is the
            array of inputs.
        project_fn: Function `z -> z` that is applied to the unknowns after every step, such as `box`. None leaves them
            as they are.
        optimizer: Optimizer of z. By default it is Adam with a learning rate of 0.1. Its `update` is also passed `key`,
            `value`, `grad`, `value_fn` and `residual_fn`, for optimizers that take them.
        residual_fn: Function `(simulated, observed) -> residuals` that returns a tree whose sum of squares is D. Only
            least-squares solvers, such as `matching.levenberg_marquardt`, use it.

    Returns:
        The attack. Its `init` raises ValueError if the observation's update does not fit its parameters, the threat
        model does not grant what a part of the attack needs, the granted inputs are integers, `decode_fn` returns no
        batch of their shape, or `project_fn` no unknowns of the shape that it was given.

    Raises:
        ValueError: If an argument that must be a function is none.

    Examples:
        The simulated gradient comes closer to the observed one with every step:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, clients, gradient_matching, observe, run
        >>> def apply_fn(params, inputs):
        ...     return inputs @ params["kernel"]
        >>> client_fn = jax.jit(clients.federated_sgd(clients.squared_error(apply_fn)))
        >>> params, batch = {"kernel": jnp.eye(2)}, Batch(jnp.array([[1.0, -1.0]]), jnp.zeros((1, 2)))
        >>> observation = observe(jax.random.key(0), ThreatModel(labels=True), client_fn, params, batch)
        >>> attack = gradient_matching(client_fn)
        >>> attack_fn = jax.jit(lambda key: run(attack, key, observation, num_steps=3))
        >>> reconstruction, info = attack_fn(jax.random.key(1))
        >>> info.match.shape, bool(info.match[2] < info.match[0])
        ((3,), True)
    """
    _check.functions(init_fn=init_fn, prior_fn=prior_fn, label_fn=label_fn, decode_fn=decode_fn, project_fn=project_fn)
    init_fn = normal() if init_fn is None else init_fn
    unknown = client_fn if isinstance(client_fn, UnknownClient) else None
    if unknown is not None:
        init_fn, decode_fn, project_fn = _of_both(unknown, init_fn, decode_fn, project_fn)
    optimizer = optax.with_extra_args_support(optax.adam(0.1) if optimizer is None else optimizer)
    objective_fn, residual_fn = widening(objective_fn), widening(residual_fn)

    def simulated(variables: PyTree[Array], batch: Batch, observation: Observation) -> Updates:
        own_fn = client_fn if unknown is None else unknown.client_fn(variables.client, observation)
        return own_fn(observation.params, batch._replace(inputs=as_granted(batch.inputs, observation)))

    def losses(variables: PyTree[Array], labels: Any, observation: Observation) -> tuple[Array, Array]:
        batch = decode_fn(variables, labels)
        match = objective_fn(simulated(variables, batch, observation), observation.update)
        terms = {"objective_fn": match}
        if prior_fn is not None:
            terms["prior_fn"] = prior_fn(batch, observation)
        if unknown is not None and unknown.penalty_fn is not None:
            terms["penalty_fn"] = unknown.penalty_fn(variables.client)
        for name, value in terms.items():
            if jnp.shape(value) != ():
                raise ValueError(f"{name} must return a scalar, got an array of shape {jnp.shape(value)}")
        return functools.reduce(operator.add, terms.values()), match

    def init(key: PRNGKeyArray, observation: Observation) -> AttackState:
        _check.same_structure("update", observation.update, "params", observation.params)
        granted_dtype(observation)  # refuses integers
        variables = widened_tree(init_fn(key, observation))
        labels = () if label_fn is None else label_fn(observation)
        _check_parts(variables, labels, observation)
        return AttackState(Candidate(variables, labels), optimizer.init(variables))

    def _check_parts(variables: PyTree[Array], labels: Any, observation: Observation) -> None:
        batch = jax.eval_shape(lambda z: decode_fn(z, labels), variables)
        if not isinstance(batch, Batch):
            raise ValueError(f"decode_fn must return a Batch, got {_check.brief(batch)}")
        like = observation.extra.get("inputs_like")
        if like is not None and jax.tree.structure(like) == jax.tree.structure(batch.inputs):
            _check.same_structure("decode_fn(...).inputs", batch.inputs, "the granted inputs", like)
        if project_fn is not None:
            projected = jax.eval_shape(project_fn, variables)
            if jax.tree.structure(projected) != jax.tree.structure(variables):
                raise ValueError(f"project_fn must return unknowns like those it takes, got {_check.brief(projected)}")
            _check.same_structure("project_fn(...)", projected, "the unknowns", variables)
            for before, after in zip(jax.tree.leaves(variables), jax.tree.leaves(projected), strict=True):
                if before.dtype != after.dtype:
                    raise ValueError(f"project_fn must keep the type {before.dtype} of the unknowns, got {after.dtype}")

    def step(key: PRNGKeyArray, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
        (variables, labels), opt_state = state

        def loss_fn(z: PyTree[Array]) -> tuple[Array, Array]:
            return losses(z, labels, observation)

        def value_fn(z: PyTree[Array], key: Any = None, residual_fn: Any = None) -> Array:
            del key, residual_fn  # optax's line search passes on all that it was passed, and refuses what is not taken
            return loss_fn(z)[0]

        def residuals(z: PyTree[Array]) -> Updates:
            return residual_fn(simulated(z, decode_fn(z, labels), observation), observation.update)

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
        found = () if unknown is None else unknown.report_fn(candidate.variables.client)
        return Reconstruction(batch, loss, jnp.isfinite(loss) & jnp.all(jnp.stack(finite)), client=found)

    return Attack(init, step, finalize)


def _of_both(
    unknown: UnknownClient, init_fn: InitFn, decode_fn: DecodeFn, project_fn: ProjectFn | None
) -> tuple[InitFn, DecodeFn, ProjectFn]:
    """Returns the functions of the unknowns of the data as functions of those of the data and the client."""

    def init_both(key: PRNGKeyArray, observation: Observation) -> Unknowns:
        return Unknowns(init_fn(key, observation), unknown.init_fn(jax.random.fold_in(key, 1), observation))

    def project_both(variables: Unknowns) -> Unknowns:
        pairs = zip((project_fn, unknown.project_fn), variables, strict=True)
        return Unknowns(*(part if project is None else project(part) for project, part in pairs))

    return init_both, lambda variables, labels: decode_fn(variables.data, labels), project_both


def box(low: Float[ArrayLike, "..."], high: Float[ArrayLike, "..."]) -> ProjectFn:
    """Builds the projection of inputs onto a box: every entry, of every array of a tree, is clipped to its bounds.

    Args:
        low: Lower bound in the units of the model's inputs, a number or an array that broadcasts to them, such as one
            number for each channel.
        high: Upper bound above `low`, a number or an array of this kind.

    Returns:
        The projection, a function `inputs -> inputs`, for the `project_fn` of `gradient_matching`.

    Raises:
        ValueError: If a concrete `low` is not below `high`, or one of them holds a NaN.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax import box
        >>> box(0.0, 1.0)(jnp.array([-0.5, 0.25, 2.0])).tolist()
        [0.0, 0.25, 1.0]
    """
    if _check.is_concrete((low, high)):
        lows, highs = np.broadcast_arrays(np.asarray(low), np.asarray(high))
        wrong = ~(lows < highs)  # NaN as well
        if np.any(wrong):
            raise ValueError(f"low must be below high={highs[wrong].flat[0]}, got {lows[wrong].flat[0]}")

    def project_fn(inputs: PyTree[Array]) -> PyTree[Array]:
        return jax.tree.map(lambda leaf: jnp.clip(leaf, low, high).astype(leaf.dtype), inputs)

    return project_fn
