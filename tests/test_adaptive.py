"""An attacker that knows the defense knows nothing of the client's key: the keys change nothing, and noise can win."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats

from gia_jax import Batch, ThreatModel, attacks, keep_best, models, observe, run
from gia_jax.defenses.protected import parse, protect
from gia_jax.matching.objectives import cosine

MODULE = models.MLP((8, 8, 1), 4, hidden=(48,), activation=jax.nn.sigmoid, rngs=nnx.Rngs(0))
BATCH = Batch(jnp.tanh(2 * jax.random.normal(jax.random.key(0), (1, 8, 8, 1))), jnp.array([2]))
STEPS, CLIENTS = 80, 24
THREAT = ThreatModel(labels=True)


def attack_with(client_fn, objective_fn):
    attack = attacks.inverting_gradients(
        client_fn, bounds=(-1.0, 1.0), num_steps=STEPS, total_variation_weight=0.0, objective_fn=objective_fn
    )
    return lambda key, seen: error(run(keep_best(attack), key, seen, num_steps=STEPS)[0])


@functools.cache
def attacker(text, adaptive=True):
    protected = protect(parse(text), MODULE, num_classes=4)
    return jax.jit(jax.vmap(attack_with(protected.assumed_fn, protected.adapt_fn(cosine) if adaptive else cosine)))


def errors_of_a_thief(text, keys, seen, victims_keys):
    """Of an attacker that holds each client's key, which no attacker may, and runs the defense as the client does."""
    protected = protect(parse(text), MODULE, num_classes=4)

    def of_one(key, seen, own):
        def client_fn(params, batch):
            return protected.client_fn(own)(params, protected.encode_fn(own, batch))

        return attack_with(client_fn, cosine)(key, seen)

    return jax.jit(jax.vmap(of_one))(keys, seen, victims_keys)


def error(reconstruction):
    return jnp.mean(jnp.square(reconstruction.batch.inputs - BATCH.inputs))


@functools.cache
def observer(text):
    protected = protect(parse(text), MODULE, num_classes=4)

    def of_one(key):
        batch = protected.encode_fn(key, BATCH)
        return observe(key, THREAT, protected.client_fn(key), protected.params, batch, num_classes=4)

    return jax.jit(jax.vmap(of_one))


def observations(text, keys):
    return observer(text)(keys)


def like(key, params, draw_fn):
    return optax.tree.random_like(key, jax.tree.map(lambda leaf: leaf[0], params), draw_fn)


def keys_of(seed):
    return jax.random.split(jax.random.key(seed), CLIENTS)


@pytest.mark.parametrize(
    "text",
    [
        "gaussian:scale=0.3",
        "quantize:bits=3",
        "dpsgd:noise_multiplier=0.05,norm=1",
        "instahide:k=1",  # the signs alone
    ],
)
def test_the_victim_s_key_changes_nothing_not_even_in_the_attacker_s_hands(text):
    first, second = (observations(text, keys_of(seed)) for seed in (1, 2))
    attack_fn = attacker(text)
    others = attack_fn(keys_of(3), first)
    assert stats.ks_2samp(others, attack_fn(keys_of(3), second)).pvalue > 0.01
    # With its victims' own keys for a start it does as well as with any.
    assert stats.ks_2samp(others, attack_fn(keys_of(1), first)).pvalue > 0.01
    # And this would show if it used them: noise that is known hides nothing.
    stolen = errors_of_a_thief(text, keys_of(3), first, keys_of(1))
    assert stats.ks_2samp(others, stolen, alternative="less").pvalue < 0.01


@pytest.mark.parametrize(
    ("weak", "strong", "draw_fn"),
    [
        ("gaussian:scale=0.001", "gaussian:scale=1000", jax.random.normal),
        ("laplace:scale=0.001", "laplace:scale=1000", jax.random.laplace),
        ("dpsgd:noise_multiplier=0.001,norm=1", "dpsgd:noise_multiplier=1000,norm=1", jax.random.normal),
    ],
)
def test_noise_without_end_leaves_the_prior_alone(weak, strong, draw_fn):
    attack_fn = attacker(strong)
    seen = observations(strong, keys_of(1))
    hidden = np.asarray(attack_fn(keys_of(3), seen))
    # The noise-only level: updates of that noise around nothing.
    noise = jax.vmap(lambda key: jax.tree.map(lambda leaf: 1_000 * leaf, like(key, seen.params, draw_fn)))(keys_of(4))
    nothing = np.asarray(attack_fn(keys_of(3), seen._replace(update=noise)))
    assert stats.ks_2samp(hidden, nothing).pvalue > 0.01
    seen = np.asarray(attacker(weak)(keys_of(3), observations(weak, keys_of(1))))
    assert seen.mean() < 0.5 * hidden.mean()


def test_knowing_that_entries_were_pruned_helps():
    text = "prune:ratio=0.95"
    seen = observations(text, keys_of(1))
    blind, knowing = (np.asarray(attacker(text, adaptive)(keys_of(3), seen)) for adaptive in (False, True))
    assert knowing.mean() < 0.8 * blind.mean()
