"""Coarse to fine: every stage starts from what the one before found, and small images have few unknowns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax import Batch, advance, gradient_matching, keep_best, observed, run, stack
from gia_jax.matching import coarse_to_fine
from gia_jax.matching.coarse_to_fine import resized
from gia_jax.matching.initializations import given
from gia_jax.sweep import study

SHAPE = (1, 8, 8, 2)


def client_fn(params, batch):
    """The gradient of a client that shares its image."""
    return {"image": batch.inputs.mean(0)}


def seen_of(image):
    params = {"image": jnp.zeros(image.shape)}
    return observed(params, {"image": image}, inputs_like=jnp.zeros((1, *image.shape)), labels=jnp.array([0]))


def attack_fn(init_fn, decode_fn):
    return gradient_matching(client_fn, init_fn=init_fn, decode_fn=decode_fn)


def test_the_first_stage_finds_a_smooth_image_and_cannot_find_stripes():
    """An image that is the enlargement of a small one is found; stripes of one pixel average out, and are not."""
    smooth = resized(jax.random.normal(jax.random.key(0), (1, 2, 2, 2)), 8, 8)[0]
    stripes = jnp.broadcast_to(jnp.array([1.0, -1.0])[jnp.arange(8) % 2][None, :, None], (8, 8, 2))
    coarse = coarse_to_fine(attack_fn, SHAPE, factors=(4,), num_steps=400)
    solve = jax.jit(lambda key, seen: run(coarse, key, seen, num_steps=400)[0].batch.inputs[0])
    assert np.mean(np.square(solve(jax.random.key(1), seen_of(smooth)) - smooth)) < 2e-3
    # Grey has an error of 1. The best small image has a little less, at the border.
    assert np.mean(np.square(solve(jax.random.key(1), seen_of(stripes)) - stripes)) > 0.95
    # The last stage finds it.
    whole = jax.jit(lambda key, seen: run(coarse, key, seen, num_steps=800)[0].batch.inputs[0])
    assert np.mean(np.square(whole(jax.random.key(1), seen_of(stripes)) - stripes)) < 2e-3


def test_stages_are_attacks_on_small_images_that_go_on_from_each_other():
    """Stage by stage, with unknowns of the stage's own size, as the definition says."""
    start, image = jax.random.normal(jax.random.key(2), SHAPE), jax.random.normal(jax.random.key(0), SHAPE)[0]
    seen, count = seen_of(image), 30
    attack = coarse_to_fine(attack_fn, SHAPE, factors=(4, 2), num_steps=count, init_fn=given(start))
    found, info = jax.jit(lambda key: run(attack, key, seen, num_steps=3 * count))(jax.random.key(0))
    z, losses = start, []
    for factor in (4, 2, 1):
        z = resized(z, 8 // factor, 8 // factor)
        own = keep_best(attack_fn(lambda key, observation, z=z: z, lambda z, labels: Batch(resized(z, 8, 8), labels)))
        state = own.init(jax.random.key(0), seen)
        state, own_info = jax.jit(
            lambda state, own=own: advance(own, jax.random.key(0), state, seen, start=0, num_steps=count)
        )(state)
        z = state.candidate.best.variables
        losses.append(own_info.loss)
    np.testing.assert_allclose(info.loss, np.concatenate(losses), rtol=1e-4)
    np.testing.assert_allclose(found.batch.inputs, own.finalize(state.candidate, seen).batch.inputs, atol=1e-4)
    assert found.loss <= info.loss[2 * count :].min()


def test_it_returns_what_the_stage_found_in_which_it_is_stopped():
    image = resized(jax.random.normal(jax.random.key(0), (1, 2, 2, 2)), 8, 8)[0]
    attack = coarse_to_fine(attack_fn, SHAPE, factors=(4, 2), num_steps=5)
    for num_steps in (1, 5, 6, 12):
        found, info = jax.jit(lambda key, n=num_steps: run(attack, key, seen_of(image), num_steps=n))(jax.random.key(0))
        own = jnp.sum(jnp.square(found.batch.inputs[0] - image))
        np.testing.assert_allclose(found.loss, own, rtol=1e-5)
        assert info.loss.shape == (num_steps,)


def test_a_number_of_steps_of_the_inner_attack_is_added_to_those_of_the_stages():
    def scheduled(init_fn, decode_fn):
        return attack_fn(init_fn, decode_fn)._replace(num_steps=7)

    assert coarse_to_fine(scheduled, SHAPE, factors=(4, 2), num_steps=5).num_steps == 17
    assert coarse_to_fine(attack_fn, SHAPE, factors=(4, 2), num_steps=5).num_steps is None


def test_it_runs_in_a_study_of_several_victims_and_one_lane_of_nan_spoils_no_other():
    images = [resized(jax.random.normal(jax.random.key(i), (1, 2, 2, 2)), 8, 8)[0] for i in range(2)]
    attack = coarse_to_fine(attack_fn, SHAPE, factors=(4, 2), num_steps=150)
    broken = seen_of(images[0])._replace(update={"image": jnp.full((8, 8, 2), jnp.nan)})
    seen = stack([*map(seen_of, images), broken])
    with pytest.warns(UserWarning, match="not finite"):
        found = study(attack, jax.random.key(0), seen, num_steps=320).reconstruction
    assert found.is_finite.tolist() == [True, True, False]
    for inputs, image in zip(found.batch.inputs, images):
        np.testing.assert_allclose(inputs[0], image, atol=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": ()}, r"factors must be at least one and fall, got \(\)"),
        ({"factors": (2, 4)}, r"factors must be at least one and fall, got \(2, 4\)"),
        ({"factors": (3,)}, r"factors must divide the height and the width of \(1, 8, 8, 2\), got 3"),
        ({"factors": (1,)}, "factors must be an integer of at least 2, got 1"),
        ({"shape": (8, 8, 2)}, r"shape must be \(b, h, w, c\), got \(8, 8, 2\)"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    arguments = {"shape": SHAPE, "factors": (4, 2), "num_steps": 1} | changes
    with pytest.raises(ValueError, match=message):
        coarse_to_fine(lambda *_: gradient_matching(client_fn), arguments.pop("shape"), **arguments)
