"""Generators: shapes, ranges, and images that do not depend on each other."""

from pathlib import Path

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


def test_a_saved_decoder_comes_back(tmp_path: Path) -> None:
    decoder, file = models.Decoder((8, 12, 3), 5, width=2, rngs=nnx.Rngs(3)), tmp_path / "decoder"
    models.save_decoder(file, decoder)
    loaded = models.load_decoder(file)
    assert (loaded.input_shape, loaded.latent_size) == ((8, 12, 3), 5)
    z = jax.random.normal(jax.random.key(0), (2, 5))
    np.testing.assert_array_equal(loaded(z), decoder(z))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "decoder.npz"
    models.save_decoder(file, models.Decoder((8, 8, 1), 5, width=2, rngs=nnx.Rngs(0)))
    weights = dict(np.load(file))
    wrong = {
        "not there": None,
        "a pickle": {"input_shape": np.asarray([{}])},
        "other arrays": {"x": np.zeros(3)},
        "arrays that do not fit": weights | {"input_shape": np.asarray((12, 8, 1))},
        "an array too many": weights | {"up3/kernel": np.zeros(3)},
        "a number for a kernel": weights | {"up1/kernel": np.float32(1)},
        "integers": {name: leaf.astype(np.int32) for name, leaf in weights.items()},
    }
    for what, arrays in wrong.items():
        path = tmp_path / f"{what}.npz"
        if arrays is not None:
            np.savez(path, **arrays)
        with pytest.raises(
            ValueError, match=f"path must be of a generator that save_decoder wrote, got '.*{what}.npz': "
        ):
            models.load_decoder(path)
