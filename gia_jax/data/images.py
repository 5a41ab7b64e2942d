"""A set of labelled images as NumPy arrays, in an order fixed by a public rule."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gia_jax.precision import wide_dtype


class ImageData(NamedTuple):
    """Labelled images, with the names and the channel statistics of the set that they are from.

    Attributes:
        name: Name of the set and its split.
        images: Pixels in [0, 1], float32, shape (n, h, w, c).
        labels: Class indices, int32, shape (n,).
        ids: One name for each image. The order of all arrays follows them.
        class_names: One name for each class.
        mean: Mean of each channel. It is public: taken over the training set, or else over other images than these, or
            a constant of the set, such as that of `photos` and `digits`.
        std: Standard deviation of each channel, over the same images as the mean.

    Examples:
        >>> import numpy as np
        >>> from gia_jax import data
        >>> images = np.full((1, 2, 2, 1), 0.75, np.float32)
        >>> found = data.ImageData("grey", images, np.array([0]), ["grey_0"], ["grey"], mean=[0.5], std=[0.25])
        >>> float(found.normalize(found.images).max())
        1.0
        >>> low, high = found.bounds()
        >>> low.tolist(), high.tolist()
        ([-2.0], [2.0])
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    ids: Sequence[str]
    class_names: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """Maps pixels in [0, 1] to the model's space: each channel minus its `mean`, divided by its `std`.

        Args:
            images: Pixels in [0, 1], of a floating type. The last axis holds the channels.

        Returns:
            The inputs of the model, of the type and shape of `images`.

        Raises:
            ValueError: If `images` are integers, or have another number of channels than the mean.
        """
        wide, mean, std = self._channels("images", images)
        return ((wide - mean) / std).astype(images.dtype)

    def denormalize(self, inputs: np.ndarray) -> np.ndarray:
        """Maps the model's space back to pixels: the inverse of `normalize`, clipped to [0, 1].

        Args:
            inputs: Inputs of the model, of a floating type. The last axis holds the channels.

        Returns:
            Pixels in [0, 1], of the type and shape of `inputs`.

        Raises:
            ValueError: If `inputs` are integers, or have another number of channels than the mean.
        """
        wide, mean, std = self._channels("inputs", inputs)
        return np.clip(wide * std + mean, 0, 1).astype(inputs.dtype)

    def _channels(self, name: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the values, the mean and the deviation in float32 or wider."""
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise ValueError(f"{name} must be of a floating type, got {values.dtype}: divide pixels by 255")
        if values.shape[-1:] != (len(self.mean),):
            raise ValueError(f"{name} must have {len(self.mean)} channels, their last axis, got shape {values.shape}")
        dtype = wide_dtype(values.dtype)
        return values.astype(dtype), np.asarray(self.mean, dtype), np.asarray(self.std, dtype)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the box of pixel values in the model's space.

        Returns:
            The darkest and the brightest value of each channel, each of shape (c,).
        """
        black, white = np.zeros(len(self.mean), np.float32), np.ones(len(self.mean), np.float32)
        return self.normalize(black), self.normalize(white)
