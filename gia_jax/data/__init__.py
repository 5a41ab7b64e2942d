"""Real images and graphs as NumPy arrays, from other packages, TensorFlow Datasets (TFDS), and TUDataset."""

from gia_jax import _check
from gia_jax.data.embedded import digits, photos
from gia_jax.data.graphs import FeatureBlock, GraphData, load_graphs, pad_graphs
from gia_jax.data.images import ImageData
from gia_jax.data.prepared import prepared


def load(name: str, *, split: str = "test", limit: int | None = None) -> ImageData:
    """Loads images by name: "photos", "digits", or any prepared TFDS set such as "mnist", "cifar10" or "cifar100".

    Args:
        name: Name of the set. That of a TFDS set may end in a version, as in "mnist:3.0.1".
        split: Split of a TFDS set. The sets that come with packages have the split "test" only.
        limit: Number of images, at least 1: the first ones, or all where there are fewer. None loads all.

    Returns:
        The images, in the order that makes "the first n" a public rule.

    Raises:
        ValueError: If the set is unknown, not prepared, cannot be read or has no such split, or `limit` is no positive
            integer.
        ImportError: If the package that the set comes with is not installed: the extra `demo`, or `data` for a TFDS
            set.

    Examples:
        >>> from gia_jax import data
        >>> digits = data.load("digits", limit=3)
        >>> digits.images.shape, digits.labels.tolist()
        ((3, 8, 8, 1), [0, 1, 2])
    """
    if name not in ("photos", "digits"):
        return prepared(name, split=split, limit=limit)
    if split != "test":
        raise ValueError(f"split must be 'test' for data {name}, got {split!r}")
    if limit is not None:
        _check.integer(limit=limit)
    data = photos() if name == "photos" else digits()
    return data._replace(images=data.images[:limit], labels=data.labels[:limit], ids=data.ids[:limit])


__all__ = [
    "FeatureBlock",
    "GraphData",
    "ImageData",
    "digits",
    "load",
    "load_graphs",
    "pad_graphs",
    "photos",
    "prepared",
]
