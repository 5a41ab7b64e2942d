"""Generators: shapes, ranges, and images that do not depend on each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gia_jax import models


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 24, 3)])
def test_decoders_give_pixels_of_the_shape_asked_for(shape: tuple[int, int, int]) -> None:
    decoder, params = models.functional(models.Decoder(shape, 5, width=2, rngs=nnx.Rngs(0)))
    z = 10 * jax.random.normal(jax.random.key(0), (3, 5))
    pixels = decoder(params, z)
    assert pixels.shape == (3, *shape)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    np.testing.assert_allclose(decoder(params, z[1:2]), pixels[1:2], atol=1e-6)


def test_a_size_that_is_no_multiple_of_four_is_refused() -> None:
    with pytest.raises(ValueError, match=r"input_shape must have .* multiples of 4, got \(30, 28, 1\)"):
        models.Decoder((30, 28, 1), rngs=nnx.Rngs(0))


def test_the_divergence_of_an_encoder_is_that_of_two_gaussians() -> None:
    """With no weights the code has the mean and variance of the biases."""
    vae = models.VariationalAutoencoder((8, 8, 1), 2, width=1, rngs=nnx.Rngs(0))
    mean, variance = np.asarray([0.5, -1.0]), np.asarray([0.2, 3.0])
    vae.dense.kernel[...] = jnp.zeros_like(vae.dense.kernel[...])
    vae.dense.bias[...] = jnp.asarray(np.concatenate([mean, np.log(variance)]), jnp.float32)
    images = jnp.ones((3, 8, 8, 1))
    decoded, divergence = vae(jax.random.key(0), images)
    assert decoded.shape == images.shape
    expected = 0.5 * np.sum(mean**2 + variance - 1 - np.log(variance))
    np.testing.assert_allclose(divergence, np.full(3, expected), rtol=1e-5)
