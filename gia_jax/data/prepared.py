"""Data sets prepared by TensorFlow Datasets (TFDS), read without TensorFlow. It needs the extra `data`."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gia_jax import _check
from gia_jax.data.images import ImageData

# Channel statistics of the training sets, computed from their pixels.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
}
NUM_PUBLIC = 2_000  # images that the statistics of other sets are computed from
NAME = re.compile(r"\w+(/[\w.+-]+)?(:[\d*]+(\.[\d*]+){2})?")  # name, name/config, name:1.0.0


def data_directory() -> Path | None:
    """Finds the folder of the prepared sets from the environment.

    Returns:
        $GIA_JAX_DATA_DIR/tfds if it is a folder, or else $GIA_JAX_DATA_DIR, or else $TFDS_DATA_DIR. None, where neither
        variable is set, stands for TFDS's own default.
    """
    root = os.environ.get("GIA_JAX_DATA_DIR")
    if root:
        return Path(root) / "tfds" if (Path(root) / "tfds").is_dir() else Path(root)
    tfds_root = os.environ.get("TFDS_DATA_DIR")
    return Path(tfds_root) if tfds_root else None


def prepared(name: str, *, split: str = "test", limit: int | None = None) -> ImageData:
    """Loads the images of a TFDS classification set, ordered by their id where they have one (TFDS shuffles them).

    Args:
        name: Name of the TFDS builder, such as "cifar10", with a version if need be, as in "cifar10:3.0.2".
        split: Name of the split, such as "train" or "test", without a slice.
        limit: Number of images to decode, the first ones in that order, at least 1. None decodes all.

    Returns:
        The images. Sets without published channel statistics are normalised by those of at most 2,000 images that are
        not among the images loaded, for these may be a victim's. They are images of the training split, or, where that
        is the one loaded, of another split, or else of its own rest. Where there is no other image, a mean and a
        deviation of 0.5 are taken.

    Raises:
        ValueError: If the set is unknown, not prepared, cannot be read, has no such split, or is no set of labelled
            images of one size and 8 bits, or if `limit` is no positive integer.
        ImportError: If the extra `data` is not installed.

    Examples:
        The first two test images of CIFAR-10, where TFDS has prepared it:

        >>> from gia_jax import data
        >>> data.prepared("cifar10", limit=2).labels.tolist()  # doctest: +SKIP
        [3, 8]

        The name of no set is refused:

        >>> data.prepared("no set of images")
        Traceback (most recent call last):
        ValueError: data must be photos, digits or a TFDS set, got 'no set of images'
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError("data sets need the extra 'data': pip install 'gia-jax[data]'") from error
    if limit is not None:
        _check.integer(limit=limit)
    root = data_directory()
    if root is not None and root.exists() and not root.is_dir():
        raise ValueError(f"GIA_JAX_DATA_DIR or TFDS_DATA_DIR must be a folder, got {str(root)!r}")
    unknown = f"data must be photos, digits or a TFDS set, got {name!r}"
    if not NAME.fullmatch(name):
        raise ValueError(unknown)
    try:
        builder = tfds.builder(name, data_dir=root)
    except (tfds.core.DatasetNotFoundError, ValueError):
        raise ValueError(unknown) from None
    except Exception as error:
        raise ValueError(f"data {name!r} cannot be read: {_one_line(error)}") from None
    if not (Path(builder.data_path) / "dataset_info.json").exists():
        raise ValueError(
            f"data {name!r} is not prepared in {builder.data_path}: set GIA_JAX_DATA_DIR to a folder that holds it, or "
            f"prepare it once with tensorflow installed: "
            f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        )
    splits, features = builder.info.splits, dict(builder.info.features)
    if split not in splits:
        raise ValueError(f"split must be one of {sorted(splits)}, got {split!r}")
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
        raise ValueError(f"data {name!r} must hold 'image' and 'label', a class, got {sorted(features)}")
    if features["image"].np_dtype != np.uint8:
        raise ValueError(f"data {name!r} must hold images of uint8, got {np.dtype(features['image'].np_dtype)}")
    try:
        source: Any = builder.as_data_source(split=split)
        if "id" in features:
            skip: Any = {"image": tfds.decode.SkipDecoding()}
            records: Any = builder.as_data_source(split=split, decoders=skip)
            names = [record["id"].decode() for record in records]
            order = sorted(range(len(names)), key=names.__getitem__)
        else:
            names = [f"{split}_{i:05d}" for i in range(len(source))]
            order = list(range(len(names)))
        examples = [source[i] for i in order[:limit]]
        statistics = STATISTICS.get(builder.name)
        if statistics is None:
            others = sorted((other for other in splits if other != split), key=lambda other: other != "train")
            public: Any = builder.as_data_source(split=others[0]) if others else source
            places = range(len(public)) if others else order[len(examples) :]
            statistics = _statistics(public[i]["image"] for i in places[:NUM_PUBLIC])
    except Exception as error:
        raise ValueError(f"data {name!r} in {builder.data_path} cannot be read: {_one_line(error)}") from None
    if len({example["image"].shape for example in examples}) != 1:
        raise ValueError(f"data {name!r} must hold images, of one size")
    images = np.stack([example["image"] for example in examples]).astype(np.float32) / 255
    labels = np.asarray([example["label"] for example in examples], np.int32)
    mean, std = statistics or ((0.5,) * images.shape[-1],) * 2
    ids = [names[i] for i in order[:limit]]
    return ImageData(f"{name}/{split}", images, labels, ids, features["label"].names, mean, std)


def _statistics(images: Iterable[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Computes channel means and deviations of 8-bit images of any sizes, as pixels in [0, 1].

    They are None where there are no images. The deviation of a channel that is the same everywhere is taken to be 1:
    normalising only takes off its mean.
    """
    count, total, squares = 0, np.zeros(()), np.zeros(())
    for image in images:
        pixels = image.reshape(-1, image.shape[-1]) / 255
        count, total, squares = count + len(pixels), total + pixels.sum(0), squares + np.square(pixels).sum(0)
    if not count:
        return None
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
    return tuple(mean.tolist()), tuple(np.where(std > 1e-6, std, 1).tolist())


def _one_line(error: Exception) -> str:
    """Says what went wrong in one line."""
    return " ".join(str(error).split()) or type(error).__name__
