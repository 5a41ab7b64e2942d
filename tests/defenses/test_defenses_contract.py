"""What every defense of the update must do; a new one is one more row."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gia_jax import Batch, clients, defenses, models

STATIC = {
    "prune": lambda key: defenses.prune(0.5),
    "prune, global": lambda key: defenses.prune(0.5, scope="global"),
    "prune, error feedback": lambda key: defenses.prune(0.5, error_feedback=True),
    "top_k": lambda key: defenses.top_k(0.75),
    "clip": lambda key: defenses.clip(1.0),
    "sign": lambda key: defenses.sign(),
}
RANDOM = {
    "gaussian_noise": lambda key: defenses.gaussian_noise(key, 0.1),
    "laplace_noise": lambda key: defenses.laplace_noise(key, 0.1),
    "ternary": defenses.ternary,
    "quantize": lambda key: defenses.quantize(key, 4),
    "fake_gradients": lambda key: defenses.fake_gradients(key, 0.5),
}
ALL = STATIC | RANDOM


def chain(key):
    noise, rounding = jax.random.split(key)
    return optax.chain(
        defenses.clip(2.0),
        defenses.prune(0.5),
        defenses.gaussian_noise(noise, 0.05),
        defenses.quantize(rounding, 6),
    )


CHAIN = {"chain": chain}

EVERY = pytest.mark.parametrize("make", (ALL | CHAIN).values(), ids=ALL | CHAIN)
EVERY_RANDOM = pytest.mark.parametrize("make", (RANDOM | CHAIN).values(), ids=RANDOM | CHAIN)


@functools.partial(jax.jit, static_argnames="dtype")
def update_of(key, dtype="float32"):
    """Nested, with a scalar leaf and one that is all zeros."""
    a, b = jax.random.split(key)
    return {
        "conv": (jax.random.normal(a, (3, 3, 2, 4), dtype), jnp.zeros(4, dtype)),
        "head": {"w": jax.random.normal(b, (5, 7), dtype), "scale": jnp.ones((), dtype)},
    }


@functools.partial(jax.jit, static_argnums=0)
def once(make, key, update):
    transformation = make(key)
    return transformation.update(update, transformation.init(update))[0]


NUM_CLIENTS = 3


@functools.partial(jax.jit, static_argnums=0)
def of_clients(make, keys, updates):
    """What each client shares, whose transformation is built inside the vmap with a key of its own."""
    return jax.vmap(functools.partial(once, make))(keys, updates)


def lane(tree, i):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[i], tree)


def repeated(update):
    return jax.tree.map(lambda leaf: np.stack([leaf] * NUM_CLIENTS), update)


@functools.cache
def model():
    return models.functional(models.MLP((6,), 3, hidden=(5,), rngs=nnx.Rngs(0)))


@EVERY
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_structure_shapes_and_types_are_kept(make, dtype):
    with jax.enable_x64(dtype == "float64"):
        update = update_of(jax.random.key(0), jnp.dtype(dtype))
        shared = once(make, jax.random.key(1), update)
        chex.assert_trees_all_equal_shapes_and_dtypes(shared, update)
        chex.assert_tree_all_finite(shared)


@EVERY
def test_leaves_keep_their_own_type(make):
    update = {"a": jnp.ones(4, jnp.bfloat16), "b": jnp.arange(6.0), "c": jnp.ones(3, jnp.float16)}
    chex.assert_trees_all_equal_shapes_and_dtypes(once(make, jax.random.key(0), update), update)


@EVERY
def test_an_update_of_zeros_has_a_finite_derivative(make):
    key = jax.random.key(0)

    def total(update):
        return optax.tree.sum(once(make, key, update))

    chex.assert_tree_all_finite(jax.jit(jax.grad(total))({"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}))


@EVERY
def test_jit_agrees_and_does_not_trace_twice(make):
    chex.clear_trace_counter()
    op_by_op = once.__wrapped__

    @jax.jit
    @chex.assert_max_traces(n=1)
    def traced(key, update):
        return op_by_op(make, key, update)

    for seed in range(2):
        key, update = jax.random.key(seed), update_of(jax.random.key(10 + seed))
        traced.trace(key, update)  # a second trace would raise
    chex.assert_trees_all_close(once(make, key, update), op_by_op(make, key, update), rtol=1e-5, atol=1e-6)


@EVERY
def test_vmap_over_clients_is_a_loop(make):
    keys = jax.random.split(jax.random.key(0), NUM_CLIENTS)
    updates = jax.vmap(update_of)(keys)
    together = of_clients(make, keys, updates)
    for i in range(NUM_CLIENTS):
        alone = once(make, keys[i], lane(updates, i))
        chex.assert_trees_all_close(lane(together, i), alone, rtol=1e-5, atol=1e-6)


@EVERY_RANDOM
def test_clients_and_rounds_draw_differently_and_keys_repeat(make):
    update = update_of(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), NUM_CLIENTS)
    shared = of_clients(make, keys, repeated(update))["head"]["w"]
    assert not np.allclose(shared[0], shared[1])
    transformation = make(keys[0])
    update_fn = jax.jit(transformation.update)
    first, state = update_fn(update, transformation.init(update))
    second, _ = update_fn(update, state)
    assert not np.allclose(first["head"]["w"], second["head"]["w"])
    chex.assert_trees_all_equal(first, once(make, keys[0], update))


@EVERY_RANDOM
def test_clients_draw_alike_where_one_transformation_serves_them_all(make):
    """The trap of `vmap(tx.init)`: why it is built inside the vmap over clients, with a key of each."""
    update = update_of(jax.random.key(0))
    alike = repeated(update)
    transformation = make(jax.random.key(1))
    trapped, _ = jax.jit(jax.vmap(lambda u: transformation.update(u, transformation.init(u))))(alike)
    chex.assert_trees_all_equal(*(lane(trapped, i) for i in range(2)))
    keys = jax.random.split(jax.random.key(1), NUM_CLIENTS)
    built_inside = of_clients(make, keys, alike)["head"]["w"]
    assert not np.allclose(built_inside[0], built_inside[1])


@EVERY_RANDOM
def test_leaves_draw_differently(make):
    same = jax.random.normal(jax.random.key(0), (64,))
    shared = once(make, jax.random.key(1), {"a": same, "b": same})
    assert not np.allclose(shared["a"], shared["b"])


@EVERY
def test_state_keeps_its_structure_so_that_a_loop_can_scan(make):
    update = update_of(jax.random.key(0))
    transformation = make(jax.random.key(1))

    def step(state, _):
        shared, state = transformation.update(update, state)
        return state, optax.tree.norm(shared)

    _, norms = jax.lax.scan(step, transformation.init(update), None, length=3)
    assert np.isfinite(norms).all()


@EVERY
def test_it_trains(make):
    """Linear regression: every defense leaves a direction that descends."""
    inputs = jax.random.normal(jax.random.key(0), (64, 4))
    target = inputs @ jnp.array([1.0, -2.0, 0.5, 3.0])

    def loss_fn(params):
        return jnp.mean(jnp.square(inputs @ params["w"] + params["b"] - target))

    transformation = optax.chain(make(jax.random.key(1)), optax.sgd(0.02))
    params = {"w": jnp.zeros(4), "b": jnp.zeros(())}

    def step(carry, _):
        params, state = carry
        updates, state = transformation.update(jax.grad(loss_fn)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (trained, _), _ = jax.lax.scan(step, (params, transformation.init(params)), None, length=300)
    assert loss_fn(trained) < 0.5 * loss_fn(params)


@EVERY
def test_a_client_behind_it_can_be_attacked(make):
    """The defended client is differentiable in its inputs, in both modes and under vmap."""
    apply_fn, params = model()
    client_fn = defenses.defended(clients.federated_sgd(clients.cross_entropy(apply_fn)), make(jax.random.key(0)))
    inputs = jax.random.normal(jax.random.key(1), (2, 1, 6))

    def objective(x):
        update = client_fn(params, Batch(x, jnp.array([1])))
        # Not of the length alone, which clipping takes away.
        return optax.tree.norm(jax.tree.map(lambda leaf: leaf - 0.2, update), squared=True)

    both_modes = jax.jit(jax.vmap(lambda x: (jax.grad(objective)(x), jax.jacfwd(objective)(x))))
    gradients, forward = both_modes(inputs)
    assert np.isfinite(gradients).all()
    assert (np.abs(gradients).max((1, 2)) > 1e-3).all()
    np.testing.assert_allclose(forward, gradients, rtol=1e-4, atol=1e-5)


@EVERY
def test_a_nan_stays_with_its_client(make):
    keys = jax.random.split(jax.random.key(0), NUM_CLIENTS)
    updates = jax.vmap(update_of)(keys)

    def without_first(leaf):
        return np.concatenate([np.full_like(leaf[:1], np.nan), leaf[1:]])

    spoiled = jax.tree.map(without_first, updates)
    whole, hurt = (of_clients(make, keys, tree) for tree in (updates, spoiled))
    for i in range(1, NUM_CLIENTS):
        chex.assert_trees_all_equal(lane(whole, i), lane(hurt, i))
