"""Small generators of images: a decoder in the manner of DCGAN, and the variational autoencoder that trains it.

Attacks that search the latents of a generator use them.
"""

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array, Float, PRNGKeyArray

from gia_jax import _check
from gia_jax._files import write_whole
from gia_jax.models.layers import flatten
from gia_jax.precision import widened


class Decoder(nnx.Module):
    """A generator that maps latents to images by a dense layer and two transposed 4x4 convolutions of stride 2.

    The dense layer gives a quarter of the image's height and width. The design is that of Radford, Metz and Chintala,
    DCGAN, ICLR 2016, but without batch normalisation: no image depends on another's latent.

    Args:
        input_shape: Shape (h, w, c) of an image, h and w multiples of 4.
        latent_size: Number of entries of a latent.
        width: Number of features before the last layer. Twice as many come before that.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Raises:
        ValueError: If the height or the width is no multiple of 4.

    Examples:
        Three latents become three images, here without computing them:

        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> nnx.eval_shape(lambda: models.Decoder((8, 8, 3), 2, rngs=nnx.Rngs(0))(jnp.ones((3, 2)))).shape
        (3, 8, 8, 3)
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
        """Maps latents to images.

        Args:
            z: Latents, shape (b, latent_size).

        Returns:
            Images with pixels in (0, 1).
        """
        x = jax.nn.relu(self.dense(z)).reshape(-1, *self.shape)
        return jax.nn.sigmoid(self.up2(jax.nn.relu(self.up1(x))))


class VariationalAutoencoder(nnx.Module):
    """A `Decoder` together with the encoder that it is trained with.

    Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014.

    Args:
        input_shape: Shape (h, w, c) of an image, h and w multiples of 4.
        latent_size: Number of entries of a latent.
        width: Number of features before the decoder's last layer. The encoder mirrors the decoder.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Raises:
        ValueError: If the height or the width is no multiple of 4.

    Examples:
        Three images become three others and three divergences, here without computing them:

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> def decoded(key, pixels):
        ...     return models.VariationalAutoencoder((8, 8, 3), 2, rngs=nnx.Rngs(0))(key, pixels)
        >>> images, divergence = nnx.eval_shape(decoded, jax.random.key(1), jnp.ones((3, 8, 8, 3)))
        >>> images.shape, divergence.shape
        ((3, 8, 8, 3), (3,))
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
        """Encodes images, samples one latent for each, and decodes these latents.

        Args:
            key: Random key of the latents.
            pixels: Images with pixels in [0, 1].

        Returns:
            The decoded images, and for each image the Kullback-Leibler divergence of its latent's distribution from
            N(0, I) in nats.
        """
        x = jax.nn.relu(self.down2(jax.nn.relu(self.down1(pixels))))
        mean, log_variance = jnp.split(self.dense(flatten(x, self.dense)), 2, axis=1)
        z = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape, mean.dtype)
        divergence = jnp.sum(jnp.square(mean) + jnp.exp(log_variance) - log_variance - 1, 1) / 2
        return self.decoder(z), divergence


def save_decoder(path: Path, decoder: Decoder) -> None:
    """Writes a decoder's weights, by their paths such as "up1/kernel", and its `input_shape`, as an .npz file.

    The file appears when it is complete: whoever reads `path` meanwhile, or after a crash, finds what was there before.

    Args:
        path: Path of the file. Its folder must exist.
        decoder: Decoder to write. Its weights are stored in float32 or wider.

    Raises:
        OSError: If the file cannot be written.

    Examples:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> decoder = models.Decoder((4, 4, 1), latent_size=2, width=2, rngs=nnx.Rngs(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "decoder.npz"
        ...     models.save_decoder(path, decoder)
        ...     sorted(jnp.load(path).files)[:2]
        ['dense/bias', 'dense/kernel']
    """
    weights: dict[str, Any] = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(decoder, nnx.Param)), sep="/")
    arrays: dict[str, Any] = {name: np.asarray(widened(leaf)) for name, leaf in weights.items()}  # .npz has no bfloat16
    content = io.BytesIO()
    np.savez(content, input_shape=np.asarray(decoder.input_shape), **arrays)
    write_whole(path, content.getvalue())


def load_decoder(path: Path) -> Decoder:
    """Reads the decoder that `save_decoder` wrote.

    Args:
        path: Path of the .npz file. Nothing in it is executed, and no weight is read before all sizes are found to fit.

    Returns:
        The decoder, of the size that its weights have, in float32 or wider.

    Raises:
        ValueError: If the file is not there, is not of a decoder, is damaged or too large, or holds weights that are
            not finite.

    Examples:
        The decoder that was read has the weights of the one that was written:

        >>> import pathlib, tempfile
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> decoder = models.Decoder((4, 4, 1), latent_size=2, width=2, rngs=nnx.Rngs(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "decoder.npz"
        ...     models.save_decoder(path, decoder)
        ...     loaded = models.load_decoder(path)
        >>> bool((loaded.up1.kernel[...] == decoder.up1.kernel[...]).all())
        True
    """
    try:
        return _load(path)
    except Exception as error:  # a damaged archive may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        message = f"path must be of a generator that save_decoder wrote, got {str(path)!r}: {reason}"
    raise ValueError(message)


def _load(path: Path) -> Decoder:
    """Reads a decoder, and raises whatever a damaged file makes it raise."""
    with zipfile.ZipFile(path) as archive:
        headers = {info.filename.removesuffix(".npy"): _header(archive, info) for info in archive.infolist()}
    if not {"input_shape", "dense/kernel", "up1/kernel"} <= set(headers):
        raise ValueError(f"it holds {sorted(headers)}")
    if headers.pop("input_shape") != ((3,), "i"):
        raise ValueError("its input_shape is no three integers")
    (latent_size, _), width = headers["dense/kernel"][0], headers["up1/kernel"][0][-1]
    with np.load(path) as file:
        input_shape = tuple(file["input_shape"].tolist())
    if min(*input_shape, latent_size, width) < 1:
        raise ValueError(f"its sizes are {input_shape}, {latent_size} and {width}")
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(input_shape, latent_size, width=width, rngs=nnx.Rngs(0))))
    expected: dict[str, Any] = traverse_util.flatten_dict(nnx.to_pure_dict(state), sep="/")
    if headers != {name: (leaf.shape, "f") for name, leaf in expected.items()}:
        raise ValueError("its arrays do not fit together")
    _check.fits(sum(math.prod(shape) for shape, _ in headers.values()), input_shape=input_shape)
    with np.load(path) as file:
        weights = {name: widened(jnp.asarray(file[name])) for name in expected}
    _check.finite("weights", weights)
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(weights, sep="/"))
    return nnx.merge(graph, state)


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], str]:
    """Returns the shape of an array in an .npz file, and the kind of its type, before any of it is read."""
    with archive.open(info) as file:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read[np.lib.format.read_magic(file)](file)
        if info.file_size != file.tell() + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"its array {info.filename!r} has {info.file_size} bytes")
    return shape, dtype.kind
