"""GradInversion: its terms switch on and off, noise comes after the update, and it finds what it must find."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gia_jax
from gia_jax import Attack, Batch, Observation, ThreatModel, attacks, clients, labels, models, observe
from gia_jax.matching import group

SHAPE = (8, 8, 1)
HEAD = labels.dense("head")
APPLY, PARAMS = models.functional(models.MLP(SHAPE, 4, hidden=(16,), rngs=nnx.Rngs(0)))
CLIENT = clients.federated_sgd(clients.cross_entropy(APPLY))
TRUTH = Batch(jax.random.normal(jax.random.key(0), (2, *SHAPE)), jnp.array([3, 1]))


def statistics_fn(params: Any, inputs: jax.Array) -> list:
    """Mean and variance of the first layer's features."""
    features = inputs.reshape(len(inputs), -1) @ params["dense0"]["kernel"]
    return [(jnp.mean(features, 0), jnp.var(features, 0))]


def make(**options: Any) -> Attack:
    options = {"statistics_fn": statistics_fn, "num_seeds": 3, "num_steps": 20, "num_warm_up_steps": 4} | options
    return attacks.grad_inversion(CLIENT, HEAD, **options)


def seen(batch: Batch = TRUTH, **grants: bool) -> Observation:
    threat = ThreatModel(**({"statistics": True} | grants))
    return observe(jax.random.key(1), threat, CLIENT, PARAMS, batch, statistics=statistics_fn(PARAMS, batch.inputs))


def at_step(attack: Attack, count: int) -> Any:
    """A state at the start, but for the schedule, which is at step `count`."""
    state = jax.jit(attack.init)(jax.random.key(0), seen())

    def counted(leaf: jax.Array) -> jax.Array:
        return jnp.full_like(leaf, count) if leaf.dtype == jnp.int32 else leaf

    return state._replace(memory=jax.tree.map(counted, state.memory))


TERMS = {
    "total_variation_weight": lambda x: jnp.mean(jnp.abs(jnp.diff(x, axis=1))) + jnp.mean(jnp.abs(jnp.diff(x, axis=2))),
    "norm_weight": lambda x: jnp.mean(x**2) / 2,
    "statistics_weight": lambda x: (
        10
        * sum(
            jnp.linalg.norm(a - b)
            for a, b in zip(statistics_fn(PARAMS, x)[0], statistics_fn(PARAMS, TRUTH.inputs)[0], strict=True)
        )
    ),
}
OFF = dict.fromkeys((*TERMS, "consistency_weight"), 0.0)


def reported_losses(**options: Any) -> tuple[np.ndarray, Any]:
    """The loss of every seed and the seeds, at the start."""
    attack, observation = make(**options), seen()
    state = attack.init(jax.random.key(0), observation)
    found = jax.jit(attack.finalize)(state.candidate, observation)
    assert float(found.loss) == pytest.approx(float(found.restart_losses.min()))
    return np.asarray(found.restart_losses), state.candidate


def match(candidate: Any) -> np.ndarray:
    """The paper's gradient term of every seed: L2 distances, summed over layers."""

    def one(inputs: jax.Array, classes: jax.Array) -> float:
        pairs = zip(
            jax.tree.leaves(CLIENT(PARAMS, Batch(inputs, classes))), jax.tree.leaves(seen().update), strict=True
        )
        return sum(float(jnp.linalg.norm(a - b)) for a, b in pairs)

    return np.asarray([one(*seed) for seed in zip(candidate.variables, candidate.labels, strict=True)])


def test_without_priors_the_loss_is_the_weighted_distance_of_gradients() -> None:
    losses, candidate = reported_losses(match_weight=0.5, **OFF)
    np.testing.assert_allclose(losses, 0.5 * match(candidate), rtol=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_each_term_adds_itself_and_nothing_else(name: str) -> None:
    losses, candidate = reported_losses(match_weight=1.0, **(OFF | {name: 3.0}))
    term = np.asarray([TERMS[name](inputs) for inputs in candidate.variables])
    np.testing.assert_allclose(losses, match(candidate) + 3 * term, rtol=1e-5)


def test_the_group_adds_the_distance_from_its_consensus() -> None:
    losses, candidate = reported_losses(
        match_weight=1.0, consensus_fn=group.mean, **(OFF | {"consistency_weight": 3.0})
    )
    x = np.asarray(candidate.variables)
    distances = np.sqrt(np.sum((x - x.mean(0)) ** 2, (1, 2, 3, 4)))
    np.testing.assert_allclose(losses, match(candidate) + 3 * distances, rtol=1e-5)


def test_noise_is_added_to_the_pixels_after_the_update_and_shrinks_with_the_rate() -> None:
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, 4, 20)
    key, observation = jax.random.key(5), seen()
    steps = [jax.jit(make(noise_scale=scale).step) for scale in (0.0, 2.0)]
    for count in (4, 15):
        start = at_step(make(), count)
        (quiet, _), (noisy, _) = (step(key, start, observation) for step in steps)
        noise = (noisy.candidate.variables - quiet.candidate.variables) / (2 * rate(count))
        expected = [jax.random.normal(_noise_key(seed), noise.shape[1:]) for seed in jax.random.split(key, 3)]
        np.testing.assert_allclose(noise, jnp.stack(expected), atol=2e-4)


def _noise_key(key: jax.Array) -> jax.Array:
    """What `optax.tree.random_like` makes of a key for a tree of one leaf."""
    return jax.random.split(key, 1)[0]


def test_the_key_of_a_step_is_the_key_of_its_noise() -> None:
    observation, attack = seen(), make()
    before = at_step(attack, 4)
    step = jax.jit(attack.step)
    first, again, other = (step(jax.random.key(k), before, observation)[0].candidate.variables for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    seeds = first - before.candidate.variables
    assert not np.allclose(seeds[0], seeds[1], atol=1e-3)


def test_labels_are_read_from_the_columns() -> None:
    candidate = make().init(jax.random.key(0), seen()).candidate
    assert candidate.variables.shape == (3, 2, *SHAPE)
    assert [sorted(seed) for seed in candidate.labels.tolist()] == [[1, 3]] * 3


def test_a_seed_that_breaks_is_never_chosen_and_breaks_no_other() -> None:
    attack, observation = make(), seen()
    state = attack.init(jax.random.key(0), observation)
    variables = state.candidate.variables.at[1].set(jnp.nan)
    state = state._replace(candidate=state.candidate._replace(variables=variables))
    state, info = jax.jit(attack.step)(jax.random.key(0), state, observation)
    assert np.isfinite(info.loss)
    found = jax.jit(attack.finalize)(state.candidate, observation)
    assert found.is_finite
    assert np.isfinite(found.restart_losses).tolist() == [True, False, True]


def test_the_true_gradient_gives_the_images_away_and_noise_does_not() -> None:
    attack = gia_jax.keep_best(make(match_weight=1.0, num_steps=400, noise_scale=0.02, statistics_weight=1e-3))
    solve = jax.jit(lambda key, observation: gia_jax.run(attack, key, observation, num_steps=400)[0])
    observation = seen()
    noise = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(2), leaf.shape), observation.update)
    errors = []
    for update in (observation.update, noise):
        found = solve(jax.random.key(3), observation._replace(update=update))
        truth = TRUTH.inputs[jnp.argsort(TRUTH.labels)]
        errors.append(float(jnp.mean((found.batch.inputs[jnp.argsort(found.batch.labels)] - truth) ** 2)))
    assert errors[0] < 0.1 < 0.5 < errors[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_seeds": 0}, "num_seeds must be an integer of at least 1, got 0"),
        ({"num_steps": 4}, "num_steps must be above num_warm_up_steps=4, got 4"),
        ({"num_warm_up_steps": -1}, "num_warm_up_steps must be an integer of at least 0, got -1"),
        ({"match_weight": 0.0}, "match_weight must be positive, got 0"),
        ({"learning_rate": -0.1}, r"learning_rate must be positive, got -0\.1"),
        ({"noise_scale": -1.0}, "noise_scale must not be negative, got -1"),
        ({"statistics_weight": -1.0}, "weight must not be negative, got -1"),
        ({"bounds": (1.0, -1.0)}, r"low must be below high=-1\.0, got 1\.0"),
    ],
)
def test_wrong_arguments_are_named_with_their_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_labels_known_to_repeat_are_refused() -> None:
    twice = TRUTH._replace(labels=jnp.array([1, 1]))
    attack = make(label_fn=gia_jax.granted_labels)
    with pytest.raises(ValueError, match=r"labels must be distinct, .* got \[1, 1\]"):
        attack.init(jax.random.key(0), seen(twice, labels=True))
    attack.init(jax.random.key(0), seen(labels=True))


def test_more_images_than_classes_are_refused() -> None:
    five = Batch(jnp.zeros((5, *SHAPE)), jnp.arange(5) % 4)
    with pytest.raises(ValueError, match="a batch of 5 is more than 4 classes"):
        make().init(jax.random.key(0), seen(five))


def test_statistics_that_are_missing_or_do_not_fit_are_named() -> None:
    observation = seen()
    state = jax.eval_shape(make().init, jax.random.key(0), observation)
    (mean, variance), *_ = observation.extra["statistics"]
    cases = {
        r"statistics\[0\]\[1\] has shape \(1,\), expected \(16,\)": [(mean, variance[:1])],
        "got 2 for 1 layers": [(mean, variance)] * 2,
    }
    for message, wrong in cases.items():
        extra = {**observation.extra, "statistics": wrong}
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(make().step, jax.random.key(0), state, observation._replace(extra=extra))
    with pytest.raises(ValueError, match="does not grant 'statistics'"):
        jax.eval_shape(make().step, jax.random.key(0), state, seen(statistics=False))
    jax.eval_shape(make(statistics_fn=None).step, jax.random.key(0), state, seen(statistics=False))
