"""Coarse to fine: every stage starts from what the one before found, and small images have few unknowns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax import gradient_matching, observed, run, stack
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


def test_the_first_stage_finds_a_smooth_image_and_cannot_find_stripes():
    """An image that is the enlargement of a small one is found; stripes of one pixel average out, and are not."""
    made = []

    def attack_fn(init_fn, decode_fn):
        made.append(gradient_matching(client_fn, init_fn=init_fn, decode_fn=decode_fn))
        return made[-1]

    smooth = resized(jax.random.normal(jax.random.key(0), (1, 2, 2, 2)), 8, 8)[0]
    stripes = jnp.broadcast_to(jnp.array([1.0, -1.0])[jnp.arange(8) % 2][None, :, None], (8, 8, 2))
    coarse_to_fine(attack_fn, SHAPE, factors=(4,), num_steps=1)
    coarse = made[0]
    solve = jax.jit(lambda key, seen: run(coarse, key, seen, num_steps=400)[0].batch.inputs[0])
    assert np.mean(np.square(solve(jax.random.key(1), seen_of(smooth)) - smooth)) < 2e-3
    # Grey has an error of 1. The best small image has a little less, at the border.
    assert np.mean(np.square(solve(jax.random.key(1), seen_of(stripes)) - stripes)) > 0.95


def test_stages_have_the_sizes_of_their_factors_and_go_on_from_each_other():
    sizes = []

    def attack_fn(init_fn, decode_fn):
        def watched(z, labels):
            sizes.append(z.shape)
            return decode_fn(z, labels)

        return gradient_matching(client_fn, init_fn=init_fn, decode_fn=watched)

    image = resized(jax.random.normal(jax.random.key(0), (1, 2, 2, 2)), 8, 8)[0]
    start = given(jnp.full(SHAPE, 3.0))
    attack = coarse_to_fine(attack_fn, SHAPE, factors=(4, 2), num_steps=300, init_fn=start)
    found, info = jax.jit(lambda key: run(attack, key, seen_of(image), num_steps=2))(jax.random.key(0))
    assert list(dict.fromkeys(sizes)) == [(1, 2, 2, 2), (1, 4, 4, 2), SHAPE]
    assert info.loss.shape == (2,)
    assert float(info.loss[0]) < 1  # the last stage starts from the others: from the start it would be above 500
    assert float(jnp.sum(jnp.square(3.0 - image))) > 500
    assert found.batch.inputs.shape == SHAPE


def test_it_runs_in_a_study_of_several_victims():
    images = [resized(jax.random.normal(jax.random.key(i), (1, 2, 2, 2)), 8, 8)[0] for i in range(2)]

    def attack_fn(init_fn, decode_fn):
        return gradient_matching(client_fn, init_fn=init_fn, decode_fn=decode_fn)

    attack = coarse_to_fine(attack_fn, SHAPE, factors=(4, 2), num_steps=150)
    found = study(attack, jax.random.key(0), stack([seen_of(image) for image in images]), num_steps=20)
    for inputs, image in zip(found.reconstruction.batch.inputs, images, strict=True):
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
