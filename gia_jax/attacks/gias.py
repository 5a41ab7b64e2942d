"""GIAS, attacks with a generator of images.

Jeon, Kim, Lee, Oh, Ok, Gradient Inversion with Generative Image Prior, NeurIPS 2021.
"""

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
    Scalar,
    WarmUp,
)
from gia_jax.clients.unknown import UnknownClient
from gia_jax.lowering import lowered
from gia_jax.matching import priors
from gia_jax.matching.adaptive import supported
from gia_jax.matching.optimizers import step_schedule
from gia_jax.matching.run import best_start, from_starts, keep_best, warmed_up
from gia_jax.matching.solver import gradient_matching
from gia_jax.threat import granted, granted_labels

GeneratorFn = Callable[[Params, Float[Array, "b *z"]], Float[Array, "b *d"]]
NUM_LATENT_STEPS, NUM_STEPS = 1_000, 5_000  # the defaults of the authors' library


class Generated(NamedTuple):
    """The unknowns that the second stage of GIAS optimises.

    Attributes:
        latents: Latents, one for each image, shape (b, *z).
        parameters: Parameters of the generators, one generator for each image, leaves of shape (b, ...).
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
    learning_rate: Scalar = 3e-2,
    total_variation_weight: Scalar = 1e-6,
    latent_weight: Scalar = 0.0,
    label_fn: LabelFn = granted_labels,
    objective_fn: ObjectiveFn | None = None,
) -> Attack:
    """Builds the first stage of GIAS, an attack by itself, which searches among the images that a generator can make:

        z* = argmin over z of  D(client(params, G(z)), update) + alpha TV(G(z)) + beta/2 |z|^2

    The optimiser is Adam, whose rate is ten times lower after each of 3/8, 5/8 and 7/8 of the steps. D is the cosine
    distance on the entries that are not zero in the observation, as the paper compares compressed updates. On an update
    without zeros it is the cosine distance itself.

    Threat model: an honest-but-curious server that knows the parameters, the update, the shape of the batch and the
    labels, and has a generator of such images, trained on data of its own.

    Departures: the share that was pruned is not known but read from the observation. The defaults are those of the
    authors' library, made for large generators. Its terms of batch-normalisation statistics, of the images' norm and of
    the agreement of several trials are left out, as its settings leave them at 0.

    Args:
        client_fn: Client function `(params, batch) -> update` that the attacker assumes.
        generator_fn: Function `(params, z) -> images` that maps latents of shape (b, *latent_shape) to images of shape
            (b, h, w, c) in the model's space.
        generator_params: Parameters of the generator.
        latent_shape: Shape of one latent, whose start is drawn from N(0, I).
        num_steps: Number of steps that the learning rate's schedule is made for, at least 1.
        learning_rate: Highest learning rate of z, above 0 and finite.
        total_variation_weight: Weight alpha of the total variation in the loss, at least 0 and finite.
        latent_weight: Weight beta of the latents' squared norm, at least 0 and finite. Its term moves z, but the loss
            that is reported does not count it.
        label_fn: Function `(observation) -> labels` that the attacker uses to find the labels. By default it takes
            those that the threat model grants.
        objective_fn: Function `(simulated, observed) -> distance` that replaces D. `gia_jax.matching.adaptive` has
            those for other defenses.

    Returns:
        The attack. Its `init` raises ValueError where the generator does not give inputs of the granted shape.

    Raises:
        ValueError: If a weight is negative or not finite, the learning rate is not positive and finite, or `num_steps`
            is not a positive integer.

    Examples:
        A generator of images of one grey tone finds such an image, whatever the client's is:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, observe, run
        >>> def apply_fn(params, inputs):
        ...     return inputs.reshape(len(inputs), -1) @ params["kernel"]
        >>> client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
        >>> batch = Batch(jnp.arange(4.0).reshape(1, 2, 2, 1), jnp.array([2]))
        >>> seen = observe(jax.random.key(0), ThreatModel(labels=True), client_fn, {"kernel": jnp.eye(4, 3)}, batch)
        >>> def generator_fn(image, z):
        ...     return z[:, None, None] * image
        >>> generator = {"generator_fn": generator_fn, "generator_params": jnp.ones((2, 2, 1)), "latent_shape": (1,)}
        >>> attack = attacks.latent_search(client_fn, num_steps=3, **generator)
        >>> solve = jax.jit(lambda key: run(attack, key, seen, num_steps=3)[0])
        >>> found = solve(jax.random.key(1))
        >>> bool(jnp.all(found.batch.inputs == found.batch.inputs[0, 0, 0]))
        True
    """
    _check.not_negative(latent_weight=latent_weight)
    _check.finite("latent_weight", latent_weight)
    adam = optax.adam(step_schedule(learning_rate, num_steps))
    attack = gradient_matching(
        client_fn,
        init_fn=_normal_latents(generator_fn, generator_params, latent_shape),
        objective_fn=supported() if objective_fn is None else objective_fn,
        prior_fn=priors.combine((total_variation_weight, priors.total_variation())),
        label_fn=label_fn,
        decode_fn=lambda latents, labels: Batch(lowered(generator_fn)(generator_params, latents), labels),
        optimizer=optax.chain(optax.add_decayed_weights(latent_weight), adam),
    )
    return attack._replace(num_steps=num_steps)


def gias(
    client_fn: ClientFn,
    *,
    generator_fn: GeneratorFn,
    generator_params: Params,
    latent_shape: tuple[int, ...],
    num_latent_steps: int = NUM_LATENT_STEPS,
    num_latents: int = 4,
    num_steps: int = NUM_STEPS,
    latent_learning_rate: Scalar = 3e-2,
    learning_rate: Scalar = 1e-3,
    total_variation_weight: Scalar = 1e-6,
    latent_weight: Scalar = 0.0,
    label_fn: LabelFn = granted_labels,
    objective_fn: ObjectiveFn | None = None,
) -> Attack:
    """Builds the GIAS attack, which searches the images that a generator can make and then changes the generator for
    each:

        z*  by `latent_search`, the best of several starts by the attacker's own loss,
        w_i = argmin over w_1..w_b of  D(client(params, [G(w_i, z*_i)]_i), update) + alpha TV

    Every w_i starts at the parameters given, and the optimiser is the same Adam. The first stage runs in the attack's
    `init`. Only steps of the second are counted and reported. An attack of n steps costs
    num_latents * num_latent_steps + n gradients.

    With `num_latent_steps=0` and the initial weights of a network the attack is the deep image prior (Ulyanov, Vedaldi,
    Lempitsky, Deep Image Prior, CVPR 2018): random latents, an untrained generator, and no data at all.

    Threat model: an honest-but-curious server that knows the parameters, the update, the shape of the batch and the
    labels, and has a generator of such images, trained on data of its own.

    Args:
        client_fn: Client function `(params, batch) -> update` that the attacker assumes.
        generator_fn: Function `(params, z) -> images` that maps latents of shape (b, *latent_shape) to images of shape
            (b, h, w, c) in the model's space. What it makes of one latent must not depend on the others of the batch.
        generator_params: Parameters at which every copy of the generator starts.
        latent_shape: Shape of one latent, whose start is drawn from N(0, I).
        num_latent_steps: Number of steps of each latent search, at least 0.
        num_latents: Number of latent searches, at least 1. The best of them goes on.
        num_steps: Number of steps that the second stage's schedule is made for, at least 1.
        latent_learning_rate: Highest learning rate of z, above 0 and finite.
        learning_rate: Highest learning rate of w, above 0 and finite.
        total_variation_weight: Weight alpha of the total variation in the loss of both stages, at least 0 and finite.
        latent_weight: Weight of the latents' squared norm in the first stage, at least 0 and finite. Its term moves z,
            but the loss that is reported does not count it.
        label_fn: Function `(observation) -> labels` that the attacker uses to find the labels. By default it takes
            those that the threat model grants.
        objective_fn: Function `(simulated, observed) -> distance` that compares two updates. By default it is the
            cosine distance on the entries that are not zero in the observation. `gia_jax.matching.adaptive` has
            functions for other defenses.

    Returns:
        The attack. Its `init` raises ValueError where the generator does not give inputs of the granted shape.

    Raises:
        ValueError: If a weight is negative or not finite, a number of steps or latents is not an integer in its range,
            a learning rate is not positive and finite, or the client is a `clients.UnknownClient`.

    Examples:
        The image found is more than the generator of grey tones could make at first:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, observe, run
        >>> def apply_fn(params, inputs):
        ...     return inputs.reshape(len(inputs), -1) @ params["kernel"]
        >>> client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
        >>> batch = Batch(jnp.arange(4.0).reshape(1, 2, 2, 1), jnp.array([2]))
        >>> seen = observe(jax.random.key(0), ThreatModel(labels=True), client_fn, {"kernel": jnp.eye(4, 3)}, batch)
        >>> def generator_fn(image, z):
        ...     return z[:, None, None] * image
        >>> generator = {"generator_fn": generator_fn, "generator_params": jnp.ones((2, 2, 1)), "latent_shape": (1,)}
        >>> attack = attacks.gias(client_fn, num_latent_steps=1, num_latents=2, num_steps=2, **generator)
        >>> solve = jax.jit(lambda key: run(attack, key, seen)[0])
        >>> found = solve(jax.random.key(1))
        >>> bool(jnp.any(found.batch.inputs != found.batch.inputs[0, 0, 0]))
        True
    """
    if isinstance(client_fn, UnknownClient):
        raise ValueError("client_fn must be a client without unknowns, which two stages would search for, got one with")
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
    second = second._replace(num_steps=num_steps)
    return warmed_up(second, WarmUp(from_starts(search, num_latents), num_latent_steps, hand_over))


def _normal_latents(generator_fn: GeneratorFn, generator_params: Params, latent_shape: tuple[int, ...]) -> InitFn:
    """Builds the initialisation with normal latents, which refuses a generator whose images have the wrong shape."""

    def init_fn(key: PRNGKeyArray, observation: Observation) -> Float[Array, "b *z"]:
        like = granted(observation, "inputs_like")
        _check.one_array("observation.extra['inputs_like']", like)
        latents = jax.random.normal(key, (like.shape[0], *latent_shape), like.dtype)
        made = jax.eval_shape(generator_fn, generator_params, latents)
        if made.shape != like.shape:
            raise ValueError(f"generator_fn must give inputs of the granted shape {like.shape}, got {made.shape}")
        return latents

    return init_fn
