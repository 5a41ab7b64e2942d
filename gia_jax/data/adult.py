"""Adult: census records, and whether an income is above 50,000 dollars (Becker and Kohavi, UCI repository, 1996)."""

import gzip
import os
import zlib
from pathlib import Path

import numpy as np

from gia_jax import _check
from gia_jax.data.table import TableData

# Columns of the files, by their places: numbers first.
NUMBERS = {0: "age", 2: "weight", 4: "years of education", 10: "gains", 11: "losses", 12: "hours"}
CATEGORIES = {
    1: "work",
    3: "education",
    5: "marital status",
    6: "occupation",
    7: "relationship",
    8: "race",
    9: "sex",
    13: "country",
}
LABEL = 14
CLASSES = ("<=50K", ">50K")
FILES = {"train": "adult.data.gz", "test": "adult.test.gz"}


def adult(*, split: str = "test", limit: int | None = None, folder: str | Path | None = None) -> TableData:
    """Loads Adult from the files of the UCI repository, compressed by gzip: adult.data.gz and adult.test.gz.

    Args:
        split: "train" or "test".
        limit: Number of rows, at least 1: the first ones, or all where there are fewer. None loads all.
        folder: Folder of the files. None is for $GIA_JAX_DATA_DIR/tabular.

    Returns:
        The rows in the order of the file: 6 numbers and 8 categories. A "?" in the file, for a category that is not
        known, is a value of its own.

    Raises:
        ValueError: If there is no such split, `limit` is no positive integer, the environment variable is needed and
            not set, the file is missing or cannot be read, or a line of it is no row. After `limit` rows the file is
            not read further.

    Examples:
        >>> import gzip, pathlib, tempfile
        >>> from gia_jax import data
        >>> line = b"39, Local, 77516, Bachelors, 13, Divorced, Sales, Husband, White, Male, 0, 0, 40, Cuba, <=50K"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (pathlib.Path(folder) / "adult.data.gz").write_bytes(gzip.compress(line))
        ...     rows = data.adult(split="train", folder=pathlib.Path(folder))
        >>> rows.columns["age"].tolist(), rows.columns["work"].tolist(), rows.labels.tolist()
        ([39.0], ['Local'], [0])
    """
    if not isinstance(split, str) or split not in FILES:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if limit is not None:
        _check.integer(limit=limit)
    if folder is None:
        root = os.environ.get("GIA_JAX_DATA_DIR")
        if not root:
            raise ValueError(
                f"GIA_JAX_DATA_DIR must be a folder with tabular/{FILES[split]}, a file of Adult from the UCI "
                "repository compressed by gzip, got none"
            )
        folder = Path(root) / "tabular"
    path = Path(folder) / FILES[split]
    try:
        lines = _lines(path, limit)
        columns = {name: _numbers(name, lines[:, i]) for i, name in NUMBERS.items()}
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"data adult needs the file {str(path)!r}, which cannot be read: {error}") from None
    columns |= {name: lines[:, i] for i, name in CATEGORIES.items()}
    labels = (lines[:, LABEL] == ">50K").astype(np.int32)
    return TableData(f"adult {split}", columns, labels, ("at most 50,000", "above 50,000"))


def _lines(path: Path, limit: int | None) -> np.ndarray:
    """Returns the fields of the first rows as text, or raises ValueError for a line that is no row."""
    rows: list[list[str]] = []
    with gzip.open(path, "rt", encoding="utf8") as file:
        for number, line in enumerate(file, 1):
            fields = line.strip().rstrip(".").split(", ")
            if fields == [""] or line.startswith("|"):  # empty lines, and the remark at the head of the test file
                continue
            if len(fields) != LABEL + 1:
                raise ValueError(
                    f"line {number} must have {LABEL + 1} fields with ', ' between them, got {len(fields)}"
                )
            if fields[LABEL] not in CLASSES:
                raise ValueError(f"line {number} must end with one of {CLASSES}, got {fields[LABEL]!r}")
            rows.append(fields)
            if limit is not None and len(rows) == limit:
                break
    if not rows:
        raise ValueError("there is no row")
    return np.asarray(rows)


def _numbers(name: str, column: np.ndarray) -> np.ndarray:
    """Reads a column of finite numbers."""
    numbers = column.astype(np.float32)
    _check.finite(name, numbers)
    return numbers
