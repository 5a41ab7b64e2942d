"""What the command line has for images alone: generators of them, and bounds in units of pixels."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from gia_jax import data, metrics, models
from gia_jax.attacks.gias import NUM_LATENT_STEPS
from gia_jax.base import Batch, ClientFn, Params
from gia_jax.cli.names import Generator


def generator_of(
    images: data.ImageData,
    shape: tuple[int, ...],
    path: Path | None,
    key: PRNGKeyArray,
    *,
    num_latent_steps: int | None = None,
) -> Generator:
    """Makes a generator of images: trained, from a file of `models.save_decoder`, or untrained (deep image prior).

    Args:
        images: Images of the kind, whose mean and deviation lead from pixels to the model's space.
        shape: Shape (h, w, c) of an image.
        path: Path of the file. None makes an untrained decoder.
        key: Random key of the untrained weights.
        num_latent_steps: Number of latent steps of GIAS. None takes the paper's, or 0 where the generator is untrained.

    Returns:
        The generator, in the model's space.

    Raises:
        ValueError: If the file is none of a decoder, or of one for images of another shape. Without a file, if the
            height or width of an image is no multiple of 4.
    """
    if len(shape) != 3:
        raise ValueError(f"generator must make images of shape (h, w, c), got {shape}")
    height, width, channels = shape
    decoder = (
        models.Decoder((height, width, channels), rngs=nnx.Rngs(key)) if path is None else models.load_decoder(path)
    )
    if decoder.input_shape != shape:
        made, wanted = ("x".join(map(str, s)) for s in (decoder.input_shape, shape))
        raise ValueError(f"generator must make images of {wanted} for {images.name}, got {path}, of {made}")
    if num_latent_steps is None:
        num_latent_steps = 0 if path is None else NUM_LATENT_STEPS
    decode, weights = models.functional(decoder)
    mean, std = (jnp.asarray(value, jnp.float32) for value in (images.mean, images.std))

    def generator_fn(params: Params, z: Array) -> Array:
        return (decode(params, z) - mean) / std

    return Generator(generator_fn, weights, (decoder.latent_size,), num_latent_steps)


def pixel_information(client_fn: ClientFn, params: Params, batch: Batch, images: data.ImageData) -> Array:
    """Computes the Fisher information of an update with noise of scale 1.

    Args:
        client_fn: Client `(params, batch) -> update`.
        params: Parameters that the server sent.
        batch: One example, inputs of shape (1, h, w, c).
        images: Images of the kind, whose deviation leads from the model's units to those of pixels in [0, 1].

    Returns:
        The information in units of pixels, shape (d, d) for d pixels.
    """
    found = jax.jit(lambda p, b: metrics.fisher_information(client_fn, p, b, 1.0, batch_size=256))(params, batch)
    std = jnp.broadcast_to(jnp.asarray(images.std, found.dtype), batch.inputs.shape[1:]).ravel()
    return found / std[:, None] / std


def pixel_covariance(images: np.ndarray) -> Array:
    """Computes the covariance of images, for `metrics.van_trees_bound`.

    Args:
        images: Two images or more in [0, 1], shape (n, h, w, c).

    Returns:
        The covariance, shape (d, d) for d pixels.
    """
    return jnp.asarray(np.cov(images.reshape(len(images), -1), rowvar=False))
