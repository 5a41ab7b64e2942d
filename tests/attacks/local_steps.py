"""Clients of federated averaging with a small network of sigmoids, and what attacks find of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gia_jax import Attack, Batch, Observation, Reconstruction, ThreatModel, clients, observe, solve
from gia_jax.base import Params

IMAGE, HIDDEN, EXAMPLES = (3, 3, 1), 40, 4
NUM_STEPS = 500
FAST = {"xla_backend_optimization_level": 3}  # these run for longer than they compile


def apply_fn(params: Params, inputs: jax.Array) -> jax.Array:
    hidden = jax.nn.sigmoid(inputs.reshape(len(inputs), -1) @ params["first"] + params["bias"])
    return hidden @ params["head"]


LOSS = clients.cross_entropy(apply_fn)


def network() -> Params:
    keys = jax.random.split(jax.random.key(8), 3)
    size = int(np.prod(IMAGE))
    return {
        "first": jax.random.normal(keys[0], (size, HIDDEN)),
        "bias": jax.random.normal(keys[1], (HIDDEN,)),
        "head": jax.random.normal(keys[2], (HIDDEN, EXAMPLES)) / 3,
    }


def batch_of(seed: int, size: int = EXAMPLES) -> Batch:
    """Images of as many classes, so that the labels tell them apart."""
    return Batch(jax.random.uniform(jax.random.key(seed), (size, *IMAGE)), jnp.arange(size))


def seen(client_fn: Any, seed: int, size: int = EXAMPLES) -> Observation:
    key = jax.random.key(1_000 + seed)
    return observe(key, ThreatModel(labels=True), jax.jit(client_fn), network(), batch_of(seed, size))


def solver(attack: Attack, num_restarts: int = 2) -> Callable[[Observation], Reconstruction]:
    solved = jax.jit(solve(attack, num_steps=NUM_STEPS, num_restarts=num_restarts), compiler_options=FAST)
    return lambda observation: solved(jax.random.key(50), observation)


def error(found: Reconstruction, seed: int) -> float:
    """The root of the mean squared error in the best order."""
    truth = batch_of(seed, len(found.batch.inputs)).inputs
    cost = jnp.mean(jnp.square(found.batch.inputs[:, None] - truth), (2, 3, 4))
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    return float(jnp.sqrt(jnp.mean(cost[rows, columns])))


def adam() -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(0.1, NUM_STEPS))
