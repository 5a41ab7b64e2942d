"""Clients whose learning rate or number of steps an attacker finds along with the data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gia_jax import Batch, ClientFn, ThreatModel, attacks, box, clients, gradient_matching, matching, observe, solve
from gia_jax.matching.objectives import cosine, euclidean
from gia_jax.matching.solver import Unknowns

RATE, STEPS, NUM_STEPS = 0.2, 4, 500
FAST = {"xla_backend_optimization_level": 3}


def apply_fn(params, inputs):
    return jax.nn.sigmoid(inputs @ params["first"] + params["bias"]) @ params["head"]


LOSS = clients.cross_entropy(apply_fn)


def network():
    keys = jax.random.split(jax.random.key(8), 3)
    return {
        "first": jax.random.normal(keys[0], (9, 40)),
        "bias": jax.random.normal(keys[1], (40,)),
        "head": jax.random.normal(keys[2], (40, 4)) / 3,
    }


def client_of(rate: Any, steps: int = STEPS) -> ClientFn:
    return clients.federated_averaging(LOSS, learning_rate=rate, local_epochs=steps, divisor=1.0)


def batch():
    return Batch(jax.random.uniform(jax.random.key(3), (2, 9)), jnp.arange(2))


def seen():
    return observe(jax.random.key(0), ThreatModel(labels=True), client_of(RATE), network(), batch())


def attack_on(client_fn: ClientFn, **settings: Any) -> Any:
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, NUM_STEPS))
    return gradient_matching(client_fn, project_fn=box(0.0, 1.0), optimizer=optimizer, **settings)


def solved(reconstruct_fn):
    return jax.jit(reconstruct_fn, compiler_options=FAST)(jax.random.key(50), seen())


def error(found):
    truth = batch().inputs
    orders = (found.batch.inputs, found.batch.inputs[::-1])
    return min(float(jnp.sqrt(jnp.mean(jnp.square(inputs - truth)))) for inputs in orders)


@pytest.mark.parametrize("objective_fn", [euclidean, cosine])
@pytest.mark.parametrize("factor", [1 / 3, 3])
def test_a_learning_rate_that_is_three_times_off_is_found_with_the_inputs(objective_fn, factor):
    client_fn = clients.with_unknown(client_of, guess=factor * RATE)
    found = solved(solve(attack_on(client_fn, objective_fn=objective_fn), num_steps=NUM_STEPS, num_restarts=2))
    assert float(found.client) == pytest.approx(RATE, rel=0.03)
    assert error(found) < 5e-3


def test_a_wrong_learning_rate_that_is_not_searched_for_spoils_the_inputs():
    found = solved(solve(attack_on(client_of(3 * RATE)), num_steps=NUM_STEPS, num_restarts=2))
    assert found.client == ()
    assert error(found) > 0.05


def test_the_number_of_steps_is_chosen_by_the_loss():
    settings = {"num_steps": NUM_STEPS, "num_restarts": 2}
    found = solved(matching.best_of([solve(attack_on(client_of(RATE, steps)), **settings) for steps in (3, 4, 5)]))
    losses = np.array(found.restart_losses)
    assert np.argmin(losses) == 1
    assert losses[1] < 1e-3 * np.min(losses[[0, 2]])
    assert error(found) < 1e-3


def test_the_unknown_starts_at_the_guess_and_the_data_as_without_it():
    observation, key = seen(), jax.random.key(1)
    plain = gradient_matching(client_of(0.1))
    both = gradient_matching(clients.with_unknown(client_of, guess=0.1))
    candidate = both.init(key, observation).candidate
    assert isinstance(candidate.variables, Unknowns)
    np.testing.assert_array_equal(candidate.variables.data, plain.init(key, observation).candidate.variables)
    found, without = (
        both.finalize(candidate, observation),
        plain.finalize(plain.init(key, observation).candidate, observation),
    )
    assert float(found.client) == pytest.approx(0.1)
    np.testing.assert_allclose(found.loss, without.loss, rtol=1e-6)
    update = clients.with_unknown(client_of, guess=0.1)(observation.params, batch())
    np.testing.assert_allclose(update["head"], client_of(0.1)(observation.params, batch())["head"], rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_the_derivative_by_the_unknown_is_that_of_finite_differences():
    params = jax.tree.map(lambda leaf: leaf.astype(float), network())
    examples = batch()._replace(inputs=batch().inputs.astype(float))
    client_fn = clients.with_unknown(lambda values: client_of(values["rate"]), guess={"rate": 0.1})

    @jax.jit
    def first(u):
        return client_fn.client_fn({"rate": u}, None)(params, examples)["head"][0, 0]

    for u in (0.0, 0.7):
        step = 1e-5
        slope = (first(u + step) - first(u - step)) / (2 * step)
        assert float(jax.grad(first)(u)) == pytest.approx(float(slope), rel=1e-6)
    assert float(first(np.log(2.0))) == pytest.approx(float(client_of(0.2)(params, examples)["head"][0, 0]), rel=1e-12)


def test_seeds_that_agree_each_have_unknowns_of_their_own():
    client_fn, observation = clients.with_unknown(client_of, guess=0.1), seen()
    attack = matching.group.together(
        gradient_matching(client_fn, prior_fn=matching.group.consistency, optimizer=optax.sgd(1.0)),
        3,
        matching.group.mean,
    )
    state, _ = jax.jit(attack.step)(jax.random.key(0), attack.init(jax.random.key(1), observation), observation)
    assert len(np.unique(state.candidate.variables.client)) == 3
    found = attack.finalize(state.candidate, observation)
    rates = 0.1 * np.exp(np.array(state.candidate.variables.client))
    assert np.min(np.abs(rates - found.client)) < 1e-6


def test_gias_has_two_stages_and_refuses_unknowns_of_the_client():
    generator = {"generator_fn": lambda params, z: z, "generator_params": {}, "latent_shape": (9,)}
    with pytest.raises(ValueError, match="client_fn must be a client without unknowns"):
        attacks.gias(clients.with_unknown(client_of, guess=0.1), **generator)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("guess", "message"),
    [
        (0.0, "guess must be positive, got 0.0"),
        ({"rate": -1.0}, "guess must be positive, got -1.0"),
        (float("inf"), "guess must be finite, got inf"),
        ((), r"guess must hold at least one array, got \(\)"),
    ],
)
def test_bad_guesses(guess, message):
    with pytest.raises(ValueError, match=message):
        clients.with_unknown(lambda _: client_of(RATE), guess=guess)


@pytest.mark.usefixtures("unchecked")
def test_a_client_must_be_made_by_a_function():
    with pytest.raises(ValueError, match="client_of_fn must be a function"):
        clients.with_unknown(0.1, guess=0.1)
