"""Data sets prepared by TensorFlow Datasets, read without TensorFlow. Needs the extra `data`."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from gia_jax.data.images import ImageData

# Channel statistics of the training sets, computed from their pixels.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
}


def data_directory() -> Path | None:
    """$GIA_JAX_DATA_DIR/tfds, $GIA_JAX_DATA_DIR, $TFDS_DATA_DIR, or None, TFDS's own default."""
    root = os.environ.get("GIA_JAX_DATA_DIR")
    if root:
        return Path(root) / "tfds" if (Path(root) / "tfds").is_dir() else Path(root)
    tfds_root = os.environ.get("TFDS_DATA_DIR")
    return Path(tfds_root) if tfds_root else None


def prepared(name: str, *, split: str = "test", limit: int | None = None) -> ImageData:
    """The images of a TFDS classification set, ordered by their id where they have one (TFDS shuffles them).

    Args:
        name: Of the TFDS builder, such as "cifar10".
        split: "train", "test", ...
        limit: Images to decode, the first ones in that order; None for all.

    Returns:
        The images. Sets without published channel statistics are normalised by those of the images loaded.

    Raises:
        ValueError: The set is unknown, not prepared, has no such split, or is no set of labelled images of one size.
        ImportError: The extra `data` is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError("data sets need the extra 'data': pip install 'gia-jax[data]'") from error
    root = data_directory()
    try:
        builder = tfds.builder(name, data_dir=root)
    except (tfds.core.DatasetNotFoundError, ValueError):
        raise ValueError(f"data must be photos, digits or a TFDS set, got {name!r}") from None
    if not (Path(builder.data_path) / "dataset_info.json").exists():
        raise ValueError(
            f"data {name!r} is not prepared in {builder.data_path}: set GIA_JAX_DATA_DIR to a folder that holds it, or "
            f"prepare it once with tensorflow installed: "
            f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        )
    if split not in builder.info.splits:
        raise ValueError(f"split must be one of {sorted(builder.info.splits)}, got {split!r}")
    if not {"image", "label"} <= set(builder.info.features):
        raise ValueError(f"data {name!r} must hold 'image' and 'label', got {sorted(builder.info.features)}")
    skip: Any = {"image": tfds.decode.SkipDecoding()}
    source: Any = tfds.data_source(name, split=split, data_dir=root)
    if "id" in builder.info.features:
        records: Any = tfds.data_source(name, split=split, data_dir=root, decoders=skip)
        names = [record["id"].decode() for record in records]
        order = sorted(range(len(names)), key=names.__getitem__)
    else:
        names = [f"{split}_{i:05d}" for i in range(len(source))]
        order = list(range(len(names)))
    order = order[:limit]
    examples = [source[i] for i in order]
    if len({example["image"].shape for example in examples}) != 1:
        raise ValueError(f"data {name!r} must hold images of one size")
    images = np.stack([example["image"] for example in examples]).astype(np.float32) / 255
    labels = np.asarray([example["label"] for example in examples], np.int32)
    mean, std = STATISTICS.get(name) or (images.mean((0, 1, 2)).tolist(), images.std((0, 1, 2)).tolist())
    features: Any = builder.info.features
    return ImageData(f"{name}/{split}", images, labels, [names[i] for i in order], features["label"].names, mean, std)
