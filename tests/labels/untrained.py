"""An untrained network, and what label rules find in its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gia_jax import Batch, ThreatModel, clients, labels, models, observe

HEAD = labels.dense("head")
APPLY, START = models.functional(models.MLP((12,), hidden=(64,), rngs=nnx.Rngs(0)))
CLIENT = clients.federated_sgd(clients.cross_entropy(APPLY))


def overlap(found, truth):
    return np.minimum(np.bincount(found, minlength=100), np.bincount(truth, minlength=100)).sum() / len(truth)


def draws_of(rules):
    """`(keys, labels) -> labels by rule`, each of another network and other random inputs."""

    def one(key, truth):
        params = jax.tree.map(lambda p: p + 0.03 * jax.random.normal(key, p.shape), START)
        inputs = jax.random.normal(jax.random.fold_in(key, 1), (truth.shape[0], 12))
        observation = observe(key, ThreatModel(), CLIENT, params, Batch(inputs, truth))
        return {name: rule(observation) for name, rule in rules.items()}

    return jax.jit(jax.vmap(one))


def mean_overlaps(draws, truths):
    found = draws(jax.random.split(jax.random.key(0), len(truths)), jnp.asarray(truths, jnp.int32))
    return {name: np.mean([overlap(f, t) for f, t in zip(np.asarray(rows), truths)]) for name, rows in found.items()}
