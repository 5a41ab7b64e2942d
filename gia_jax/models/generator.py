"""Small generators of images: a decoder in the manner of DCGAN, and the variational autoencoder that trains it."""

import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax.models.layers import flatten


class Decoder(nnx.Module):
    """A dense layer to a quarter of the image's height and width, and two transposed 4x4 convolutions of stride 2
    (Radford, Metz, Chintala, DCGAN, ICLR 2016, without batch normalisation: no image depends on another's latent).

    Args:
        input_shape: (h, w, c) of the images, h and w multiples of 4.
        latent_size: Entries of a latent.
        width: Features before the last layer; twice as many before that.
        rngs: `nnx.Rngs`.

    Raises:
        ValueError: Heights or widths that are no multiples of 4.
    """

    def __init__(
        self, input_shape: tuple[int, int, int] = (32, 32, 3), latent_size: int = 32, *, width: int = 8, rngs: nnx.Rngs
    ) -> None:
        height, wide, channels = input_shape
        if height % 4 or wide % 4:
            raise ValueError(f"input_shape must have height and width that are multiples of 4, got {input_shape}")
        self.input_shape, self.latent_size = tuple(input_shape), latent_size
        self.shape = (height // 4, wide // 4, 2 * width)
        self.dense = nnx.Linear(latent_size, height * wide * width // 8, rngs=rngs)
        self.up1 = nnx.ConvTranspose(2 * width, width, (4, 4), (2, 2), rngs=rngs)
        self.up2 = nnx.ConvTranspose(width, channels, (4, 4), (2, 2), rngs=rngs)

    def __call__(self, z: Float[Array, "b z"]) -> Float[Array, "b h w c"]:
        """Pixels in (0, 1)."""
        x = jax.nn.relu(self.dense(z)).reshape(-1, *self.shape)
        return jax.nn.sigmoid(self.up2(jax.nn.relu(self.up1(x))))


class VariationalAutoencoder(nnx.Module):
    """A `Decoder` and the encoder it is trained with (Kingma, Welling, Auto-Encoding Variational Bayes, ICLR 2014).

    Args:
        input_shape: As for `Decoder`.
        latent_size: Entries of a latent.
        width: As for `Decoder`; the encoder mirrors it.
        rngs: `nnx.Rngs`.
    """

    def __init__(
        self, input_shape: tuple[int, int, int] = (32, 32, 3), latent_size: int = 32, *, width: int = 8, rngs: nnx.Rngs
    ) -> None:
        height, wide, channels = input_shape
        self.decoder = Decoder(input_shape, latent_size, width=width, rngs=rngs)
        self.down1 = nnx.Conv(channels, width, (4, 4), (2, 2), rngs=rngs)
        self.down2 = nnx.Conv(width, 2 * width, (4, 4), (2, 2), rngs=rngs)
        self.dense = nnx.Linear(height * wide * width // 8, 2 * latent_size, rngs=rngs)

    def __call__(
        self, key: PRNGKeyArray, pixels: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b"]]:
        """Images decoded from a sampled latent each, and the divergence of its distribution from N(0, I) in nats."""
        x = jax.nn.relu(self.down2(jax.nn.relu(self.down1(pixels))))
        mean, log_variance = jnp.split(self.dense(flatten(x)), 2, axis=1)
        z = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape, mean.dtype)
        divergence = jnp.sum(jnp.square(mean) + jnp.exp(log_variance) - log_variance - 1, 1) / 2
        return self.decoder(z), divergence


def save_decoder(path: Path, decoder: Decoder) -> None:
    """Writes a decoder's weights, by their paths such as "up1/kernel", and its `input_shape`, as an .npz."""
    weights = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(decoder, nnx.Param)), sep="/")
    with path.open("wb") as file:  # an open file keeps its name, whatever its suffix
        np.savez(file, input_shape=np.asarray(decoder.input_shape), **jax.tree.map(np.asarray, weights))


def load_decoder(path: Path) -> Decoder:
    """The decoder that `save_decoder` wrote.

    Args:
        path: Of the .npz; nothing in it is executed.

    Returns:
        The decoder, of the size that its weights have.

    Raises:
        ValueError: A file that is not there, or is none of a decoder.
    """
    try:
        with np.load(path) as file:
            weights = {name: jnp.asarray(file[name]) for name in file.files}
        input_shape = tuple(weights.pop("input_shape").tolist())
        (latent_size, _), width = weights["dense/kernel"].shape, weights["up1/kernel"].shape[-1]
        decoder = Decoder(input_shape, latent_size, width=width, rngs=nnx.Rngs(0))
        state = nnx.state(decoder, nnx.Param)
        expected = traverse_util.flatten_dict(nnx.to_pure_dict(state), sep="/")
        if jax.tree.map(_kind, weights) != jax.tree.map(_kind, expected):
            raise ValueError("its arrays do not fit together")
    except (OSError, EOFError, IndexError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"path must be of a generator that save_decoder wrote, got {str(path)!r}: {error}") from None
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(weights, sep="/"))
    nnx.update(decoder, state)
    return decoder


def _kind(leaf: Array) -> tuple[tuple[int, ...], str]:
    return leaf.shape, jnp.result_type(leaf).kind
