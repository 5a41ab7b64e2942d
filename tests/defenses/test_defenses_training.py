"""Every defense in an ordinary flax and optax loop: the network still learns the digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gia_jax import Batch, clients, data, defenses, labels, models

CLASSES, SIZE = 10, 64
NETWORK = models.functional(models.MLP((8, 8, 1), CLASSES, hidden=(64,), rngs=nnx.Rngs(0)))
MIXUP, INSTAHIDE = defenses.mixup(CLASSES, k=4), defenses.instahide(CLASSES, k=4)


@pytest.fixture(scope="module")
def digits():
    images = data.load("digits")
    return Batch(jnp.asarray(images.normalize(images.images)), jnp.asarray(images.labels))


def plain(loss_fn, key):
    return clients.federated_sgd(loss_fn)


def private(loss_fn, key):
    return defenses.dp_sgd(loss_fn, key, norm=1.0, noise_multiplier=0.5)


def with_soteria(loss_fn, key):
    apply_fn, _ = NETWORK
    return defenses.soteria(clients.federated_sgd(loss_fn), apply_fn, labels.dense("head"), ratio=0.8)


def as_it_is(key, batch):
    return batch


# Of the update, of the batch, of the client: a new defense is one more row.
NONE = (lambda key: optax.identity(), as_it_is, plain)
UPDATE = {
    "prune 0.9": lambda key: defenses.prune(0.9),
    "prune 0.99": lambda key: defenses.prune(0.99),
    "top_k 0.99": lambda key: defenses.top_k(0.99),
    "clip": lambda key: defenses.clip(1.0),
    "gaussian_noise": lambda key: defenses.gaussian_noise(key, 1e-2),
    "laplace_noise": lambda key: defenses.laplace_noise(key, 1e-2),
    "sign": lambda key: defenses.sign(),
    "ternary": defenses.ternary,
    "quantize": lambda key: defenses.quantize(key, 4),
}
ROWS = {
    "none": NONE,
    **{name: (make, as_it_is, plain) for name, make in UPDATE.items()},
    "dp_sgd": (NONE[0], as_it_is, private),
    "soteria": (NONE[0], as_it_is, with_soteria),
    "mixup": (NONE[0], MIXUP, plain),
    "instahide": (NONE[0], INSTAHIDE, plain),
    "prune, instahide": (UPDATE["prune 0.9"], INSTAHIDE, plain),
}
RANDOM = ("gaussian_noise", "ternary", "dp_sgd", "mixup")


def trained(row, loss_fn, params, key, examples, num_steps):
    make_transformation, encode, make_client = row
    key_defense, key_loop = jax.random.split(key)
    optimizer = optax.chain(make_transformation(key_defense), optax.adam(1e-2))

    def step(carry, key):
        params, state = carry
        key_sample, key_encoding, key_client = jax.random.split(key, 3)
        index = jax.random.randint(key_sample, (SIZE,), 0, len(examples.labels))
        batch = encode(key_encoding, Batch(examples.inputs[index], examples.labels[index]))
        update = make_client(loss_fn, key_client)(params, batch)
        changes, state = optimizer.update(update, state, params)
        return (optax.apply_updates(params, changes), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key_loop, num_steps))
    return params


@pytest.mark.parametrize("name", ROWS)
def test_the_loss_falls_and_accuracy_beats_chance(name, digits):
    """Of what the client trains on, and of plain images; the last 360 digits are the test set."""
    apply_fn, params = NETWORK
    loss_fn = clients.cross_entropy(apply_fn)
    examples, held_out = (jax.tree.map(lambda leaf, s=s: leaf[s], digits) for s in (slice(0, -360), slice(-360, None)))
    steps = 400 if "instahide" in name else 100  # random signs are slow to learn

    @jax.jit
    def fit(params, key, examples):
        return trained(ROWS[name], loss_fn, params, key, examples, steps)

    @jax.jit
    def measure(params, held_out):
        encoded = ROWS[name][1](jax.random.key(2), held_out)
        right = jnp.argmax(apply_fn(params, held_out.inputs), -1) == held_out.labels
        return loss_fn(params, encoded), jnp.mean(right)

    fitted = fit(params, jax.random.key(1), examples)
    (loss_before, before), (loss_after, after) = measure(params, held_out), measure(fitted, held_out)
    assert loss_after < 0.9 * loss_before
    assert before < 0.2
    assert after > (0.2 if "instahide" in name else 0.7)


@pytest.mark.parametrize("name", RANDOM)
def test_steps_and_seeds_draw_differently(name):
    """The same batch and parameters in every step of every seed: whatever differs, the defense drew."""
    apply_fn, params = NETWORK
    loss_fn = clients.cross_entropy(apply_fn)
    make_transformation, encode, make_client = ROWS[name]
    batch = Batch(jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.arange(4))

    def two_updates(key):
        key_defense, *keys = jax.random.split(key, 3)
        defense = make_transformation(key_defense)
        state, found = defense.init(params), []
        for key_encoding, key_client in map(jax.random.split, keys):
            update = make_client(loss_fn, key_client)(params, encode(key_encoding, batch))
            update, state = defense.update(update, state, params)
            found.append(update["head"]["kernel"].ravel())
        return jnp.stack(found)

    draws = jax.jit(jax.vmap(two_updates))(jax.random.split(jax.random.key(3), 2)).reshape(4, -1)
    assert all(not np.allclose(draws[i], draws[j]) for i in range(4) for j in range(i))
