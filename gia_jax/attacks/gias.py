"""GIAS: Jeon, Kim, Lee, Oh, Ok, Gradient Inversion with Generative Image Prior, NeurIPS 2021."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import (
    Attack,
    AttackState,
    Batch,
    ClientFn,
    InitFn,
    LabelFn,
    ObjectiveFn,
    Observation,
    Params,
    WarmUp,
)
from gia_jax.lowering import lowered
from gia_jax.matching import priors
from gia_jax.matching.adaptive import supported
from gia_jax.matching.optimizers import step_schedule
from gia_jax.matching.run import best_start, from_starts, keep_best, warmed_up
from gia_jax.matching.solver import gradient_matching
from gia_jax.threat import granted, granted_labels

GeneratorFn = Callable[[Params, Float[Array, "b *z"]], Float[Array, "b *d"]]
NUM_LATENT_STEPS, NUM_STEPS = 1_000, 5_000  # the authors' library


class Generated(NamedTuple):
    """The unknowns of the parameter search.

    Attributes:
        latents: One latent for each image, shape (b, *z).
        parameters: Parameters of one generator for each image, leaves (b, ...).
    """

    latents: Float[Array, "b *z"]
    parameters: PyTree[Array]


def latent_search(
    client_fn: ClientFn,
    *,
    generator_fn: GeneratorFn,
    generator_params: Params,
    latent_shape: tuple[int, ...],
    num_steps: int = NUM_LATENT_STEPS,
    learning_rate: float = 3e-2,
    total_variation_weight: float = 1e-6,
    latent_weight: float = 0.0,
    label_fn: LabelFn = granted_labels,
    objective_fn: ObjectiveFn | None = None,
) -> Attack:
    """The first stage of GIAS, an attack by itself: images that a generator can make,

        z* = argmin over z of  D(client(params, G(z)), update) + alpha TV(G(z)) + beta/2 |z|^2,

    by Adam, ten times slower after 3/8, 5/8 and 7/8 of the steps. D is the cosine on the entries that are not zero in
    the observation, as the paper compares compressed updates; on an update without zeros it is the cosine.

    Threat model: that of Inverting Gradients, and a generator of such images, trained on data of the attacker's own.

    Departures: the share that was pruned is not known but read from the observation. The defaults are those of the
    authors' library, made for large generators; its terms of batch-normalisation statistics, of the images' norm and of
    the agreement of several trials are left out, as its settings leave them at 0.

    Args:
        client_fn: The client the attacker assumes.
        generator_fn: `(params, z) -> ` inputs in the model's space; from shape (b, *latent_shape) to (b, *d).
        generator_params: Parameters of the generator.
        latent_shape: Shape of one latent, which is drawn from N(0, I).
        num_steps: Steps the schedule is made for, >= 1.
        learning_rate: Highest learning rate of z, > 0 and finite.
        total_variation_weight: Weight alpha of the total variation, >= 0 and finite.
        latent_weight: Weight beta of the latents' norm, >= 0. Its term moves z; the loss that is reported does not
            count it.
        label_fn: The label rule. Default: the labels the threat model grants.
        objective_fn: D, if it is to be another; `gia_jax.matching.adaptive` has those for other defenses.

    Returns:
        The attack. Its `init` raises ValueError where the generator does not give inputs of the granted shape.

    Raises:
        ValueError: A negative weight, a learning rate that is not positive and finite, or no steps.
    """
    _check.not_negative(latent_weight=latent_weight)
    _check.finite("latent_weight", latent_weight)
    adam = optax.adam(step_schedule(learning_rate, num_steps))
    return gradient_matching(
        client_fn,
        init_fn=_normal_latents(generator_fn, generator_params, latent_shape),
        objective_fn=supported() if objective_fn is None else objective_fn,
        prior_fn=priors.combine((total_variation_weight, priors.total_variation())),
        label_fn=label_fn,
        decode_fn=lambda latents, labels: Batch(lowered(generator_fn)(generator_params, latents), labels),
        optimizer=optax.chain(optax.add_decayed_weights(latent_weight), adam),
    )


def gias(
    client_fn: ClientFn,
    *,
    generator_fn: GeneratorFn,
    generator_params: Params,
    latent_shape: tuple[int, ...],
    num_latent_steps: int = NUM_LATENT_STEPS,
    num_latents: int = 4,
    num_steps: int = NUM_STEPS,
    latent_learning_rate: float = 3e-2,
    learning_rate: float = 1e-3,
    total_variation_weight: float = 1e-6,
    latent_weight: float = 0.0,
    label_fn: LabelFn = granted_labels,
    objective_fn: ObjectiveFn | None = None,
) -> Attack:
    """Images that a generator can make, then the generator changed for each image:

        z*  by `latent_search`, the best of several starts by the attacker's own loss,
        w_i = argmin over w_1..w_b of  D(client(params, [G(w_i, z*_i)]_i), update) + alpha TV,

    every w_i from the parameters given, by the same Adam. The first stage runs in the attack's `init`; what is counted
    and reported are steps of the second. An attack of n steps costs num_latents * num_latent_steps + n gradients.

    With `num_latent_steps=0` and the initial weights of a network it is the deep image prior (Ulyanov, Vedaldi,
    Lempitsky, Deep Image Prior, CVPR 2018): random latents, an untrained generator, and no data at all.

    Threat model: as for `latent_search`.

    Args:
        client_fn: The client the attacker assumes.
        generator_fn: `(params, z) -> ` inputs, as for `latent_search`; what it makes of one latent must not depend on
            the others of the batch.
        generator_params: Parameters at which every copy of the generator starts.
        latent_shape: Shape of one latent.
        num_latent_steps: Steps of each latent search, >= 0.
        num_latents: Latent searches, >= 1, of which the best goes on.
        num_steps: Steps the schedule of the second stage is made for, >= 1.
        latent_learning_rate: Highest learning rate of z, > 0 and finite.
        learning_rate: Highest learning rate of w, > 0 and finite.
        total_variation_weight: Weight alpha of the total variation, >= 0 and finite.
        latent_weight: Weight of the latents' norm in the first stage, >= 0, as for `latent_search`.
        label_fn: The label rule. Default: the labels the threat model grants.
        objective_fn: D, if it is to be another, as for `latent_search`.

    Returns:
        The attack. Its `init` raises ValueError where the generator does not give inputs of the granted shape.

    Raises:
        ValueError: A negative weight, a number of steps or latents that is no integer in its range, or a learning rate
            that is not positive and finite.
    """
    _check.integer(num_latents=num_latents)
    _check.integer(0, num_latent_steps=num_latent_steps)
    search = keep_best(
        latent_search(
            client_fn,
            generator_fn=generator_fn,
            generator_params=generator_params,
            latent_shape=latent_shape,
            num_steps=max(num_latent_steps, 1),
            learning_rate=latent_learning_rate,
            total_variation_weight=total_variation_weight,
            latent_weight=latent_weight,
            label_fn=label_fn,
            objective_fn=objective_fn,
        )
    )

    def decode(variables: Generated, labels: Any) -> Batch:
        def one(latent: Array, parameters: Params) -> Array:
            return generator_fn(parameters, jax.lax.stop_gradient(latent)[None])[0]  # z* stays: Adam sees zeros

        return Batch(lowered(jax.vmap(one))(*variables), labels)

    def from_latents(latents_fn: InitFn) -> Attack:
        def init_fn(key: PRNGKeyArray, observation: Observation) -> Generated:
            latents = latents_fn(key, observation)
            copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(latents), *leaf.shape)), generator_params)
            return Generated(latents, copies)

        return gradient_matching(
            client_fn,
            init_fn=init_fn,
            objective_fn=supported() if objective_fn is None else objective_fn,
            prior_fn=priors.combine((total_variation_weight, priors.total_variation())),
            label_fn=label_fn,
            decode_fn=decode,
            optimizer=optax.adam(step_schedule(learning_rate, num_steps)),
        )

    def hand_over(key: PRNGKeyArray, state: AttackState, observation: Observation) -> AttackState:
        latents = best_start(search, state, observation).variables
        return from_latents(lambda *_: latents).init(key, observation)

    second = from_latents(_normal_latents(generator_fn, generator_params, latent_shape))
    return warmed_up(second, WarmUp(from_starts(search, num_latents), num_latent_steps, hand_over))


def _normal_latents(generator_fn: GeneratorFn, generator_params: Params, latent_shape: tuple[int, ...]) -> InitFn:
    def init_fn(key: PRNGKeyArray, observation: Observation) -> Float[Array, "b *z"]:
        like = granted(observation, "inputs_like")
        latents = jax.random.normal(key, (like.shape[0], *latent_shape), like.dtype)
        made = jax.eval_shape(generator_fn, generator_params, latents)
        if made.shape != like.shape:
            raise ValueError(f"generator_fn must give inputs of the granted shape {like.shape}, got {made.shape}")
        return latents

    return init_fn
