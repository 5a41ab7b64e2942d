"""The drivers, against Python loops over the attack's own functions."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gia_jax import (
    Batch,
    Observation,
    Reconstruction,
    advance,
    attacks,
    choose,
    continued,
    gradient_matching,
    keep_best,
    restarts,
    run,
    solve,
)
from gia_jax.matching import best_of, initializations, optimizers

LABELS = jnp.array([0, 1])
WANTED = jnp.array([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]])
OBSERVATION = Observation({"w": jnp.zeros((2, 3))}, {"w": WANTED}, {"labels": LABELS, "inputs_like": jnp.zeros((2, 3))})
START = jnp.ones((2, 3))


def client_fn(params, batch):
    """A smooth toy: the update shows the inputs through a bent scale."""
    return {"w": params["w"] + batch.inputs + 0.3 * jnp.sin(2 * batch.inputs)}


def matching(optimizer, start=None, **kwargs):
    init_fn = initializations.normal() if start is None else initializations.given(start)
    return gradient_matching(client_fn, init_fn=init_fn, optimizer=optimizer, **kwargs)


def noisy(scale=0.3):
    """An attack whose every step depends on its key, and whose last iterate is rarely its best."""
    return matching(optax.chain(optax.adam(0.3), optimizers.langevin_noise(scale)))


def loss_of(inputs):
    return float(jnp.sum((client_fn(OBSERVATION.params, Batch(inputs, LABELS))["w"] - WANTED) ** 2))


class Visit(NamedTuple):
    inputs: np.ndarray
    loss: float


def visited(attack, key, num_steps):
    """Every candidate of a run with the loss that `finalize` gives it, by a Python loop."""
    key_init, key_steps = jax.random.split(key)
    state, step = attack.init(key_init, OBSERVATION), jax.jit(attack.step)
    states = [state]
    for t in range(num_steps):
        state, _ = step(jax.random.fold_in(key_steps, t), state, OBSERVATION)
        states.append(state)
    return [Visit(np.asarray(s.candidate.variables), loss_of(s.candidate.variables)) for s in states]


def test_run_is_the_loop_over_steps():
    attack, key = noisy(), jax.random.key(0)
    loop = visited(attack, key, 12)
    found, info = jax.jit(lambda k: run(attack, k, OBSERVATION, num_steps=12))(key)
    np.testing.assert_allclose(found.batch.inputs, loop[-1].inputs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.loss, loop[-1].loss, rtol=1e-4)
    np.testing.assert_allclose(info.loss, [visit.loss for visit in loop[:-1]], rtol=1e-4)
    assert found.restart_losses == ()


def test_run_depends_on_its_key_alone():
    fn = jax.jit(lambda k: run(noisy(), k, OBSERVATION, num_steps=5)[0].batch.inputs)
    np.testing.assert_array_equal(fn(jax.random.key(0)), fn(jax.random.key(0)))
    assert np.all(fn(jax.random.key(0)) != fn(jax.random.key(1)))


def test_start_and_steps_do_not_share_randomness():
    # Steps of noise alone: were a step's draw the start's, they would be equal or opposite.
    attack = matching(optax.chain(optax.sgd(0.0), optimizers.langevin_noise(1.0)))
    visits = [visit.inputs for visit in visited(attack, jax.random.key(3), 3)]
    draws = [visits[0], *np.diff(visits, axis=0)]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert not np.any(np.isclose(one, other))


@pytest.mark.parametrize("num_steps", [0, -3])
def test_run_refuses_a_number_of_steps_below_one(num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be an integer from 1 to 2147483647, got {num_steps}"):
        run(noisy(), jax.random.key(0), OBSERVATION, num_steps=num_steps)


def test_run_refuses_non_finite_observations_outside_of_a_trace():
    poisoned = OBSERVATION._replace(update={"w": WANTED.at[1, 2].set(jnp.nan)})
    with pytest.raises(ValueError, match=r"observation must be finite, got nan at observation\.update\['w'\]"):
        run(noisy(), jax.random.key(0), poisoned, num_steps=2)
    found, _ = jax.jit(lambda o: run(noisy(), jax.random.key(0), o, num_steps=2))(poisoned)
    assert not found.is_finite  # inside, failure is a value


@pytest.mark.parametrize("cuts", [(4, 6), (1, 1, 8), (10,)])
def test_a_run_may_be_cut_anywhere(cuts):
    attack, key = noisy(), jax.random.key(5)
    state = attack.init(jax.random.key(6), OBSERVATION)
    whole, info = advance(attack, key, state, OBSERVATION, start=0, num_steps=10)
    done, infos = 0, []
    for count in cuts:
        resume = jax.jit(
            lambda s, start, count=count: advance(attack, key, s, OBSERVATION, start=start, num_steps=count)
        )
        state, part = resume(state, done)  # `start` is traced
        done, infos = done + count, [*infos, part.loss]
    np.testing.assert_allclose(state.candidate.variables, whole.candidate.variables, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.concatenate(infos), info.loss, rtol=1e-4)


def test_without_the_start_offset_the_noise_would_repeat():
    attack, key = noisy(), jax.random.key(5)
    state, _ = advance(attack, key, attack.init(key, OBSERVATION), OBSERVATION, start=0, num_steps=3)
    right, _ = advance(attack, key, state, OBSERVATION, start=3, num_steps=3)
    wrong, _ = advance(attack, key, state, OBSERVATION, start=0, num_steps=3)
    assert not np.allclose(right.candidate.variables, wrong.candidate.variables)


@pytest.mark.parametrize("seed", range(4))
def test_keep_best_returns_the_best_candidate_that_was_visited(seed):
    attack, key = noisy(), jax.random.key(seed)
    loop = visited(attack, key, 15)
    best = min(loop, key=lambda visit: visit.loss)
    found, info = jax.jit(lambda k: run(keep_best(attack), k, OBSERVATION, num_steps=15))(key)
    np.testing.assert_allclose(found.batch.inputs, best.inputs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.loss, best.loss, rtol=1e-4)
    np.testing.assert_allclose(found.loss, loss_of(found.batch.inputs), rtol=1e-4)  # the loss is that candidate's own
    assert found.loss <= loop[-1].loss * (1 + 1e-5)
    np.testing.assert_allclose(info.loss, [visit.loss for visit in loop[:-1]], rtol=1e-4)  # the search is unchanged


def test_keep_best_takes_the_last_candidate_where_it_is_the_best():
    attack = matching(optax.sgd(0.05), START)  # descends in every step
    plain, _ = run(attack, jax.random.key(0), OBSERVATION, num_steps=5)
    best, _ = run(keep_best(attack), jax.random.key(0), OBSERVATION, num_steps=5)
    np.testing.assert_array_equal(best.batch.inputs, plain.batch.inputs)
    np.testing.assert_allclose(best.loss, plain.loss)


def broken_after(steps, value=jnp.nan):
    """Descends for some steps, then writes `value` into the inputs."""

    def update_fn(updates, state, params=None):
        del params
        moved = jax.tree.map(lambda g: jnp.where(state < steps, -0.05 * g, value), updates)
        return moved, state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update_fn)


def test_keep_best_never_returns_nan_iterates():
    attack = matching(broken_after(4), START)
    plain, _ = run(attack, jax.random.key(0), OBSERVATION, num_steps=9)
    assert not plain.is_finite
    kept, info = run(keep_best(attack), jax.random.key(0), OBSERVATION, num_steps=9)
    assert kept.is_finite
    np.testing.assert_allclose(kept.loss, info.loss[4], rtol=1e-5)
    np.testing.assert_allclose(kept.loss, loss_of(kept.batch.inputs), rtol=1e-5)


def test_keep_best_of_nothing_finite_says_so():
    attack = matching(broken_after(0), jnp.full((2, 3), jnp.nan))
    kept, _ = jax.jit(lambda k: run(keep_best(attack), k, OBSERVATION, num_steps=3))(jax.random.key(0))
    assert not kept.is_finite


def test_keep_best_flags_infinite_inputs_of_finite_loss():
    # A client that clips its inputs hides from the loss that the search has run away.
    def clipping_fn(params, batch):
        return client_fn(params, batch._replace(inputs=jnp.clip(batch.inputs, -1, 1)))

    attack = gradient_matching(clipping_fn, init_fn=initializations.given(-START), optimizer=broken_after(0, jnp.inf))
    kept, _ = run(keep_best(attack), jax.random.key(0), OBSERVATION, num_steps=3)
    assert np.isfinite(kept.batch.inputs).all() == bool(kept.is_finite)


@pytest.mark.parametrize("wrap", [lambda attack: attack, keep_best], ids=["plain", "keep_best"])
def test_continued_starts_where_the_first_attack_ended(wrap):
    # From a given start a step without noise depends on no key; the second attack stays where it is put.
    first = wrap(matching(optax.sgd(0.7), START))  # too long a step: the last iterate is not the best
    second = matching(optax.sgd(0.0), jnp.zeros((2, 3)))
    alone, _ = run(first, jax.random.key(0), OBSERVATION, num_steps=7)
    both, info = run(continued(first, second, num_steps=7), jax.random.key(1), OBSERVATION, num_steps=2)
    expected = alone.batch.inputs
    if wrap is keep_best:  # the last candidate is not measured yet: the best of those before it
        expected = min(visited(matching(optax.sgd(0.7), START), jax.random.key(0), 6), key=lambda v: v.loss).inputs
    np.testing.assert_allclose(both.batch.inputs, expected, rtol=1e-5)
    assert info.loss.shape == (2,)


def test_continued_is_better_than_its_first_attack():
    first, second = matching(optax.adam(0.1)), matching(optimizers.fixed_step_lbfgs())
    alone, _ = run(first, jax.random.key(0), OBSERVATION, num_steps=10)
    both, _ = run(keep_best(continued(first, second, num_steps=10)), jax.random.key(0), OBSERVATION, num_steps=15)
    assert both.loss < 1e-3 * alone.loss
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 1, got 0"):
        continued(first, second, num_steps=0)


def test_an_attack_says_how_many_steps_its_schedule_has():
    attack = noisy()._replace(num_steps=4)
    found, info = jax.jit(lambda key: run(attack, key, OBSERVATION))(jax.random.key(0))
    assert info.loss.shape == (4,)
    for wrapped in (attack, keep_best(attack), continued(noisy(), attack, num_steps=2)):
        assert wrapped.num_steps == 4
        with pytest.raises(ValueError, match="num_steps must be the 4 of the attack's schedule, got 5"):
            run(wrapped, jax.random.key(0), OBSERVATION, num_steps=5)
    chex.assert_trees_all_equal(
        found, jax.jit(lambda key: run(noisy(), key, OBSERVATION, num_steps=4))(jax.random.key(0))[0]
    )
    for missing in (lambda: run(noisy(), jax.random.key(0), OBSERVATION), lambda: solve(noisy())):
        with pytest.raises(
            ValueError, match="num_steps must be given for an attack without a schedule of its own, got"
        ):
            missing()


def test_papers_with_a_schedule_carry_its_steps_and_an_optimizer_of_ones_own_has_none():
    make = functools.partial(attacks.inverting_gradients, client_fn, bounds=(-3.0, 3.0), num_steps=7)
    assert make().num_steps == 7
    assert make(optimizer=optax.adam(0.1)).num_steps is None


def test_solve_is_the_best_step_of_the_best_restart():
    by_hand = restarts(lambda key, seen: run(keep_best(noisy()), key, seen, num_steps=4)[0], 3)
    ways = [
        jax.jit(way)(jax.random.key(0), OBSERVATION) for way in (solve(noisy(), num_steps=4, num_restarts=3), by_hand)
    ]
    chex.assert_trees_all_equal(*ways)
    with pytest.raises(ValueError, match="num_restarts must be an integer from 1 to 2147483647, got 0"):
        solve(noisy(), num_steps=4, num_restarts=0)


def reconstruct_fn(key, observation):
    return run(keep_best(noisy()), key, observation, num_steps=4)[0]


@pytest.mark.parametrize("batch_size", [None, 1, 2, 16])
def test_restarts_are_the_python_loop(batch_size):
    key, count = jax.random.key(11), 5
    found = jax.jit(restarts(reconstruct_fn, count, batch_size=batch_size))(key, OBSERVATION)
    one = jax.jit(reconstruct_fn)
    loop = [one(k, OBSERVATION) for k in jax.random.split(key, count)]
    losses = np.array([float(r.loss) for r in loop])
    np.testing.assert_allclose(found.restart_losses, losses, rtol=1e-4)
    assert np.unique(losses).size == count
    np.testing.assert_allclose(found.loss, losses.min(), rtol=1e-4)
    np.testing.assert_allclose(found.batch.inputs, loop[losses.argmin()].batch.inputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("count", "batch_size", "name"), [(0, 4, "num_restarts"), (3, 0, "batch_size")])
def test_restarts_refuse_counts_below_one(count, batch_size, name):
    with pytest.raises(ValueError, match=f"{name} must be an integer .*, got 0"):
        restarts(reconstruct_fn, count, batch_size=batch_size)


def stacked(losses, is_finite):
    inputs = jnp.arange(len(losses), dtype=jnp.float32)[:, None, None] * jnp.ones((1, 2, 3))
    labels = jnp.tile(LABELS, (len(losses), 1))
    return Reconstruction(Batch(inputs, labels), jnp.array(losses), jnp.array(is_finite))


@pytest.mark.parametrize(
    ("losses", "is_finite", "index"),
    [
        ([3.0, 1.0, 2.0], [True, True, True], 1),
        ([jnp.nan, 5.0, 4.0], [False, True, True], 2),
        ([jnp.nan, 5.0, 4.0], [True, True, True], 2),  # the loss speaks for itself
        ([-jnp.inf, 5.0, jnp.inf], [True, True, True], 1),
        ([0.0, 5.0, 7.0], [False, True, True], 1),  # inputs that are not finite, with a finite loss
    ],
)
def test_choose_takes_the_lowest_finite_loss(losses, is_finite, index):
    chosen = choose(stacked(losses, is_finite))
    assert float(chosen.batch.inputs[0, 0]) == index
    assert chosen.loss == losses[index]
    assert chosen.is_finite
    np.testing.assert_array_equal(chosen.restart_losses, losses)


def test_choose_among_failures_is_a_failure():
    assert not choose(stacked([jnp.nan, 2.0], [False, False])).is_finite


def test_best_of_takes_the_assumption_of_the_lowest_finite_loss():
    def assumed(loss, pixel):
        def reconstruct(key, observation):
            del key, observation
            found = Batch(jnp.full((1, 2), pixel), jnp.array([0]))
            return Reconstruction(found, jnp.asarray(loss), jnp.isfinite(loss), restart_losses=jnp.ones(int(pixel)))

        return reconstruct

    losses = [0.5, jnp.nan, 0.1, 0.3]
    attack_fn = best_of([assumed(loss, pixel) for loss, pixel in zip(losses, (1.0, 2.0, 3.0, 4.0))])
    found = jax.jit(attack_fn)(jax.random.key(0), OBSERVATION)
    assert float(found.batch.inputs[0, 0]) == 3.0
    np.testing.assert_allclose(found.restart_losses, losses)


def test_best_of_gives_each_assumption_a_key_of_its_own():
    found = best_of([reconstruct_fn] * 3)(jax.random.key(0), OBSERVATION)
    alone = [reconstruct_fn(key, OBSERVATION).loss for key in jax.random.split(jax.random.key(0), 3)]
    np.testing.assert_array_equal(found.restart_losses, alone)
    assert len(set(np.array(alone).tolist())) == 3


@pytest.mark.usefixtures("unchecked")
def test_best_of_refuses_nothing_and_reconstructions_of_other_shapes():
    with pytest.raises(ValueError, match=r"reconstruct_fns must hold at least one attack, got \[\]"):
        best_of([])
    with pytest.raises(ValueError, match=r"reconstruct_fns\[0\] must be a function, got None"):
        best_of([None])

    def larger_fn(key, observation):
        found = reconstruct_fn(key, observation)
        return found._replace(batch=jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), found.batch))

    with pytest.raises(ValueError, match=r"reconstruct_fns\[1\].* does not fit reconstruct_fns\[0\]"):
        best_of([reconstruct_fn, larger_fn])(jax.random.key(0), OBSERVATION)
