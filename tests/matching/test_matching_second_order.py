"""The second-order solver from start to end: which start it goes on from, and what it solves and does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax import Batch, Observation, clients, gradient_matching, keep_best, matching, run
from gia_jax.matching.initializations import given, near_grey
from gia_jax.matching.levenberg_marquardt import levenberg_marquardt
from gia_jax.matching.second_order import MAX_STEP, second_order

pytestmark = pytest.mark.usefixtures("x64")
SHAPE = (1, 2, 2, 3)


def setting(activation=jax.nn.sigmoid, seed=3, victims=1):
    """A client of two hidden layers without biases, observations of victims in turn, and their inputs."""

    def apply_fn(params, inputs):
        hidden = activation(inputs.reshape(len(inputs), -1) @ params["w1"])
        return activation(hidden @ params["w2"]) @ params["w3"]

    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = {"w1": (12, 16), "w2": (16, 16), "w3": (16, 4)}
    params = {name: jax.random.normal(k, s) * 0.7 for k, (name, s) in zip(keys[:3], shapes.items(), strict=True)}
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    inputs, labels = jax.random.normal(keys[3], (victims, *SHAPE)), jnp.ones((victims, 1), int)
    updates = jax.vmap(lambda x, y: client_fn(params, Batch(x, y)))(inputs, labels)
    return client_fn, Observation(params, updates, {"inputs_like": jnp.zeros_like(inputs), "labels": labels}), inputs


OF_VICTIM = Observation(params=None, update=0, extra=0)


def solved(attack, seen, num_steps=25):
    one = lambda key, observation: run(keep_best(attack), key, observation, num_steps=num_steps)  # noqa: E731
    return jax.jit(jax.vmap(one, (None, OF_VICTIM)))(jax.random.key(4), seen)


@pytest.mark.parametrize(("activation", "solves"), [(jax.nn.sigmoid, True), (jax.nn.relu, False)])
def test_victims_of_a_smooth_network_are_found_to_rounding(activation, solves) -> None:
    client_fn, seen, inputs = setting(activation, victims=2)
    attack = second_order(functools.partial(gradient_matching, client_fn), num_starts=3, num_warm_up_steps=30)
    found, _ = solved(attack, seen)
    errors = np.max(np.abs(found.batch.inputs - inputs), axis=(1, 2, 3, 4))
    assert found.is_finite.all()
    assert np.all(errors < 1e-7) if solves else np.any(errors > 1e-3)


def test_the_start_of_the_lowest_loss_goes_on() -> None:
    client_fn, seen, inputs = setting()
    seen = jax.tree.map(lambda leaf: leaf[0], seen._replace(params=None))._replace(params=seen.params)
    truth = inputs[0]

    def init_fn(key, observation):  # every other start near the truth, the others where sigmoids saturate
        far = 300 * jax.random.rademacher(key, truth.shape, truth.dtype)
        return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1)), truth + 0.01, far)

    build_fn = functools.partial(gradient_matching, client_fn)
    attack = second_order(build_fn, num_starts=8, num_warm_up_steps=1, init_fn=init_fn)
    key = jax.random.key(0)
    starts = attack.warm_up.attack.init(jax.random.split(key, 3)[0], seen).candidate.last.variables
    near = np.max(np.abs(starts - truth), axis=(1, 2, 3, 4)) < 1
    assert 0 < near.sum() < 8
    reached = attack.init(key, seen).candidate.variables
    np.testing.assert_allclose(reached, truth, atol=0.1)


def test_no_step_of_the_warm_up_is_longer_than_its_bound() -> None:
    client_fn, seen, _ = setting()
    seen = jax.tree.map(lambda leaf: leaf[0], seen._replace(params=None))._replace(params=seen.params)
    seen = seen._replace(update=jax.tree.map(lambda leaf: 100 * leaf, seen.update))  # whose gradients are large
    first = second_order(functools.partial(gradient_matching, client_fn), num_starts=2).warm_up.attack
    state, lengths = first.init(jax.random.key(0), seen), []
    step_fn = jax.jit(first.step)
    for t in range(5):
        before = state.candidate.last.variables
        state, _ = step_fn(jax.random.key(t), state, seen)
        change = np.asarray(state.candidate.last.variables - before)
        lengths.append(np.sqrt(np.mean(change**2, axis=(1, 2, 3, 4))))
    assert np.max(lengths) < MAX_STEP * (1 + 1e-6)
    assert np.max(lengths) > MAX_STEP * 0.99


def test_it_goes_on_from_the_result_of_a_first_order_attack() -> None:
    client_fn, seen, inputs = setting(victims=2)
    first = gradient_matching(client_fn, init_fn=near_grey())

    def both(key, observation):
        rough, _ = run(keep_best(first), key, observation, num_steps=150)
        start = given(rough.batch.inputs)
        exact = gradient_matching(client_fn, init_fn=start, optimizer=levenberg_marquardt())
        return rough, run(keep_best(exact), key, observation, num_steps=15)[0]

    rough, found = jax.jit(jax.vmap(both, (None, OF_VICTIM)))(jax.random.key(0), seen)
    assert np.all(found.loss < rough.loss)
    assert np.max(np.abs(rough.batch.inputs - inputs)) > 1e-3
    np.testing.assert_allclose(found.batch.inputs, inputs, atol=1e-7)


def test_a_rounded_update_ends_the_search_near_the_truth() -> None:
    client_fn, seen, inputs = setting(victims=2)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32).astype(jnp.float64), seen.update)
    attack = second_order(functools.partial(gradient_matching, client_fn), num_starts=3, num_warm_up_steps=30)
    found, info = solved(attack, seen._replace(update=rounded))
    assert 1e-9 < np.max(np.abs(found.batch.inputs - inputs)) < 1e-4
    assert np.all(info.loss[:, -1] == info.loss[:, -2])  # it has ended
    assert np.all(info.loss[:, -1] > 0)


def test_bad_numbers_are_named() -> None:
    build_fn = functools.partial(gradient_matching, setting()[0])
    with pytest.raises(ValueError, match="num_starts must be an integer of at least 1, got 0"):
        matching.second_order(build_fn, num_starts=0)
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 1, got 0"):
        matching.second_order(build_fn, num_warm_up_steps=0)
