"""MAGIA: its subsets in closed form, what it is without them, and what it finds."""

import itertools
import math
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
    granted_labels,
    keep_best,
    observe,
)
from gia_jax.matching.initializations import near_grey

NUM_CLASSES, WIDTH = 3, 6


def _apply(params: Any, inputs: jax.Array) -> jax.Array:
    hidden = jax.nn.sigmoid(inputs.reshape(len(inputs), -1) @ params["first"] + 0.1)
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


CLIENT = clients.federated_sgd(clients.cross_entropy(_apply))


def _params(width: int = 12) -> Any:
    keys = jax.random.split(jax.random.key(1), 2)
    kernel = jax.random.normal(keys[1], (width, NUM_CLASSES))
    return {"first": jax.random.normal(keys[0], (WIDTH, width)), "head": {"kernel": kernel, "bias": jnp.zeros(3)}}


def _seen(size: int, threat: ThreatModel | None = None) -> tuple[Batch, Observation]:
    inputs = jax.random.uniform(jax.random.key(5), (size, 3, 2, 1))
    batch = Batch(inputs, jnp.arange(size) % NUM_CLASSES)
    threat = ThreatModel(labels=True, label_order=True) if threat is None else threat
    return batch, observe(jax.random.key(2), threat, CLIENT, _params(), batch)


def _plain(**settings: Any) -> Attack:
    """Without a prior and without a box."""
    return attacks.magia(CLIENT, num_classes=NUM_CLASSES, decode_fn=Batch, **settings)


def _moves(attack: Attack, observation: Observation, keys: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
    """The first state, what a step with each key adds to its unknowns, and the losses that it reports."""
    state = attack.init(jax.random.key(0), observation)

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        new, info = attack.step(key, state, observation)
        return new.candidate.variables - state.candidate.variables, info.loss

    return state, *jax.jit(jax.vmap(one))(keys)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("size", "subset"), [(4, 1), (5, 3)])
def test_the_mean_over_all_subsets_is_the_closed_form(size: int, subset: int) -> None:
    _, observation = _seen(size)
    attack = _plain(subset_size=subset, subset_weight=1.0, label_fn=granted_labels, optimizer=optax.sgd(1.0))
    state, moves, losses = _moves(attack, observation, jax.random.split(jax.random.key(3), 400))
    distinct = np.unique(np.asarray(moves).round(12), axis=0)
    assert len(distinct) == math.comb(size, subset)

    def squared(one: Any, other: Any) -> jax.Array:
        return optax.tree.norm(optax.tree.sub(one, other), squared=True)

    def closed_form(inputs: jax.Array) -> jax.Array:
        labels = observation.extra["labels"]
        mean = CLIENT(observation.params, Batch(inputs, labels))
        each = jax.vmap(lambda x, y: CLIENT(observation.params, Batch(x[None], y[None])))(inputs, labels)
        spread = jnp.mean(jax.vmap(squared, (0, None))(each, mean))
        return squared(mean, observation.update) + (size - subset) / (subset * (size - 1)) * spread

    expected, gradient = jax.jit(jax.value_and_grad(closed_form))(state.candidate.variables)
    np.testing.assert_allclose(-distinct.mean(0), gradient, rtol=1e-8, atol=1e-10)
    # What is reported is of the whole batch, whatever was drawn, and is below the subsets' mean.
    whole = jax.jit(attack.finalize)(state.candidate, observation).loss
    np.testing.assert_allclose(losses, whole, rtol=1e-12)
    assert whole < expected


@pytest.mark.usefixtures("x64")
def test_the_rescaled_sum_over_subsets_is_the_sum_over_the_batch() -> None:
    numbers = np.random.default_rng(0).normal(size=(6, 4))
    for subset in range(1, 7):
        sums = [numbers[list(chosen)].sum(0) for chosen in itertools.combinations(range(6), subset)]
        factor = math.comb(6, subset) / math.comb(5, subset - 1)
        assert factor == pytest.approx(6 / subset)
        np.testing.assert_allclose(factor * np.mean(sums, 0), numbers.sum(0))


@pytest.mark.parametrize("settings", [{"subset_size": 3}, {"subset_size": 1, "subset_weight": 0.0}])
def test_without_smaller_subsets_it_is_dlg(settings: Any) -> None:
    _, observation = _seen(3)
    optimizer = optax.adam(0.1)
    dlg = attacks.dlg(CLIENT, num_classes=NUM_CLASSES, optimizer=optimizer)
    plain, without = (
        jax.jit(lambda key, attack=attack: gia_jax.run(attack, key, observation, num_steps=3)[0])(jax.random.key(0))
        for attack in (dlg, _plain(optimizer=optimizer, **settings))
    )
    np.testing.assert_allclose(without.batch.inputs, plain.batch.inputs, atol=1e-4)
    np.testing.assert_allclose(without.loss, plain.loss, rtol=1e-4)


def test_it_finds_two_images_and_their_labels_and_nothing_in_noise() -> None:
    batch, observation = _seen(2, ThreatModel())
    attack = keep_best(
        attacks.magia(
            CLIENT,
            num_classes=NUM_CLASSES,
            bounds=(0.0, 1.0),
            subset_size=1,
            subset_weight=1e-4,
            total_variation_weight=0.0,
            init_fn=near_grey(),
        )
    )

    @jax.jit
    def solve(observation: Observation) -> Any:
        best_fn = gia_jax.restarts(lambda key, seen: gia_jax.run(attack, key, seen, num_steps=300)[0], 8)
        return best_fn(jax.random.key(0), observation)

    def error(found: Any) -> float:
        orders = (found.batch.inputs, found.batch.inputs[::-1])
        return min(float(jnp.sqrt(jnp.mean(jnp.square(inputs - batch.inputs)))) for inputs in orders)

    found = solve(observation)
    assert error(found) < 0.02
    assert sorted(found.batch.labels.argmax(1).tolist()) == [0, 1]
    noise = solve(jax.tree.map(lambda leaf: leaf[0], control(jax.random.key(4), _stacked(observation))))
    assert error(noise) > 0.1


def _stacked(observation: Observation) -> Observation:
    return jax.tree.map(lambda leaf: leaf[None], observation)


def test_the_unknowns_of_a_client_are_searched_for_too() -> None:
    def client_of_fn(rate: Any) -> gia_jax.ClientFn:
        return clients.federated_averaging(clients.cross_entropy(_apply), learning_rate=rate, divisor=1.0)

    batch, _ = _seen(2)
    observation = observe(jax.random.key(0), ThreatModel(), client_of_fn(0.2), _params(), batch)
    client_fn = clients.with_unknown(client_of_fn, guess=0.1)
    settings = {"bounds": (0.0, 1.0), "subset_size": 1, "optimizer": optax.adam(0.1)}
    attack = attacks.magia(client_fn, num_classes=NUM_CLASSES, **settings)
    found = jax.jit(lambda key: gia_jax.run(attack, key, observation, num_steps=3)[0])(jax.random.key(0))
    assert found.is_finite
    assert found.client != 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subset_size": 0}, "subset_size must be an integer of at least 1, got 0"),
        ({"subset_size": 1.0}, "subset_size must be an integer of at least 1, got 1.0"),
        ({"subset_weight": 1.5}, r"subset_weight must be in \[0, 1\], got 1.5"),
        ({"subset_weight": float("nan")}, r"subset_weight must be in \[0, 1\], got nan"),
        ({"num_classes": 1}, "num_classes must be an integer of at least 2, got 1"),
        ({"total_variation_weight": -1.0}, "total_variation_weight must not be negative, got -1.0"),
        ({"bounds": None}, "bounds must be given for images, or decode_fn for data of another kind, got neither"),
        ({"decode_fn": Batch}, "bounds must not be given with decode_fn"),
        ({"prior_fn": lambda batch, seen: 0.0}, "prior_fn must be given with a decode_fn"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attacks.magia(CLIENT, **({"num_classes": 3, "bounds": (0.0, 1.0)} | settings))
