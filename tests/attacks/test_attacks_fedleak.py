"""FedLeak: which part of the gradient counts, what it is without its two techniques, and what it finds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gia_jax
from gia_jax import (
    Attack,
    Batch,
    Observation,
    ThreatModel,
    attacks,
    clients,
    control,
    gradient_matching,
    observe,
    stack,
)
from gia_jax.matching.objectives import cosine, euclidean
from gia_jax.matching.optimizers import step_schedule

CLASSES = 4


def _apply(params: Any, inputs: jax.Array) -> jax.Array:
    hidden = jax.nn.sigmoid(inputs.reshape(len(inputs), -1) @ params["first"] + 0.1)
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


CLIENT = clients.federated_sgd(clients.cross_entropy(_apply))


def _seen() -> tuple[Batch, Observation]:
    keys = jax.random.split(jax.random.key(1), 3)
    head = {"kernel": jax.random.normal(keys[1], (24, CLASSES)), "bias": jnp.zeros(CLASSES)}
    params = {"first": jax.random.normal(keys[0], (16, 24)), "head": head}
    batch = Batch(jax.random.uniform(keys[2], (1, 4, 4, 1)), jnp.array([2]))
    return batch, observe(jax.random.key(2), ThreatModel(labels=True), CLIENT, params, batch)


def _solved(attack: Attack, observation: Observation, num_steps: int | None = None) -> Any:
    return jax.jit(lambda key, seen: gia_jax.run(attack, key, seen, num_steps=num_steps)[0])(
        jax.random.key(0), observation
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.3, 1.0])
def test_the_largest_entries_of_every_layer_are_compared_and_no_others(share: float) -> None:
    _, observation = _seen()
    attack = attacks.fedleak(CLIENT, decode_fn=Batch, matched_share=share, objective_fn=euclidean)
    candidate = attack.init(jax.random.key(3), observation).candidate
    simulated = CLIENT(observation.params, Batch(candidate.variables, observation.extra["labels"]))
    expected = 0.0
    for s, o in zip(jax.tree.leaves(simulated), jax.tree.leaves(observation.update), strict=True):
        count = int(np.ceil(round(share * o.size, 9)))
        largest = np.argsort(-np.abs(np.ravel(o)), kind="stable")[:count]
        expected += np.sum(np.square(np.ravel(s) - np.ravel(o))[largest])
    assert float(attack.finalize(candidate, observation).loss) == pytest.approx(expected, rel=1e-5)


def test_without_its_two_techniques_it_is_plain_matching() -> None:
    _, observation = _seen()
    settings = {"bounds": (0.0, 1.0), "total_variation_weight": 0.0, "num_steps": 20, "objective_fn": cosine}
    attack = attacks.fedleak(CLIENT, matched_share=1.0, regularized_share=0.0, **settings)
    plain = gradient_matching(
        CLIENT,
        objective_fn=cosine,
        project_fn=gia_jax.box(0.0, 1.0),
        optimizer=optax.adam(step_schedule(0.1, 20)),
    )
    found, expected = _solved(attack, observation), _solved(plain, observation, 20)
    np.testing.assert_allclose(found.batch.inputs, expected.batch.inputs, atol=1e-3)


def test_it_finds_the_image_and_nothing_in_noise() -> None:
    batch, observation = _seen()
    attack = attacks.fedleak(CLIENT, bounds=(0.0, 1.0), num_steps=400, total_variation_weight=0.0)

    def error(observation: Observation) -> float:
        found = _solved(attack, observation)
        return float(jnp.sqrt(jnp.mean(jnp.square(found.batch.inputs - batch.inputs))))

    assert error(observation) < 0.05
    noise = control(jax.random.key(4), stack([observation]))
    assert error(jax.tree.map(lambda leaf: leaf[0], noise)._replace(params=observation.params)) > 0.2


def test_an_optimizer_of_ones_own_takes_the_regularised_gradient_and_any_number_of_steps() -> None:
    _, observation = _seen()
    moves = []
    for share in (0.0, 1.0):
        attack = attacks.fedleak(CLIENT, decode_fn=Batch, regularized_share=share, optimizer=optax.sgd(1.0))
        assert attack.num_steps is None
        state = attack.init(jax.random.key(0), observation)
        new, _ = attack.step(jax.random.key(1), state, observation)
        moves.append(np.asarray(new.candidate.variables - state.candidate.variables))
    assert np.linalg.norm(moves[0] - moves[1]) > 0.01 * np.linalg.norm(moves[0])
    assert attacks.fedleak(CLIENT, decode_fn=Batch, num_steps=7).num_steps == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"matched_share": 0.0}, r"matched_share must be in \(0, 1\], got 0.0"),
        ({"matched_share": 1.1}, r"matched_share must be in \(0, 1\], got 1.1"),
        ({"matched_share": "all"}, r"matched_share must be in \(0, 1\], got 'all'"),
        ({"regularized_share": -0.1}, r"share must be in \[0, 1\], got -0.1"),
        ({"radius": 0.0}, "radius must be positive, got 0.0"),
        ({"total_variation_weight": float("inf")}, "total_variation_weight must be finite, got inf"),
        ({"bounds": (1.0, 0.0)}, "low must be below high=0.0, got 1.0"),
        ({"bounds": None}, "bounds must be given for images, or decode_fn for data of another kind, got neither"),
        ({"decode_fn": Batch}, "bounds must not be given with decode_fn"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attacks.fedleak(CLIENT, **({"bounds": (0.0, 1.0)} | settings))
