"""SME and NL-SME: closed forms on quadratic losses, and what they find of clients of several steps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from local_steps import LOSS, NUM_STEPS, error, seen, solver

from gia_jax import Attack, Batch, Observation, attacks, clients, keep_best, labels, modalities, run
from gia_jax.cli.names import make_attack
from gia_jax.cli.recipes import Target
from gia_jax.matching.objectives import euclidean

RATE, EPOCHS, SEEDS = 0.1, 4, range(3)
SCALE = RATE * EPOCHS
BUILDERS = {"sme": attacks.sme, "nl_sme": attacks.nl_sme}


def _pull(params: Any, batch: Batch) -> jax.Array:
    """A loss that is quadratic in the parameters, with the curvature 1 in all directions."""
    return 0.5 * jnp.mean(jnp.sum(jnp.square(params["w"] - batch.inputs), 1))


def _valley(params: Any, batch: Batch) -> jax.Array:
    """One with other curvatures in other directions, so that the path of the parameters bends."""
    return 0.5 * jnp.mean(jnp.sum(jnp.array([1.0, 9.0]) * jnp.square(params["w"] - batch.inputs), 1))


def _observed(loss_fn: Any, rate: float, steps: int, inputs: jax.Array) -> Observation:
    client_fn = clients.federated_averaging(loss_fn, learning_rate=rate, local_epochs=steps)
    params, batch = {"w": jnp.array([2.0, -1.0])}, Batch(inputs, jnp.zeros(len(inputs), int))
    extra = {"inputs_like": jnp.zeros_like(inputs), "labels": batch.labels}
    return Observation(params, client_fn(params, batch), extra)


def _at_truth(attack: Attack, observation: Observation, inputs: jax.Array) -> Any:
    """The reconstruction at the first unknowns of the client and the true inputs."""
    candidate = attack.init(jax.random.key(0), observation).candidate
    return attack.finalize(candidate._replace(variables=candidate.variables._replace(data=inputs)), observation)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_at_equal_curvatures_the_surrogate_is_exact_at_the_mean_of_the_path(build: Any) -> None:
    """The mean of T gradients w_t - x is the gradient at the mean of w_0..w_(T-1), which is on the line."""
    rate, steps, inputs = 0.3, 5, jnp.array([[0.5, 0.25], [1.0, -0.5]])
    observation = _observed(_pull, rate, steps, inputs)
    decay = (1 - rate) ** np.arange(steps + 1)
    alpha = np.mean(1 - decay[:-1]) / (1 - decay[-1])
    settings = {"scale": rate * steps, "total_variation_weight": 0.0, "objective_fn": euclidean}
    losses = [
        float(_at_truth(build(clients.federated_sgd(_pull), alpha=a, **settings), observation, inputs).loss)
        for a in (alpha, alpha - 0.1, alpha + 0.1)
    ]
    assert losses[0] < 1e-28
    assert min(losses[1:]) > 1e-3


@pytest.mark.usefixtures("x64")
def test_alpha_is_found_where_the_inputs_are_known() -> None:
    rate, steps, inputs = 0.3, 5, jnp.array([[0.5, 0.25], [1.0, -0.5]])
    observation = _observed(_pull, rate, steps, inputs)
    decay = (1 - rate) ** np.arange(steps + 1)
    alpha = np.mean(1 - decay[:-1]) / (1 - decay[-1])
    attack = attacks.sme(
        clients.federated_sgd(_pull),
        scale=rate * steps,
        learning_rate=1e-9,
        alpha_learning_rate=0.02,
        total_variation_weight=0.0,
        num_steps=300,
        init_fn=lambda *_: inputs,
        objective_fn=euclidean,
    )
    found = jax.jit(lambda o: run(attack, jax.random.key(0), o)[0])(observation)
    assert float(found.client["alpha"]) == pytest.approx(alpha, abs=1e-3)
    twice = attacks.sme(
        clients.federated_sgd(_pull),
        scale=2 * rate * steps,
        alpha=alpha / 2,
        total_variation_weight=0.0,
        objective_fn=euclidean,
    )
    assert float(_at_truth(twice, observation, inputs).loss) < 1e-28  # an upper bound of the scale: a smaller alpha


@pytest.mark.usefixtures("x64")
def test_on_a_bent_path_no_alpha_is_exact_but_a_control_point_is() -> None:
    rate, steps, inputs = 0.1, 6, jnp.array([[0.5, 0.25]])
    observation = _observed(_valley, rate, steps, inputs)
    settings = {"scale": rate * steps, "total_variation_weight": 0.0, "objective_fn": euclidean}
    client_fn = clients.federated_sgd(_valley)
    line = [
        float(_at_truth(attacks.sme(client_fn, alpha=a, **settings), observation, inputs).loss)
        for a in np.linspace(0, 1, 41)
    ]
    assert min(line) > 1e-2
    # The mean gradient is that at the mean m of the path. Solve (theta_0 - alpha delta) + 2 alpha (1 - alpha) d c = m.
    start, curvature, alpha = np.array([2.0, -1.0]), np.array([1.0, 9.0]), 0.4
    decay = np.power.outer(1 - rate * curvature, np.arange(steps + 1)).T
    path = inputs[0] + decay * (start - inputs[0])
    mean, delta = np.mean(path[:-1], 0), start - path[-1]
    control = (mean - start + alpha * delta) / (2 * alpha * (1 - alpha) * np.sqrt(np.mean(delta**2)))
    attack = attacks.nl_sme(client_fn, alpha=alpha, control_weight=0.5, **settings)
    candidate = attack.init(jax.random.key(0), observation).candidate
    variables = candidate.variables._replace(data=inputs)
    variables.client["control"]["w"] = jnp.asarray(control)
    found = attack.finalize(candidate._replace(variables=variables), observation)
    assert float(found.loss) == pytest.approx(0.5 * np.mean(np.square(control)), rel=1e-9)  # the penalty alone
    assert float(found.client["alpha"]) == pytest.approx(alpha)


@functools.cache
def _found(attacker: str, rate: float = RATE) -> tuple[list[float], list[float]]:
    """Errors and places of the surrogates."""
    settings = {"bounds": (0.0, 1.0), "num_steps": NUM_STEPS, "learning_rate": 0.1, "total_variation_weight": 0.0}
    settings |= {"alpha_learning_rate": 0.02, "scale": rate * EPOCHS}
    if attacker == "first step":
        settings |= {"alpha": 0.0, "alpha_learning_rate": 0.0}
    build = attacks.nl_sme if attacker == "nl_sme" else attacks.sme
    solve = solver(build(clients.federated_sgd(LOSS), **settings))
    victim_fn = clients.federated_averaging(LOSS, learning_rate=rate, local_epochs=EPOCHS)
    found = [solve(seen(victim_fn, seed)) for seed in SEEDS]
    errors = [error(one, seed) for one, seed in zip(found, SEEDS, strict=True)]
    return errors, [float(one.client["alpha"]) for one in found]


@pytest.mark.parametrize("attacker", BUILDERS)
def test_a_surrogate_between_both_ends_finds_more_than_one_at_the_first(attacker: str) -> None:
    errors, places = _found(attacker)
    assert np.all(np.array(errors) < 0.6 * np.array(_found("first step")[0]))
    assert np.max(errors) < 0.1
    assert np.all((np.array(places) > 0.2) & (np.array(places) < 0.8))


def test_a_place_of_rate_zero_stays() -> None:
    assert _found("first step")[1] == [0.0] * len(SEEDS)


def test_no_surrogate_finds_what_large_steps_hide() -> None:
    assert np.min(_found("sme", rate=3.0)[0]) > 0.5 * np.sqrt(1 / 6)


def test_alpha_stays_between_0_and_1_and_a_curve_of_no_rate_is_the_line() -> None:
    observation = seen(clients.federated_averaging(LOSS, learning_rate=RATE, local_epochs=EPOCHS), 0)
    settings = {"scale": SCALE, "num_steps": 8, "alpha": 0.9, "alpha_learning_rate": 0.5}

    def solved(attack: Attack) -> Any:
        return jax.jit(lambda o: run(attack, jax.random.key(0), o))(observation)

    line, info = solved(attacks.sme(clients.federated_sgd(LOSS), **settings))
    curve, curve_info = solved(attacks.nl_sme(clients.federated_sgd(LOSS), control_learning_rate=0.0, **settings))
    np.testing.assert_allclose(curve_info.loss, info.loss, rtol=1e-5)
    np.testing.assert_allclose(curve.batch.inputs, line.batch.inputs, atol=1e-4)
    assert 0 <= line.client["alpha"] <= 1


def test_the_command_line_builds_it_from_a_client_of_one_step_and_the_scale() -> None:
    observation = seen(clients.federated_averaging(LOSS, learning_rate=RATE, local_epochs=EPOCHS), 0)
    target = Target(
        clients.federated_averaging(LOSS, learning_rate=RATE, local_epochs=EPOCHS),
        labels.dense("head"),
        num_classes=4,
        batch_size=4,
        modality=modalities.image((3, 3, 1)),
        bounds=(0.0, 1.0),
        gradient_fn=clients.federated_sgd(LOSS),
        scale=SCALE,
    )
    named = make_attack("sme", target, labels="known", solver="paper", num_steps=3)
    attack = keep_best(attacks.sme(clients.federated_sgd(LOSS), scale=SCALE, bounds=(0.0, 1.0), num_steps=3))
    found, expected = (run(one, jax.random.key(0), observation) for one in (named, attack))
    np.testing.assert_allclose(found[1].loss, expected[1].loss, rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        ({"scale": None}, "scale must be a single number, got None"),
        ({"scale": float("inf")}, "scale must be finite, got inf"),
        ({"alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
        ({"alpha": -0.5}, "alpha must not be negative, got -0.5"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"alpha_learning_rate": -1.0}, "alpha_learning_rate must not be negative, got -1.0"),
        ({"total_variation_weight": -1.0}, "total_variation_weight must not be negative, got -1.0"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"bounds": (1.0, 0.0)}, "low must be below high=0.0, got 1.0"),
    ],
)
def test_bad_arguments(build: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(clients.federated_sgd(LOSS), **({"scale": 1.0} | settings))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["control_weight", "control_learning_rate"])
def test_bad_arguments_of_the_curve(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must not be negative, got -1.0"):
        attacks.nl_sme(clients.federated_sgd(LOSS), scale=1.0, **{name: -1.0})
