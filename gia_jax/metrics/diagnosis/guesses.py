"""What the assumed client sends for guesses: random inputs of the granted shape, to compare an update with."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray

from gia_jax import _check
from gia_jax._compile import RUN_ONCE
from gia_jax.base import Batch, ClientFn, Observation, Params, Updates
from gia_jax.labels import ClassifierFn
from gia_jax.metrics.diagnosis.arrays import named_leaves
from gia_jax.metrics.diagnosis.report import Diagnosis, add_notes
from gia_jax.models.functional import ApplyFn
from gia_jax.precision import is_floating

NUM_GUESSES = 4


def count_classes(observation: Observation, classifier_fn: ClassifierFn | None, apply_fn: ApplyFn | None) -> int | None:
    """Returns the number of classes of the last layer, or of the outputs; None where neither is known."""
    if classifier_fn is not None:
        return classifier_fn(observation.params).kernel.shape[1]
    like = observation.extra.get("inputs_like")
    if apply_fn is None or like is None:
        return None
    outputs = jax.eval_shape(apply_fn, observation.params, like)
    return outputs.shape[-1] if hasattr(outputs, "shape") else None


def guessed_updates(
    client_fn: ClientFn, observation: Observation, num_classes: int | None, key: PRNGKeyArray
) -> tuple[list[Updates], str | None]:
    """Returns updates of the assumed client on random inputs, or none and why."""
    like, what = observation.extra.get("inputs_like"), "the assumed client at guesses"
    if like is None:
        return [], f"{what}: the shape of the batch is not granted"
    if not is_floating(like):
        return [], f"{what}: the inputs are {like.dtype}"
    labels = observation.extra.get("labels")
    if labels is None and num_classes is None:
        return [], f"{what}: give num_classes, or classifier_fn"
    keys = jax.random.split(key, NUM_GUESSES)
    try:
        guesses = _simulated(client_fn, num_classes, observation.params, like, labels, keys)
        _check.same_structure("client_fn's update", guesses[0], "params", observation.params)
    except (ValueError, TypeError) as error:
        return [], f"{what}: client_fn says {error}"
    if not all(np.isfinite(leaf).all() for guess in guesses for leaf in named_leaves(guess).values()):
        return [], f"{what}: its updates are not finite"
    return guesses, None


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=RUN_ONCE)
def _simulated(
    client_fn: ClientFn, num_classes: int | None, params: Params, like: Array, labels: Any, keys: Key[Array, " n"]
) -> list[Updates]:
    """Returns the update of one guess for each key."""
    stacked = jax.lax.map(lambda key: client_fn(params, _guess(num_classes, like, labels, key)), keys)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(len(keys))]


def _guess(num_classes: int | None, like: Array, labels: Any, key: PRNGKeyArray) -> Batch:
    """Returns standard normal inputs with the labels granted, or with random ones."""
    key_inputs, key_labels = jax.random.split(key)
    if labels is None and num_classes is not None:
        labels = jax.random.randint(key_labels, like.shape[:1], 0, num_classes)
    return Batch(jax.random.normal(key_inputs, like.shape, like.dtype), labels)


def rank_facts(
    facts: Diagnosis,
    observation: Observation,
    client_fn: ClientFn,
    num_classes: int | None,
    key: PRNGKeyArray,
    budget: int,
) -> Diagnosis:
    """Adds the rank of the derivative of the shared entries by the inputs, at a guess."""
    size = (facts.num_unknowns or 0) * facts.num_parameters
    if size > budget:
        return add_notes(facts, [f"the rank of the derivative: {size:,} entries are more than rank_budget={budget:,}"])
    like, labels = observation.extra["inputs_like"], observation.extra.get("labels")
    try:
        derivative = _derivative(client_fn, num_classes, observation.params, like, labels, key)
    except (ValueError, TypeError) as error:
        return add_notes(facts, [f"the rank of the derivative: client_fn says {error}"])
    shown = np.concatenate([leaf.ravel() != 0 for leaf in named_leaves(observation.update).values()])
    values = np.linalg.svd(np.asarray(derivative, np.float64)[:, shown], compute_uv=False)
    return facts._replace(rank=int(np.sum(values > 30 * float(jnp.finfo(derivative.dtype).eps) * values[0])))


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=RUN_ONCE)
def _derivative(
    client_fn: ClientFn, num_classes: int | None, params: Params, like: Array, labels: Any, key: PRNGKeyArray
) -> Float[Array, "n p"]:
    """Returns the derivative of the update by each of the inputs at a guess."""
    guess = _guess(num_classes, like, labels, key)

    def update_of(inputs: Array) -> Array:
        update = client_fn(params, guess._replace(inputs=inputs.reshape(like.shape)))
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(update)])

    _, push = jax.linearize(update_of, guess.inputs.ravel())
    return jax.lax.map(push, jnp.eye(like.size, dtype=like.dtype))
