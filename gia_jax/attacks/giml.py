"""GIML, a generator of images learned from updates.

Jeon, Kim, Lee, Oh, Ok, Gradient Inversion with Generative Image Prior, NeurIPS 2021.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from gia_jax import _check
from gia_jax.base import Attack, AttackInfo, Observation, Params
from gia_jax.matching.run import advance
from gia_jax.precision import widened_tree


class MetaState(NamedTuple):
    """The state of `giml`: the generator learned so far, and what its optimiser remembers.

    Attributes:
        generator_params: Parameters of the generator, which `gias` takes under the same name. They are float32 or
            wider, because half precision loses the steps of learning.
        memory: State of the generator's optimiser, float32 or wider as well.
    """

    generator_params: Params
    memory: Any


class MetaLearner(NamedTuple):
    """A generator learned from a stream of observations, as two pure functions.

    Attributes:
        init: Function `(generator_params) -> state` that starts the learning at a generator.
        step: Function `(key, state, observation) -> (state, info)` that learns from one observation. Its info is that
            of the last step of the attack on it.
    """

    init: Callable[[Params], MetaState]
    step: Callable[[PRNGKeyArray, MetaState, Observation], tuple[MetaState, AttackInfo]]


def giml(
    attack_fn: Callable[[Params], Attack],
    *,
    num_steps: int = 500,
    optimizer: optax.GradientTransformation | None = None,
) -> MetaLearner:
    """Builds the learner of GIML, which makes a generator for `gias` from nothing but updates.

    For each observation of a stream, `gias` finds the parameters w_1..w_b that its images ask for. The generator then
    moves towards them, in the manner of Reptile:

        w <- w - Adam(w - mean of w_i),  the gradient of the mean of |w - w_i|^2 / 2 with w_i held fixed.

    Threat model: a server that saw many updates of clients with images of one kind, and has no other data. An
    observation whose attack does not end in finite parameters changes nothing.

    Args:
        attack_fn: Function that makes from the generator's parameters the attack that starts there:
            `lambda params: gias(client_fn, generator_params=params, ...)`. The authors' library has num_latents=1,
            total_variation_weight=1e-4 and latent_weight=1e-3 here.
        num_steps: Number of steps of each attack, at least 1.
        optimizer: Optimiser of the generator. By default it is Adam at 1e-2.

    Returns:
        The learner. Start it at the network's initial weights. Its `step` raises what the attack's `init` raises.

    Raises:
        ValueError: If `num_steps` is not a positive integer.

    Examples:
        One observation moves the generator, an image that is scaled by its latent:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, attacks, clients, observe
        >>> def apply_fn(params, inputs):
        ...     return inputs.reshape(len(inputs), -1) @ params["kernel"]
        >>> client_fn = jax.jit(clients.federated_sgd(clients.cross_entropy(apply_fn)))
        >>> batch = Batch(jnp.arange(4.0).reshape(1, 2, 2, 1), jnp.array([2]))
        >>> seen = observe(jax.random.key(0), ThreatModel(labels=True), client_fn, {"kernel": jnp.eye(4, 3)}, batch)
        >>> def generator_fn(image, z):
        ...     return z[:, None, None] * image
        >>> settings = {"generator_fn": generator_fn, "latent_shape": (1,), "num_latent_steps": 1, "num_latents": 1}
        >>> def attack_fn(image):
        ...     return attacks.gias(client_fn, generator_params=image, **settings)
        >>> learner = attacks.giml(attack_fn, num_steps=2)
        >>> state = learner.init(jnp.ones((2, 2, 1)))
        >>> state, info = jax.jit(learner.step)(jax.random.key(1), state, seen)
        >>> bool(jnp.any(state.generator_params != 1))
        True
    """
    _check.integer(num_steps=num_steps)
    optimizer = optax.adam(1e-2) if optimizer is None else optimizer
    optimizer = optax.apply_if_finite(optimizer, max_consecutive_errors=np.iinfo(np.int32).max)

    def init(generator_params: Params) -> MetaState:
        params = widened_tree(generator_params)
        return MetaState(params, optimizer.init(params))

    def step(key: PRNGKeyArray, state: MetaState, observation: Observation) -> tuple[MetaState, AttackInfo]:
        params, memory = state
        attack = attack_fn(params)
        key_init, key_steps = jax.random.split(key)
        reached = attack.init(key_init, observation)
        reached, info = advance(attack, key_steps, reached, observation, start=0, num_steps=num_steps)
        copies = reached.candidate.variables.parameters
        away = jax.tree.map(lambda w, own: w - jnp.mean(own, 0), params, copies)
        updates, memory = optimizer.update(away, memory, params)
        last = jax.tree.map(lambda leaf: leaf[-1], info)
        return MetaState(optax.apply_updates(params, updates), memory), last

    return MetaLearner(init, step)
