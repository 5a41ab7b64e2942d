"""What the server sees in the tables of defenses, and its attackers: one that starts as if it knew no defense, and one
that only draws.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import Attack, Batch, Observation, ThreatModel, box, gradient_matching, keep_best, metrics
from gia_jax.base import ClientFn, InitFn, ObjectiveFn, Params, PriorFn
from gia_jax.defenses.protected import Protected, parse
from gia_jax.matching import priors
from gia_jax.matching.objectives import cosine
from gia_jax.matching.optimizers import step_schedule
from gia_jax.matching.run import continued
from gia_jax.threat import observe

THREAT = ThreatModel(labels=True)
# In passes through the network a step of an attack is counted as eight, and an update as three.
DRAWS_A_STEP = 8 / 3


# Of the attacks here, on one example, knowing these alone changes none: a scale, an expectation or an encoding.
UNCHANGING = ("clip", "dpsgd", "quantize", "ternary", "mixup", "instahide")


def network(name: str) -> str:
    """Of which client it has the parameters: its own where the defense is one of the model, else the undefended one."""
    return name if any(part.acts_on == "model" for part in parse(name)) else "none"


def differs(name: str) -> bool:
    """Whether knowing the defense changes the attack."""
    return not all(part.name in UNCHANGING for part in parse(name))


class Seen(NamedTuple):
    """What the server sees of a victim, and what the assumed client would have sent of the same encoding."""

    observation: Observation
    assumed: Params


def see(
    protected: Protected, key: PRNGKeyArray, batch: Batch, others: Batch, *, num_classes: int, rounds: int = 1
) -> Seen:
    """Of one victim, without the parameters, which are everyone's; of several rounds the mean."""
    key_encode, key_client, key_threat = jax.random.split(key, 3)
    client = protected._replace(client_fn=lambda key: averaged(protected.client_fn, key, rounds))
    encoding, update = client.share(key_encode, key_client, batch, others, soft_classes=num_classes)
    observation = observe(key_threat, THREAT, lambda *_: update, protected.params, encoding, num_classes=num_classes)
    return Seen(observation._replace(params=()), protected.assumed_fn(protected.params, encoding))


def averaged(client_fn: Callable[[PRNGKeyArray], ClientFn], key: PRNGKeyArray, rounds: int) -> ClientFn:
    """The mean of what a client answers in several rounds on one batch, where the server sends it the same parameters
    each time: all that it draws, it draws anew.
    """
    if rounds == 1:
        return client_fn(key)
    keys = jax.random.split(key, rounds)

    def mean_fn(params: Params, batch: Batch) -> Params:
        def add(total: Params, key: PRNGKeyArray) -> tuple[Params, None]:
            return optax.tree.add(total, client_fn(key)(params, batch)), None

        total, _ = jax.lax.scan(add, optax.tree.zeros_like(params), keys)
        return optax.tree.scale(1 / rounds, total)

    return mean_fn


def of_each(make: Callable[[Observation], Attack]) -> Attack:
    """An attack whose settings are a lane's own, in `observation.extra`: one program serves them all."""
    return Attack(
        init=lambda key, observation: make(observation).init(key, observation),
        step=lambda key, state, observation: make(observation).step(key, state, observation),
        finalize=lambda candidate, observation: make(observation).finalize(candidate, observation),
    )


def unstacked(tree: Any) -> list[Any]:
    """What lies along the leading axis of every array, such as what a sweep found for each setting."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(len(jax.tree.leaves(tree)[0]))]


def informed(stage: Callable[[ObjectiveFn, int], Attack], objective_fn: ObjectiveFn, num_steps: int) -> Attack:
    """`stage(objective_fn, steps)`; where the objective is not the cosine, after half of the steps on the cosine.

    That half is done in the attack's start: the attack itself has `counted_steps`.
    """
    later = counted_steps(objective_fn, num_steps)
    if later == num_steps:
        return keep_best(stage(objective_fn, num_steps))
    first = keep_best(stage(cosine, num_steps - later))
    return keep_best(continued(first, stage(objective_fn, later), num_steps=num_steps - later))


def counted_steps(objective_fn: ObjectiveFn, num_steps: int) -> int:
    """Of `informed`, those that are not in its start."""
    return num_steps if objective_fn is cosine else num_steps - num_steps // 2


class Attacker(NamedTuple):
    """What an attacker takes the client for, and compares updates by.

    Attributes:
        client_fn: The client that it simulates.
        objective_fn: The distance by which it compares updates.
        magnitudes: Whether it knows that every pixel's sign is random (in the model's space).
    """

    client_fn: ClientFn
    objective_fn: ObjectiveFn
    magnitudes: bool = False


def attack_of(
    attacker: Attacker, bounds: tuple[Any, Any], smoothness: Any, num_steps: int, *others: tuple[Any, PriorFn]
) -> Attack:
    """Inverting Gradients with the client and the objective of one attacker, and with other priors by their weights.

    Where it knows of random signs, the box and the total variation of weight `smoothness` are those of magnitudes.
    """
    low, high = bounds
    variation, further = priors.total_variation(), priors.combine(*others)
    if attacker.magnitudes:
        high = np.maximum(-low, high)
        low = -high

    def prior_fn(batch: Batch, observation: Observation) -> Float[Array, ""]:
        inputs = jnp.abs(batch.inputs) if attacker.magnitudes else batch.inputs
        return smoothness * variation(batch._replace(inputs=inputs), observation) + further(batch, observation)

    def matching(objective_fn: ObjectiveFn, num_steps: int) -> Attack:
        return gradient_matching(
            attacker.client_fn,
            objective_fn=objective_fn,
            prior_fn=prior_fn,
            project_fn=box(low, high),
            optimizer=signed_adam(num_steps),
        )

    return informed(matching, attacker.objective_fn, num_steps)


def signed_adam(num_steps: int, rate: float = 0.1) -> optax.GradientTransformation:
    """The optimiser of Inverting Gradients, whose first learning rate is 0.1 in the paper."""
    return optax.chain(optax.scale_by_sign(), optax.adam(step_schedule(rate, num_steps)))


def ranks_among(gallery: np.ndarray, images: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The ranks of the images of a gallery at `places`, each by one reconstruction, shape (n,)."""
    shown, pairs = jnp.asarray(gallery), (jnp.asarray(images), jnp.asarray(places))
    return np.asarray(jax.lax.map(lambda one: metrics.retrieval_rank(one[0], shown, one[1]), pairs))


def redrawn(draw_fn: InitFn) -> optax.GradientTransformationExtraArgs:
    """In place of an optimizer: the next candidate is drawn like the first, which makes an attack a random search."""

    def update(updates: Any, state: Any, params: Array, *, key: Array, **_: Any) -> tuple[Any, Any]:
        del updates
        return draw_fn(key, Observation((), (), {"inputs_like": params})) - params, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
