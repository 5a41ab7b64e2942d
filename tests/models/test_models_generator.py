"""Generators: shapes, ranges, and images that do not depend on each other."""

import os
import pickle
import zipfile
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("decoder") / "decoder.npz"
    models.save_decoder(file, models.Decoder((8, 8, 1), 3, width=1, rngs=nnx.Rngs(0)))
    return file


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match="path must be of a generator that save_decoder wrote, got ") as refused:
        models.load_decoder(path)
    message = str(refused.value)
    assert "\n" not in message
    assert "pickle" not in message.replace(str(path), "")
    return message.split(": ", 1)[1]


def test_sizes_are_refused_before_a_decoder_of_them_is_made(saved: Path, tmp_path: Path) -> None:
    """A model of 40,000 x 40,000 pixels has more weights than there is memory."""
    weights, file = dict(np.load(saved)), tmp_path / "large.npz"
    np.savez(file, **weights | {"input_shape": np.asarray((40_000, 40_000, 1))})
    assert refusal(file) == "its arrays do not fit together"
    for name, array, reason in (
        ("input_shape", np.asarray((8, 8)), "its input_shape is no three integers"),
        ("input_shape", np.asarray((8.0, 8, 1)), "its input_shape is no three integers"),
        ("input_shape", np.asarray((8, 0, 1)), "its sizes are (8, 0, 1), 3 and 1"),
        ("dense/kernel", np.zeros((0, 8), np.float32), "its sizes are (8, 8, 1), 0 and 1"),
    ):
        np.savez(file, **weights | {name: array})
        assert refusal(file) == reason


def test_damaged_files_are_refused_or_read_as_they_were(saved: Path, tmp_path: Path) -> None:
    rng, raw, file = np.random.default_rng(0), saved.read_bytes(), tmp_path / "damaged.npz"
    right = nnx.state(models.load_decoder(saved))
    for _ in range(60):
        content = bytearray(raw)
        for place in rng.integers(0, len(raw), rng.integers(1, 4)):
            content[place] = rng.integers(256)
        file.write_bytes(content)
        try:
            found = nnx.state(models.load_decoder(file))
        except ValueError:
            refusal(file)
        else:
            jax.tree.map(np.testing.assert_array_equal, found, right)
    file.write_bytes(raw[: len(raw) // 2])
    refusal(file)
    # The archive names a method of compression that does not exist, or says that it is encrypted.
    for place, value, reason in ((10, 99, "compression method is not supported"), (8, 1, "is encrypted")):
        content = bytearray(raw)
        content[raw.index(b"PK\x01\x02") + place] = value
        file.write_bytes(content)
        assert reason in refusal(file)


def test_nothing_is_unpickled(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "objects.npz"
    np.savez(file, **dict(np.load(saved)) | {"up1/bias": np.asarray([{}], object)})
    assert "up1/bias.npy" in refusal(file) or refusal(file) == "its arrays do not fit together"
    file.write_bytes(pickle.dumps({"input_shape": 3}))
    assert refusal(file) == "File is not a zip file"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("input_shape.npy", pickle.dumps(3))
    refusal(file)
    np.save(file.open("wb"), np.zeros(3))
    refusal(file)


def test_weights_of_other_precisions_are_read_in_float32(saved: Path, tmp_path: Path) -> None:
    weights, file = dict(np.load(saved)), tmp_path / "other.npz"
    for dtype in (np.float16, np.float64):
        np.savez(
            file, **{name: leaf.astype(dtype) if leaf.dtype.kind == "f" else leaf for name, leaf in weights.items()}
        )
        kernel = models.load_decoder(file).up1.kernel[...]
        assert kernel.dtype == jnp.float32
        np.testing.assert_array_equal(kernel, weights["up1/kernel"].astype(dtype).astype(np.float32))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), models.load_decoder(saved))
    models.save_decoder(file, half)
    np.testing.assert_array_equal(models.load_decoder(file).up1.kernel[...], half.up1.kernel[...].astype(jnp.float32))


def test_weights_that_are_no_numbers_are_refused(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "nan.npz"
    np.savez(file, **dict(np.load(saved)) | {"up1/bias": np.asarray([np.nan], np.float32)})
    assert refusal(file).startswith("weights must be finite, got nan at weights['up1/bias']")


def test_a_decoder_is_written_whole_or_not_at_all(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "decoder.npz"
    models.save_decoder(file, models.load_decoder(saved))
    before = file.read_bytes()

    def fails(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        models.save_decoder(file, models.load_decoder(saved))
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["decoder.npz"]
