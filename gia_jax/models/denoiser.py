"""A small denoiser of images, the prior of an attacker who has images like the victim's: FFDNet.

Zhang, Zuo and Zhang, FFDNet: Toward a Fast and Flexible Solution for CNN-based Image Denoising, IEEE TIP 2018.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gia_jax import _check


class FFDNet(nnx.Module):
    """A denoiser that knows the level of the noise: 3x3 convolutions on an image of half the size.

    Every square of 2x2 pixels becomes one pixel with four times the channels, and the level of the noise is one channel
    more. Convolutions with ReLUs between them give the denoised pixels in that form, which go back to their places. One
    network serves all levels that it was trained with. Departures from the paper: no batch normalisation, so that no
    image depends on another one, and the last convolution gives the noise, which is subtracted.

    Args:
        channels: Number of channels of an image.
        width: Number of features between convolutions. The paper has 96 for images in colour.
        depth: Number of convolutions, at least 2. The paper has 12 for images in colour.
        rngs: Random streams of the initial weights (`nnx.Rngs`).

    Raises:
        ValueError: If `channels` or `width` is no positive integer, or `depth` no integer of at least 2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gia_jax import models
        >>> denoiser = models.FFDNet(1, width=4, depth=2, rngs=nnx.Rngs(0))
        >>> denoiser(jnp.ones((3, 6, 4, 1)), 0.1).shape
        (3, 6, 4, 1)
    """

    def __init__(self, channels: int = 3, *, width: int = 48, depth: int = 6, rngs: nnx.Rngs) -> None:
        _check.integer(channels=channels, width=width)
        _check.integer(2, depth=depth)
        sizes = [4 * channels + 1, *[width] * (depth - 1), 4 * channels]
        self.depth = depth
        for i in range(depth):
            init = nnx.initializers.he_normal() if i < depth - 1 else nnx.initializers.normal(1e-3)
            setattr(self, f"conv{i}", nnx.Conv(sizes[i], sizes[i + 1], (3, 3), kernel_init=init, rngs=rngs))

    def __call__(self, pixels: Float[Array, "b h w c"], noise: Float[ArrayLike, "..."]) -> Float[Array, "b h w c"]:
        """Denoises images.

        Args:
            pixels: Images of even height and width.
            noise: Standard deviation of the noise in every pixel, in the units of `pixels`: one number, or one for
                each image, shape (b,).

        Returns:
            The images without what the network takes for noise.

        Raises:
            ValueError: If the height or the width is odd.
        """
        b, height, width, channels = pixels.shape
        if height % 2 or width % 2:
            raise ValueError(f"pixels must have an even height and width, got {pixels.shape}")
        squares = pixels.reshape(b, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        squares = squares.reshape(b, height // 2, width // 2, 4 * channels)
        level = jnp.broadcast_to(jnp.reshape(jnp.asarray(noise, pixels.dtype), (-1, 1, 1, 1)), (*squares.shape[:3], 1))
        x = jnp.concatenate([squares, level], -1)
        for i in range(self.depth):
            x = getattr(self, f"conv{i}")(x if i == 0 else jax.nn.relu(x))
        x = x.reshape(b, height // 2, width // 2, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        return pixels - x.reshape(pixels.shape)
