"""GIAS and GIML with linear generators, where it is known which images can be made and which cannot."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gia_jax import (
    Attack,
    Batch,
    Observation,
    Reconstruction,
    ThreatModel,
    attacks,
    clients,
    keep_best,
    models,
    observe,
    run,
)
from gia_jax.base import ObjectiveFn, Params
from gia_jax.defenses import prune
from gia_jax.matching.objectives import cosine, euclidean

SHAPE, LATENTS, CLASSES = (4, 4, 1), 3, 4
SIZE = int(np.prod(SHAPE))
FAST = {"xla_backend_optimization_level": 3}  # these run for longer than they compile


def _generate(params: Params, z: jax.Array) -> jax.Array:
    return (z @ params["kernel"] + params["bias"]).reshape(-1, *SHAPE)


def _generator(seed: int = 0) -> Params:
    kernel = jnp.linalg.qr(jax.random.normal(jax.random.key(seed), (SIZE, LATENTS)))[0].T
    return {"kernel": kernel, "bias": 0.1 * jnp.ones(SIZE)}


def _linear(params: Params, batch: Batch) -> Params:
    """A client that shares a linear function of each of its images."""
    return {"w": batch.inputs.reshape(len(batch.inputs), -1) @ _measured()}


def _measured() -> jax.Array:
    return jax.random.normal(jax.random.key(5), (SIZE, 8)) / 3


def _apply(params: Params, inputs: jax.Array) -> jax.Array:
    hidden = jax.nn.sigmoid(inputs.reshape(len(inputs), -1) @ params["first"] + params["bias"])
    return hidden @ params["head"]


def _params() -> Params:
    keys = jax.random.split(jax.random.key(8), 3)
    return {
        "first": jax.random.normal(keys[0], (SIZE, 40)),
        "bias": jax.random.normal(keys[1], (40,)),
        "head": jax.random.normal(keys[2], (40, CLASSES)) / 10,
    }


CLIENT = clients.federated_sgd(clients.cross_entropy(_apply))


def _inside(size: int, seed: int = 3) -> Batch:
    z = jax.random.normal(jax.random.key(seed), (size, LATENTS))
    return Batch(_generate(_generator(), z), jnp.arange(size) % CLASSES)


def _outside(size: int, seed: int = 3) -> Batch:
    return Batch(jax.random.normal(jax.random.key(seed), (size, *SHAPE)) / 2, jnp.arange(size) % CLASSES)


def _seen(batch: Batch, client_fn: Any = CLIENT) -> Observation:
    params = {"w": jnp.zeros((len(batch.inputs), 8))} if client_fn is _linear else _params()
    return observe(jax.random.key(0), ThreatModel(labels=True), client_fn, params, batch)


def _solver(attack: Attack, num_steps: int) -> Callable[[Observation], Reconstruction]:
    solve = jax.jit(lambda key, o: run(attack, key, o, num_steps=num_steps)[0], compiler_options=FAST)
    return lambda observation: solve(jax.random.key(0), observation)


def _error(found: Any, truth: Batch) -> float:
    """The largest squared error of an image, in parts of its mean square, in the order that fits best."""
    order = (np.arange(len(truth.inputs)), np.arange(len(truth.inputs))[::-1])
    errors = [jnp.mean(jnp.square(found.batch.inputs[o] - truth.inputs), (1, 2, 3)) for o in order]
    return min(float(jnp.max(e / jnp.mean(jnp.square(truth.inputs), (1, 2, 3)))) for e in errors)


def _setting(**settings: Any) -> dict[str, Any]:
    own = {"generator_fn": _generate, "generator_params": _generator(), "latent_shape": (LATENTS,)}
    return {**own, "total_variation_weight": 0.0, **settings}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_latent_search_ends_at_the_least_squares_solution(weight: float) -> None:
    observation = _seen(_outside(2), _linear)
    settings = _setting(objective_fn=euclidean, latent_weight=weight, num_steps=1_000, learning_rate=0.1)
    found = _solver(attacks.latent_search(_linear, **settings), 1_000)(observation)
    generator = _generator()
    shown = generator["kernel"] @ _measured()
    wanted = observation.update["w"] - generator["bias"] @ _measured()
    # The derivative of |z A - o|^2 + weight / 2 |z|^2 is zero.
    z = jnp.linalg.solve(2 * shown @ shown.T + weight * jnp.eye(LATENTS), 2 * shown @ wanted.T).T
    np.testing.assert_allclose(found.batch.inputs, _generate(generator, z), atol=1e-6)


def test_images_that_the_generator_makes_are_found_by_latents_and_others_only_by_its_parameters() -> None:
    search = _solver(keep_best(attacks.latent_search(CLIENT, **_setting(num_steps=400, learning_rate=0.1))), 400)
    settings = _setting(num_latent_steps=100, latent_learning_rate=0.1, num_steps=600, learning_rate=3e-2)
    both = _solver(keep_best(attacks.gias(CLIENT, **settings)), 600)
    for seed in range(3):
        inside, outside = _inside(2, seed), _outside(2, seed)
        assert _error(search(_seen(inside)), inside) < 1e-3
        assert _error(search(_seen(outside)), outside) > 0.3
        assert _error(both(_seen(outside)), outside) < 1e-2


def test_every_image_has_a_generator_of_its_own() -> None:
    """One that ignores its latent makes all images alike, unless each image has a copy."""

    def one_image(params: Params, z: jax.Array) -> jax.Array:
        return jnp.broadcast_to(params, (len(z), *SHAPE))

    batch = _outside(2)
    settings = _setting(generator_fn=one_image, generator_params=jnp.zeros(SHAPE), num_steps=400)
    alike = _solver(attacks.latent_search(CLIENT, **settings), 400)(_seen(batch)).batch.inputs
    np.testing.assert_array_equal(alike[0], alike[1])
    attack = attacks.gias(CLIENT, **settings, num_latent_steps=0, learning_rate=0.1)
    assert _error(_solver(attack, 400)(_seen(batch)), batch) < 1e-2


def test_the_parameter_search_leaves_latents_alone() -> None:
    attack = attacks.gias(CLIENT, **_setting(num_latent_steps=0, num_latents=1))
    observation = _seen(_outside(2))
    state = attack.init(jax.random.key(0), observation)
    stepped, _ = attack.step(jax.random.key(0), state, observation)
    before, after = state.candidate.variables, stepped.candidate.variables
    np.testing.assert_array_equal(before.latents, after.latents)
    for copies, own in zip(jax.tree.leaves(after.parameters), jax.tree.leaves(_generator()), strict=True):
        assert copies.shape == (2, *own.shape)
        assert not np.allclose(copies[0], copies[1])


def test_the_latents_of_the_lowest_loss_go_on() -> None:
    observation = _seen(_inside(2))

    def loss(num_latents: int) -> Callable[[jax.Array], jax.Array]:
        attack = attacks.gias(CLIENT, **_setting(num_latent_steps=1, num_latents=num_latents))
        return lambda key: attack.finalize(attack.init(key, observation).candidate, observation).loss

    keys = jax.random.split(jax.random.key(0), 9)
    one, many = (jax.vmap(loss(n))(keys) for n in (1, 20))
    assert many.max() < jnp.median(one)


def test_the_default_objective_knows_that_the_update_was_pruned() -> None:
    batch = _inside(1)
    pruned = prune(0.7)
    observation = _seen(batch)
    shared, _ = pruned.update(observation.update, pruned.init(observation.params))
    observation = observation._replace(update=shared)

    def solved(objective_fn: ObjectiveFn | None) -> Reconstruction:
        settings = _setting(num_steps=400, learning_rate=0.1, objective_fn=objective_fn)
        return _solver(keep_best(attacks.latent_search(CLIENT, **settings)), 400)(observation)

    aware, blind = solved(None), solved(cosine)
    assert aware.loss < 1e-4
    assert _error(aware, batch) < 1e-3
    assert blind.loss > 0.02
    assert _error(blind, batch) > 0.05


def test_an_untrained_network_is_a_prior_too() -> None:
    decoder, params = models.functional(models.Decoder((8, 8, 1), 4, width=4, rngs=nnx.Rngs(0)))
    ramp = jnp.linspace(0, 1, 8)
    batch = Batch(jnp.stack([ramp[:, None] * ramp, ramp[::-1, None] * ramp])[..., None], jnp.asarray([0, 1]))
    network = {
        "first": jax.random.normal(jax.random.key(0), (64, 40)),
        "bias": jnp.zeros(40),
        "head": jax.random.normal(jax.random.key(1), (40, CLASSES)) / 10,
    }
    observation = observe(jax.random.key(0), ThreatModel(labels=True), CLIENT, network, batch)
    attack = attacks.gias(
        CLIENT,
        generator_fn=decoder,
        generator_params=params,
        latent_shape=(4,),
        num_latent_steps=0,
        num_latents=1,
        num_steps=400,
        learning_rate=1e-2,
    )
    part = attack._replace(num_steps=None)  # one step of its schedule of 400
    start, end = (_solver(part, n)(observation) for n in (1, 400))
    assert _error(end, batch) < 0.2
    assert _error(start, batch) > 0.6


@pytest.mark.parametrize("make", [attacks.latent_search, attacks.gias])
def test_a_generator_of_another_shape_is_refused(make: Any) -> None:
    def flat(params: Params, z: jax.Array) -> jax.Array:
        return _generate(params, z)[..., 0]

    attack = make(CLIENT, **_setting(generator_fn=flat))
    with pytest.raises(ValueError, match=r"generator_fn must give .* shape \(2, 4, 4, 1\), got \(2, 4, 4\)"):
        run(attack, jax.random.key(0), _seen(_inside(2)))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_latent_steps": -1}, "num_latent_steps must be an integer of at least 0, got -1"),
        ({"num_latents": 0}, "num_latents must be an integer of at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"latent_weight": -1.0}, "latent_weight must not be negative, got -1.0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attacks.gias(CLIENT, **_setting(**setting))


def _offset(params: Params, z: jax.Array) -> jax.Array:
    """A generator that ignores its latent."""
    return jnp.broadcast_to(params["bias"], (len(z), SIZE)).reshape(-1, *SHAPE)


@pytest.mark.usefixtures("x64")
def test_giml_goes_to_the_mean_of_the_generators_that_the_images_ask_for() -> None:
    def complete(params: Params, batch: Batch) -> Params:
        return {"w": batch.inputs.reshape(len(batch.inputs), -1)}

    batch = _outside(3)
    observation = observe(jax.random.key(0), ThreatModel(labels=True), complete, {"w": jnp.zeros((3, SIZE))}, batch)

    def attack_fn(params: Params) -> Attack:
        own = _setting(generator_fn=_offset, generator_params=params, objective_fn=euclidean)
        return attacks.gias(complete, **own, num_latent_steps=0, num_steps=600, learning_rate=0.1)

    for rate in (1.0, 0.25):
        learner = attacks.giml(attack_fn, num_steps=600, optimizer=optax.sgd(rate))
        start = {"bias": jnp.ones(SIZE)}
        state, info = learner.step(jax.random.key(0), learner.init(start), observation)
        mean = batch.inputs.reshape(3, -1).mean(0)
        np.testing.assert_allclose(state.generator_params["bias"], 1 + rate * (mean - 1), atol=1e-5)
        assert info.loss < 1e-6


def _giml_attack(params: Params) -> Attack:
    return attacks.gias(
        CLIENT,
        **_setting(generator_params=params),
        num_latent_steps=30,
        num_latents=1,
        num_steps=30,
        latent_learning_rate=0.1,
        learning_rate=3e-2,
    )


def test_giml_learns_a_generator_from_updates_alone() -> None:
    """Clients hold images around one mean, which the attacker's first generator does not know."""
    mean = jax.random.normal(jax.random.key(9), (SIZE,))
    start = {"kernel": _generator()["kernel"] / 3, "bias": jnp.zeros(SIZE)}
    learner = attacks.giml(_giml_attack, num_steps=30, optimizer=optax.adam(5e-2))

    def batch_of(key: jax.Array) -> Batch:
        inputs = mean.reshape(SHAPE) + 0.2 * jax.random.normal(key, (2, *SHAPE))
        return Batch(inputs, jnp.arange(2))

    @jax.jit
    def learn(keys: jax.Array) -> Params:
        def body(state: Any, key: jax.Array) -> Any:
            return learner.step(key, state, _seen(batch_of(key)))

        return jax.lax.scan(body, learner.init(start), keys)[0].generator_params

    @jax.jit
    def errors(params: Params, keys: jax.Array) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            batch = batch_of(key)
            found = run(_giml_attack(params), key, _seen(batch), num_steps=30)[0].batch
            right = jnp.argsort(found.labels)  # the labels are distinct, the order is all that was hidden
            return jnp.mean(jnp.square(found.inputs[right] - batch.inputs))

        return jax.vmap(one)(keys)

    stream, victims = jax.random.split(jax.random.key(0), 60), jax.random.split(jax.random.key(1), 8)
    before, after = errors(start, victims), errors(learn(stream), victims)
    assert (after < before).all()
    assert after.mean() < before.mean() / 4


def test_giml_passes_over_a_broken_observation() -> None:
    learner = attacks.giml(_giml_attack, num_steps=2)
    state = learner.init(_generator())
    whole = _seen(_inside(2))
    broken = whole._replace(update=jax.tree.map(lambda leaf: leaf * jnp.nan, whole.update))
    step = jax.jit(learner.step)
    after, info = step(jax.random.key(0), state, broken)
    assert not np.isfinite(info.loss)
    for old, new in zip(jax.tree.leaves(state.generator_params), jax.tree.leaves(after.generator_params), strict=True):
        np.testing.assert_array_equal(old, new)
    moved, _ = step(jax.random.key(0), after, whole)
    assert not np.allclose(moved.generator_params["kernel"], state.generator_params["kernel"])
