"""Real images as NumPy arrays."""

from gia_jax.data.embedded import digits, photos
from gia_jax.data.images import ImageData
from gia_jax.data.prepared import prepared


def load(name: str, *, split: str = "test", limit: int | None = None) -> ImageData:
    """Images by name: "photos", "digits", or any prepared TFDS set such as "mnist", "cifar10", "cifar100".

    Args:
        name: Of the set.
        split: Of a TFDS set; the embedded ones have one split only.
        limit: The first so many images; None for all.

    Returns:
        The images, in the order that makes "the first n" a public rule.

    Raises:
        ValueError: The set is unknown, not prepared, or has no such split.
    """
    if name not in ("photos", "digits"):
        return prepared(name, split=split, limit=limit)
    data = photos() if name == "photos" else digits()
    return data._replace(images=data.images[:limit], labels=data.labels[:limit], ids=data.ids[:limit])


__all__ = ["ImageData", "digits", "load", "photos", "prepared"]
