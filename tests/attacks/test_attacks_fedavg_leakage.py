"""The attack on clients of several epochs: what it averages, what it finds, and what it cannot find."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from local_steps import LOSS, adam, batch_of, error, seen, solver

from gia_jax import Batch, attacks, box, clients, gradient_matching
from gia_jax.attacks.fedavg_leakage import averaged

EPOCHS, MINIBATCH, SEEDS = 2, 2, range(3)


def _client(rate: float, **settings: Any) -> Any:
    return clients.federated_averaging(LOSS, learning_rate=rate, minibatch_size=MINIBATCH, **settings)


def _victim(rate: float, seed: int) -> Any:
    return _client(rate, local_epochs=EPOCHS, order_key=jax.random.key(100 + seed))


@functools.cache
def _errors(rate: float, attacker: str) -> list[float]:
    def leakage() -> Any:
        settings = {"order_weight": 0.01, "total_variation_weight": 0.0, "optimizer": adam()}
        return attacks.fedavg_leakage(_client(rate), local_epochs=EPOCHS, bounds=(0.0, 1.0), **settings)

    def matching(client_fn: Any) -> Any:
        return gradient_matching(client_fn, project_fn=box(0.0, 1.0), optimizer=adam())

    attack = {
        "one step": lambda: matching(clients.federated_sgd(LOSS)),
        "fixed order": lambda: matching(_client(rate, local_epochs=EPOCHS)),
        "leakage": leakage,
    }[attacker]()
    solve = solver(attack, num_restarts=4)
    return [error(solve(seen(_victim(rate, seed), seed)), seed) for seed in SEEDS]


def test_it_finds_more_than_an_attacker_of_one_step_and_one_of_a_fixed_order() -> None:
    one_step, fixed, leakage = (np.array(_errors(0.1, name)) for name in ("one step", "fixed order", "leakage"))
    assert np.all(leakage < 0.7 * one_step)
    assert np.all(leakage < fixed)
    assert np.mean(leakage) < 0.13


def test_it_does_not_find_what_large_steps_hide() -> None:
    """Steps that are ten times as long leave the images apart by what two unrelated ones are."""
    unrelated = np.sqrt(1 / 6)  # of two uniform pixels
    assert np.min(_errors(1.0, "leakage")) > 0.5 * unrelated


def test_copies_in_other_orders_are_averaged_to_themselves() -> None:
    inputs = batch_of(0).inputs
    orders = [np.array(order) for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 7)]
    copies = Batch(jnp.concatenate([inputs[order] for order in orders]), jnp.tile(jnp.arange(4), len(orders)))
    found = jax.jit(averaged, static_argnums=1)(copies, len(orders))
    np.testing.assert_allclose(found.inputs, inputs[orders[0]], atol=1e-6)
    np.testing.assert_array_equal(found.labels, np.arange(4))


def test_the_mean_is_of_the_examples_that_belong_together() -> None:
    one, two = jnp.array([[0.0], [10.0]]), jnp.array([[10.5], [-1.0]])
    inputs = {"a": jnp.concatenate([one, two]), "b": jnp.concatenate([one[..., None], two[..., None]])}
    found = averaged(Batch(inputs, jnp.array([3, 4, 3, 4])), 2)
    np.testing.assert_allclose(found.inputs["a"], [[-0.5], [10.25]])
    np.testing.assert_allclose(found.inputs["b"], [[[-0.5]], [[10.25]]])


def test_with_one_epoch_and_no_prior_it_is_gradient_matching() -> None:
    observation = seen(_client(0.1), 0)
    settings = {"total_variation_weight": 0.0, "num_steps": 3, "optimizer": adam()}
    attack = attacks.fedavg_leakage(_client(0.1), local_epochs=1, **settings)
    inner = gradient_matching(_client(0.1), optimizer=adam())

    @jax.jit
    def losses() -> Any:
        state = attack.init(jax.random.key(0), observation)
        labels = state.candidate.labels
        ordered = observation._replace(extra={**observation.extra, "labels": labels})
        own, found = inner.init(jax.random.key(0), ordered), []
        own = own._replace(candidate=state.candidate)
        for _ in range(3):
            state, info = attack.step(jax.random.key(1), state, observation)
            own, other = inner.step(jax.random.key(1), own, ordered)
            found.append((info, other))
        return found

    for info, other in losses():
        np.testing.assert_allclose(info.loss, other.loss, rtol=1e-5)
        np.testing.assert_allclose(info.match, info.loss, rtol=1e-5)


def test_restarts_try_other_orders_of_the_labels() -> None:
    attack = attacks.fedavg_leakage(_client(0.1), local_epochs=3, total_variation_weight=0.0)
    observation = seen(_victim(0.1, 0), 0)
    labels = np.array([attack.init(jax.random.key(k), observation).candidate.labels for k in range(4)])
    assert labels.shape == (4, 12)
    np.testing.assert_array_equal(labels[:, :4], labels[:, 8:])
    np.testing.assert_array_equal(np.sort(labels[:, :4], 1), np.tile(np.arange(4), (4, 1)))
    assert len({tuple(row) for row in labels}) > 1


def test_what_is_no_image_is_attacked_without_total_variation() -> None:
    params = {"kernel": jnp.eye(3)}
    client_fn = clients.federated_averaging(
        clients.cross_entropy(lambda params, x: x @ params["kernel"]), learning_rate=0.1, minibatch_size=2
    )
    observation = seen(_victim(0.1, 0), 0)._replace(
        params=params, update={"kernel": jnp.ones((3, 3))}, extra={"inputs_like": jnp.zeros((2, 3))}
    )
    settings = {"label_fn": lambda _: jnp.array([0, 1]), "num_steps": 2}
    attack = attacks.fedavg_leakage(client_fn, local_epochs=2, total_variation_weight=0.0, **settings)
    state = attack.init(jax.random.key(0), observation)
    assert attack.finalize(state.candidate, observation).batch.inputs.shape == (2, 3)
    attack = attacks.fedavg_leakage(client_fn, local_epochs=2, **settings)
    with pytest.raises(ValueError, match="must be images"):
        attack.step(jax.random.key(0), attack.init(jax.random.key(0), observation), observation)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local_epochs": 0}, "local_epochs must be an integer of at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"order_weight": -1.0}, "order_weight must not be negative, got -1.0"),
        ({"total_variation_weight": float("nan")}, "total_variation_weight"),
        ({"bounds": (1.0, 0.0)}, "low must be below high=0.0, got 1.0"),
        ({"bounds": 1.0}, "bounds must be a pair"),
        ({"aggregate_fn": "mean"}, "aggregate_fn must be a function, got 'mean'"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attacks.fedavg_leakage(_client(0.1), **({"local_epochs": 2} | settings))


def test_the_number_of_examples_must_be_granted_and_fit() -> None:
    observation = seen(_victim(0.1, 0), 0)
    attack = attacks.fedavg_leakage(_client(0.1), local_epochs=2)
    with pytest.raises(ValueError, match="does not grant 'inputs_like'"):
        attack.init(jax.random.key(0), observation._replace(extra={}))
    attack = attacks.fedavg_leakage(_client(0.1), local_epochs=10**12)
    with pytest.raises(ValueError, match="local_epochs must fit into memory"):
        attack.init(jax.random.key(0), observation)
