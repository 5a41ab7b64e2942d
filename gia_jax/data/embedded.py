"""Real images that come with other packages: nothing is downloaded. Both sets need the extra `demo`."""

from typing import Any

import numpy as np

from gia_jax import _check
from gia_jax.data.images import ImageData

# Mean and standard deviation of the pixels of all 1,797 digits: constants, the same whichever digits are loaded.
DIGITS_MEAN, DIGITS_STD = 0.3052603006362915, 0.3760492205619812

PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "immunohistochemistry",
    "retina",
    "hubble_deep_field",
    "stereo_motorcycle",
)


def photos(*, size: int = 32) -> ImageData:
    """Loads photographs that are shipped by scikit-image, cut and scaled down.

    The first eight are the largest centred square of each photograph in the order of `PHOTOGRAPHS`. Then come their
    upper left quarters, and their upper right, lower left and lower right ones. A photograph's label is its place in
    the list. The images are normalised by the channel means and deviations of ImageNet.

    Args:
        size: Height and width in pixels, at least 1.

    Returns:
        Forty images of eight classes, shape (40, size, size, 3).

    Raises:
        ValueError: If `size` is no positive integer, or the images do not fit into memory.
        ImportError: If the extra `demo` is not installed.

    Examples:
        >>> from gia_jax import data
        >>> photos = data.photos(size=128)
        >>> photos.images.shape, photos.class_names[0], photos.ids[8]
        ((40, 128, 128, 3), 'astronaut', 'astronaut_ul')
    """
    _check.integer(size=size)
    _check.fits(3 * 5 * len(PHOTOGRAPHS) * size**2 * 3, size=size)  # in float64, before they are in float32

    from skimage import data, transform

    squares = []
    for name in PHOTOGRAPHS:
        image = getattr(data, name)()
        image = np.asarray(image[0] if isinstance(image, tuple) else image, np.float32)[..., :3] / 255
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        squares.append(image[top : top + side, left : left + side])
    crops = [(name, square) for name, square in zip(PHOTOGRAPHS, squares, strict=True)]
    for part, (down, right) in {"ul": (0, 0), "ur": (0, 1), "ll": (1, 0), "lr": (1, 1)}.items():
        for name, square in zip(PHOTOGRAPHS, squares, strict=True):
            half = square.shape[0] // 2
            crops.append((f"{name}_{part}", square[down * half :, right * half :][:half, :half]))
    images = np.stack([transform.resize(crop, (size, size, 3), anti_aliasing=True) for _, crop in crops])
    labels = np.tile(np.arange(len(PHOTOGRAPHS), dtype=np.int32), 5)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ids = [name for name, _ in crops]
    return ImageData("photos", images.astype(np.float32), labels, ids, PHOTOGRAPHS, mean, std)


def digits() -> ImageData:
    """Loads the 1,797 handwritten digits of 8x8 pixels that are shipped by scikit-learn, in its order.

    They are the test split of a UCI set. They are normalised by the mean and the standard deviation of all of them,
    which are constants here.

    Returns:
        The images of ten classes, shape (1797, 8, 8, 1).

    Raises:
        ImportError: If the extra `demo` is not installed.

    Examples:
        >>> from gia_jax import data
        >>> digits = data.digits()
        >>> digits.images.shape, digits.labels[:3].tolist()
        ((1797, 8, 8, 1), [0, 1, 2])
    """
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    images = (found.images[..., None] / 16).astype(np.float32)
    ids = [f"digit_{i:05d}" for i in range(len(images))]
    names = [str(i) for i in range(10)]
    return ImageData("digits", images, found.target.astype(np.int32), ids, names, (DIGITS_MEAN,), (DIGITS_STD,))
