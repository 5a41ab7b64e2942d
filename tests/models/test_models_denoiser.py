"""The denoiser: its squares of pixels go back to their places, and images do not depend on each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gia_jax import models


def small(channels: int = 1, *, width: int = 8, depth: int = 3) -> models.FFDNet:
    return models.FFDNet(channels, width=width, depth=depth, rngs=nnx.Rngs(0))


def test_an_identity_in_the_last_layer_takes_the_image_away_from_itself() -> None:
    """What the convolutions see of a pixel must come back at the pixel's place, for all channels."""
    denoiser = models.FFDNet(3, width=13, depth=2, rngs=nnx.Rngs(0))
    kernel = np.zeros((3, 3, 13, 13), np.float32)
    kernel[1, 1] = np.eye(13)
    denoiser.conv0.kernel[...], denoiser.conv0.bias[...] = jnp.asarray(kernel), jnp.zeros(13)
    denoiser.conv1.kernel[...], denoiser.conv1.bias[...] = jnp.asarray(kernel[..., :12]), jnp.zeros(12)
    pixels = jax.random.uniform(jax.random.key(0), (2, 6, 4, 3))  # positive, so that the ReLU keeps them
    np.testing.assert_allclose(denoiser(pixels, 0.3), 0 * pixels, atol=1e-6)


def test_images_do_not_depend_on_each_other_and_have_their_own_noise() -> None:
    denoiser, pixels = small(), jax.random.uniform(jax.random.key(1), (3, 4, 4, 1))
    together = denoiser(pixels, jnp.array([0.1, 0.2, 0.3]))
    np.testing.assert_allclose(denoiser(pixels[1:2], 0.2), together[1:2], atol=1e-6)
    assert not np.allclose(denoiser(pixels[1:2], 0.9), together[1:2], atol=1e-6)


def test_a_little_training_removes_noise_from_stripes() -> None:
    denoiser = small()
    stripes = jnp.tile(jnp.array([0.0, 0.0, 1.0, 1.0]), 2)
    graph, params = nnx.split(denoiser)
    optimizer = optax.adam(1e-2)

    def error(params: nnx.State, key: jax.Array) -> jax.Array:
        key_shift, key_noise = jax.random.split(key)
        shifts = jax.random.randint(key_shift, (16,), 0, 4)
        clean = jnp.broadcast_to(jax.vmap(lambda s: jnp.roll(stripes, s))(shifts)[:, None, :, None], (16, 8, 8, 1))
        noisy = clean + 0.3 * jax.random.normal(key_noise, clean.shape)
        return jnp.mean(jnp.square(nnx.merge(graph, params)(noisy, 0.3) - clean))

    @jax.jit
    def learn(params: nnx.State) -> nnx.State:
        def step(carry: tuple, key: jax.Array) -> tuple:
            params, state = carry
            updates, state = optimizer.update(jax.grad(error)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(2), 150))[0][0]

    before, after = error(params, jax.random.key(3)), error(learn(params), jax.random.key(3))
    assert before > 0.08  # the variance of the noise is 0.09
    assert after < 0.3 * before


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pixels must have an even height and width, got \(1, 5, 4, 1\)"):
        small()(jnp.ones((1, 5, 4, 1)), 0.1)
    with pytest.raises(ValueError, match="depth must be an integer"):
        small(depth=1)
