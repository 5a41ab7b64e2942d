"""Group consistency: phase correlation finds shifts it was given, and the group's pull is the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gia_jax
from gia_jax import Attack, AttackInfo, AttackState, Batch, Observation, Reconstruction
from gia_jax.matching import group

NOTHING_SEEN = Observation({}, {}, {})


def photos(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


REGISTER = {flips: jax.jit(lambda a, b, f=flips: group.register(a, b, flips=f)) for flips in (False, True)}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.integers(0, 8), st.booleans(), st.integers(0, 99))
def test_a_shift_and_a_flip_are_undone_exactly(down: int, right: int, flip: bool, seed: int) -> None:
    image = photos(7, 9, 2, seed=seed)
    moved = np.roll(image[:, ::-1] if flip else image, (down, right), (0, 1))
    np.testing.assert_array_equal(REGISTER[True](moved, image), image)
    if not flip:
        np.testing.assert_array_equal(REGISTER[False](moved, image), image)


def test_a_flip_that_is_not_allowed_is_not_undone() -> None:
    image = photos(7, 9, 2)
    assert np.abs(REGISTER[False](image[:, ::-1].copy(), image) - image).max() > 1


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_phase_correlation_of_a_shifted_copy_is_one_spike_of_any_contrast(scale: float) -> None:
    image = photos(8, 6, 3)
    spike = np.zeros((8, 6))
    spike[3, 2] = 1
    correlation = group.phase_correlation(jnp.asarray(scale * image), jnp.asarray(np.roll(image, (3, 2), (0, 1))))
    np.testing.assert_allclose(correlation, spike, atol=1e-5)


def test_flat_images_stay_where_they_are() -> None:
    flat, image = jnp.ones((5, 5, 1)), jnp.asarray(photos(5, 5, 1))
    np.testing.assert_array_equal(group.register(flat, image), flat)
    np.testing.assert_array_equal(group.register(image, jnp.zeros((5, 5, 1))), image)


def test_a_seed_that_was_moved_is_brought_back_before_the_mean() -> None:
    truth = photos(2, 8, 8, 3)
    seeds = np.stack([truth, truth, np.roll(truth, (2, 5), (1, 2)), truth])
    np.testing.assert_allclose(group.registered_mean()(jnp.asarray(seeds)), truth, atol=1e-6)
    assert np.abs(group.mean(jnp.asarray(seeds)) - truth).max() > 0.5
    mirrored = seeds.copy()
    mirrored[2] = mirrored[2, :, :, ::-1]
    np.testing.assert_allclose(group.registered_mean(flips=True)(jnp.asarray(mirrored)), truth, atol=1e-6)


@pytest.mark.parametrize("consensus_fn", [group.mean, group.registered_mean()])
def test_a_seed_that_is_not_finite_does_not_take_part(consensus_fn: group.ConsensusFn) -> None:
    seeds = jnp.asarray(photos(4, 2, 5, 5, 1))
    for bad in (jnp.nan, jnp.inf):
        broken = seeds.at[2, 0, 1, 1].set(bad)
        np.testing.assert_allclose(consensus_fn(broken), consensus_fn(seeds[jnp.array([0, 1, 3])]), atol=1e-6)


def test_registration_needs_images() -> None:
    with pytest.raises(ValueError, match=r"needs images of shape \(b, h, w, c\), got \(2, 5\)"):
        group.registered_mean()(jnp.zeros((3, 2, 5)))


def test_the_pull_of_the_group_is_the_unit_vector_away_from_it() -> None:
    x, consensus = jnp.asarray(photos(2, 4, 4, 1)), jnp.asarray(photos(2, 4, 4, 1, seed=1))
    observation = NOTHING_SEEN._replace(extra={"consensus": consensus})
    labels = jnp.zeros(2, jnp.int32)
    slope_fn = jax.grad(lambda inputs: group.consistency(Batch(inputs, labels), observation))
    np.testing.assert_allclose(slope_fn(x), (x - consensus) / jnp.linalg.norm(x - consensus), rtol=1e-5)
    np.testing.assert_array_equal(slope_fn(consensus), 0 * x)


def descent() -> Attack:
    """Gradient descent at rate 0.1 on the distance from the consensus alone."""

    class Candidate(gia_jax.matching.solver.Candidate):
        pass

    def loss_fn(inputs: jax.Array, observation: Observation) -> jax.Array:
        return group.consistency(Batch(inputs, jnp.zeros(1, jnp.int32)), observation)

    def init(key: jax.Array, observation: Observation) -> AttackState:
        return AttackState(Candidate(jax.random.normal(key, (1, 3)), ()), ())

    def step(key: jax.Array, state: AttackState, observation: Observation) -> tuple[AttackState, AttackInfo]:
        loss, slope = jax.value_and_grad(loss_fn)(state.candidate.variables, observation)
        candidate = Candidate(state.candidate.variables - 0.1 * slope, ())
        return AttackState(candidate, ()), AttackInfo(loss, loss, jnp.linalg.norm(slope))

    def finalize(candidate: Candidate, observation: Observation) -> Reconstruction:
        batch = Batch(candidate.variables, jnp.zeros(1, jnp.int32))
        return Reconstruction(batch, loss_fn(batch.inputs, observation), jnp.asarray(True))

    return Attack(init, step, finalize)


def test_seeds_talk_and_no_derivative_goes_through_what_they_say() -> None:
    attack = group.together(descent(), 4, group.mean)
    state = attack.init(jax.random.key(0), NOTHING_SEEN)
    x = np.asarray(state.candidate.variables)
    away = x - x.mean(0)
    lengths = np.linalg.norm(away, axis=(1, 2), keepdims=True)
    after, info = attack.step(jax.random.key(1), state, NOTHING_SEEN)
    np.testing.assert_allclose(after.candidate.variables, x - 0.1 * away / lengths, atol=1e-6)
    assert float(info.loss) == pytest.approx(lengths.min(), rel=1e-5)
    found = attack.finalize(state.candidate, NOTHING_SEEN)
    np.testing.assert_allclose(found.restart_losses, lengths[:, 0, 0], rtol=1e-5)
    np.testing.assert_array_equal(found.batch.inputs, x[lengths.argmin()])


def test_no_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="num_seeds must be an integer of at least 1, got 0"):
        group.together(descent(), 0, group.mean)
