"""A set of labelled images as NumPy arrays, in an order fixed by a public rule."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class ImageData(NamedTuple):
    """Labelled images.

    Attributes:
        name: Of the set and its split.
        images: Pixels in [0, 1], float32, shape (n, h, w, c).
        labels: Class indices, int32, shape (n,).
        ids: One name an image; the order of all arrays follows them.
        class_names: One name a class.
        mean: Of each channel over the training set.
        std: Of each channel over the training set.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    ids: Sequence[str]
    class_names: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """From pixels in [0, 1] to the model's space: zero mean and unit variance a channel over the training set."""
        return (images - np.asarray(self.mean, images.dtype)) / np.asarray(self.std, images.dtype)

    def denormalize(self, inputs: np.ndarray) -> np.ndarray:
        """The inverse of `normalize`, clipped to [0, 1]."""
        return np.clip(inputs * np.asarray(self.std, inputs.dtype) + np.asarray(self.mean, inputs.dtype), 0, 1)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The box of pixel values in the model's space: darkest and brightest, each of shape (c,)."""
        black, white = np.zeros(len(self.mean), np.float32), np.ones(len(self.mean), np.float32)
        return self.normalize(black), self.normalize(white)
