"""The path of an attack, against a closed form and against runs that stop at its points."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gia_jax import (
    Attack,
    AttackInfo,
    AttackState,
    Batch,
    Observation,
    Reconstruction,
    attacks,
    clients,
    continued,
    gradient_matching,
    keep_best,
    keep_path,
    restarts,
    run,
    solve,
)
from gia_jax.labels import dense
from gia_jax.matching import group, initializations, optimizers, path_steps
from gia_jax.matching.run import from_starts

KEY = jax.random.key(0)
OBSERVATION = Observation((), jnp.array([64.0, -128.0]))
LABELS = jnp.array([0, 1])
WANTED = jnp.array([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]])
SEEN = Observation({"w": jnp.zeros((2, 3))}, {"w": WANTED}, {"labels": LABELS, "inputs_like": jnp.zeros((2, 3))})


def halving(factor: float = 0.5) -> Attack:
    """An attack that multiplies the distance from the update with every step: after t steps it is factor ** t."""

    def init(key: jax.Array, observation: Observation) -> AttackState:
        return AttackState(jnp.zeros(2), ())

    def step(key: jax.Array, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
        error = state.candidate - observation.update
        return AttackState(observation.update + factor * error, ()), AttackInfo(*[error @ error] * 3)

    def finalize(candidate: jax.Array, observation: Observation) -> Reconstruction:
        error = candidate - observation.update
        return Reconstruction(Batch(candidate[None], jnp.array([0])), error @ error, jnp.isfinite(error @ error))

    return Attack(init, step, finalize)


def client_fn(params: Any, batch: Batch) -> Any:
    return {"w": params["w"] + batch.inputs + 0.3 * jnp.sin(2 * batch.inputs)}


def noisy() -> Attack:
    """An attack whose every step depends on its key, and whose last iterate is rarely its best."""
    optimizer = optax.chain(optax.adam(0.3), optimizers.langevin_noise(0.3))
    return gradient_matching(client_fn, init_fn=initializations.normal(), optimizer=optimizer)


def _after(attack: Attack, steps: int, **options: Any) -> Any:
    return jax.jit(lambda key: run(attack, key, SEEN, num_steps=steps, **options)[0])(KEY)


def _same(actual: Any, desired: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


@pytest.mark.parametrize(
    ("num_points", "num_steps", "steps"),
    [(1, 7, [7]), (7, 7, [1, 2, 3, 4, 5, 6, 7]), (2, 7, [4, 7]), (3, 10, [4, 7, 10]), (4, 8, [2, 4, 6, 8])],
)
def test_a_path_is_the_closed_form(num_points: int, num_steps: int, steps: list[int]) -> None:
    assert path_steps(num_points, num_steps).tolist() == steps
    attack = keep_path(halving(), num_points=num_points, num_steps=num_steps)
    found, info = jax.jit(lambda key: run(attack, key, OBSERVATION))(KEY)
    wanted = OBSERVATION.update * (1 - 0.5 ** np.array(steps))[:, None]
    np.testing.assert_array_equal(found.path.inputs[:, 0], wanted)
    np.testing.assert_array_equal(found.path.labels, np.zeros((num_points, 1)))
    assert info.loss.shape == (num_steps,)


def test_steps_of_long_runs_do_not_overflow() -> None:
    steps = path_steps(1_000, 2**31 - 1)
    assert steps[-1] == 2**31 - 1
    assert set(np.diff(steps)) == {2_147_483, 2_147_484}


@pytest.mark.parametrize("wrap", [lambda attack: attack, keep_best], ids=["plain", "keep_best"])
def test_the_reconstruction_stays_the_same(wrap: Any) -> None:
    plain = _after(wrap(noisy()), 11)
    found = _after(keep_path(wrap(noisy()), num_points=4, num_steps=11), 11)
    _same(found._replace(path=()), plain)
    _same(jax.tree.map(lambda leaf: leaf[-1], found.path), plain.batch)
    assert plain.path == ()


def test_points_are_what_shorter_runs_return() -> None:
    found = _after(keep_path(noisy(), num_points=4, num_steps=11), 11)
    for place, steps in enumerate(path_steps(4, 11).tolist()):
        np.testing.assert_allclose(found.path.inputs[place], _after(noisy(), steps).batch.inputs, rtol=1e-6)


def test_points_of_keep_best_are_the_best_that_were_measured() -> None:
    found = _after(keep_path(keep_best(noisy()), num_points=11, num_steps=11), 11)
    visited = _after(keep_path(noisy(), num_points=11, num_steps=11), 11).path.inputs
    losses = jax.jit(lambda key: run(noisy(), key, SEEN, num_steps=11)[1].loss)(KEY)  # of the start and ten steps
    starts = noisy().init(jax.random.split(KEY)[0], SEEN).candidate.variables
    candidates = np.concatenate([starts[None], visited])
    best = [int(np.argmin(losses[:steps])) for steps in range(1, 11)]
    assert len(set(best)) > 3
    assert best != sorted(range(10))
    np.testing.assert_allclose(found.path.inputs[:10], candidates[best], rtol=1e-6)
    _same(found.path.inputs[10], found.batch.inputs)


def test_keep_best_of_a_path_keeps_all_of_the_path() -> None:
    """The path goes on where the attack is no longer at its best."""
    attack = keep_path(halving(-2.0), num_points=4, num_steps=4)  # it diverges
    found, _ = jax.jit(lambda key: run(keep_best(attack), key, OBSERVATION))(KEY)
    np.testing.assert_array_equal(found.batch.inputs[0], [0.0, 0.0])
    wanted = OBSERVATION.update * (1 - (-2.0) ** np.arange(1, 5))[:, None]
    np.testing.assert_array_equal(found.path.inputs[:, 0], wanted)
    best = _after(keep_best(noisy()), 11)
    _same(_after(keep_best(keep_path(noisy(), num_points=3, num_steps=11)), 11)._replace(path=()), best)


def test_solve_and_restarts_return_the_path_of_the_chosen_restart() -> None:
    plain = jax.jit(solve(noisy(), num_steps=9, num_restarts=5))(KEY, SEEN)
    for attack in (
        keep_path(noisy(), num_points=3, num_steps=9),
        keep_path(keep_best(noisy()), num_points=3, num_steps=9),
    ):
        found = jax.jit(solve(attack, num_restarts=5))(KEY, SEEN)
        _same(found._replace(path=()), plain)
        assert found.path.inputs.shape == (3, 2, 3)
    once = keep_path(keep_best(noisy()), num_points=3, num_steps=9)
    again = jax.jit(restarts(lambda key, seen: run(once, key, seen)[0], 5))(KEY, SEEN)
    chosen = jax.random.split(KEY, 5)[int(again.restart_losses.argmin())]
    alone = jax.jit(lambda key: run(once, key, SEEN)[0])(chosen)
    jax.tree.map(lambda a, d: np.testing.assert_allclose(a, d, rtol=1e-5), again.path, alone.path)


def test_victims_under_vmap_have_paths_of_their_own() -> None:
    attack = keep_path(keep_best(halving()), num_points=2, num_steps=4)
    updates = jnp.array([[64.0, -128.0], [32.0, 16.0], [0.0, 8.0]])
    every = jax.jit(jax.vmap(lambda key, update: run(attack, key, Observation((), update))[0], (None, 0)))(KEY, updates)
    # After two and three steps the best that was measured is one step behind; the last point is the reconstruction.
    wanted = updates[:, None] * (1 - 0.5 ** np.array([1, 4]))[:, None]
    np.testing.assert_array_equal(every.path.inputs[:, :, 0], wanted)


def test_warm_ups_and_starts_and_seeds_are_not_in_the_way() -> None:
    both = continued(keep_best(noisy()), noisy(), num_steps=4, num_starts=3)
    plain = _after(both, 6)
    found = _after(keep_path(both, num_points=2, num_steps=6), 6)
    _same(found._replace(path=()), plain)
    _same(found.path.inputs[1], plain.batch.inputs)
    starts = _after(from_starts(keep_path(noisy(), num_points=2, num_steps=6), 3), 6)
    _same(starts.path.inputs[1], starts.batch.inputs)
    seeds = group.together(noisy(), 3, group.mean)
    of_seeds = _after(keep_path(keep_best(seeds), num_points=2, num_steps=6), 6)
    _same(of_seeds._replace(path=()), _after(keep_best(seeds), 6))
    assert of_seeds.path.inputs.shape == (2, 2, 3)


def test_grad_inversion_has_a_path() -> None:
    loss_fn = clients.cross_entropy(lambda params, x: x.reshape(len(x), -1) @ params["head"]["kernel"])
    client = clients.federated_sgd(loss_fn)
    params = {"head": {"kernel": jnp.ones((4, 3))}}
    truth = Batch(jnp.eye(2, 4).reshape(2, 2, 2, 1), jnp.array([2, 0]))
    seen = Observation(params, client(params, truth), {"inputs_like": jnp.zeros((2, 2, 2, 1))})
    attack = attacks.grad_inversion(
        client, dense("head"), statistics_fn=None, num_seeds=2, num_steps=4, num_warm_up_steps=0
    )
    found = jax.jit(lambda key: run(keep_path(attack, num_points=2), key, seen)[0])(KEY)
    _same(found._replace(path=()), jax.jit(lambda key: run(attack, key, seen)[0])(KEY))
    _same(jax.tree.map(lambda leaf: leaf[-1], found.path), found.batch)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("num_points", [0, 5, 2.0, True])
def test_a_number_of_points_out_of_range_is_refused(num_points: Any) -> None:
    with pytest.raises(ValueError, match=f"num_points must be an integer from 1 to 4, got {num_points}"):
        keep_path(halving(), num_points=num_points, num_steps=4)


def test_numbers_of_steps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps must be given for an attack without a schedule"):
        keep_path(halving(), num_points=2)
    with pytest.raises(ValueError, match="num_steps must be the 6 of the attack's schedule, got 4"):
        keep_path(halving()._replace(num_steps=6), num_points=2, num_steps=4)
    with pytest.raises(ValueError, match="num_steps must be the 4 of the attack's schedule, got 5"):
        run(keep_path(halving(), num_points=2, num_steps=4), KEY, OBSERVATION, num_steps=5)


def test_points_that_do_not_fit_into_memory_are_refused() -> None:
    large = gradient_matching(client_fn, init_fn=lambda *_: jnp.zeros((2, 2**23)))
    seen = Observation({"w": jnp.zeros((2, 1))}, {"w": jnp.zeros((2, 1))}, {"labels": LABELS})
    with pytest.raises(ValueError, match=r"num_points must fit into memory: it needs 62,500 GiB of .* got 1000000"):
        jax.eval_shape(keep_path(large, num_points=10**6, num_steps=10**6).init, KEY, seen)
