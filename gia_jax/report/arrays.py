"""Loss curves and pictures of results, in a file results.npz beside results.json."""

import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

MAX_POINTS = 256  # largest number of points of a curve
OF = "results.json"  # entry with the fingerprint of the results.json that the arrays belong to


def pack(results: bytes, rows: Mapping[str, Mapping[str, np.ndarray]]) -> bytes:
    """Encodes the content of results.npz.

    Args:
        results: Content of the results.json that the arrays belong to. Its fingerprint goes into the file.
        rows: Arrays of every row of the results, by the name of the row, which is "" if there is only one.

    Returns:
        The content of the file, for `unpack`.

    Examples:
        >>> import numpy as np
        >>> from gia_jax.report.arrays import pack
        >>> pack(b"{}", {"": {"losses": np.zeros((1, 1, 9))}})[:2]
        b'PK'
    """
    content = io.BytesIO()
    named = {f"{row}/{name}": array for row, arrays in rows.items() for name, array in arrays.items()}
    np.savez_compressed(content, **{OF: np.array(_fingerprint(results))}, **named)  # pyrefly: ignore
    return content.getvalue()


def unpack(path: Path, results: bytes) -> dict[str, dict[str, np.ndarray]]:
    """Reads results.npz.

    Args:
        path: Path of the file.
        results: Content of the results.json beside it.

    Returns:
        The arrays of every row, by the name of the row. The mapping is empty if there is no such file, it cannot be
        read, or it belongs to other results, such as those of an earlier run in the same folder.

    Examples:
        >>> from pathlib import Path
        >>> from gia_jax.report.arrays import unpack
        >>> unpack(Path("no_such_folder/results.npz"), b"{}")
        {}
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if OF not in arrays or str(arrays[OF]) != _fingerprint(results):
                return {}
            for name in arrays:
                if name != OF:
                    row, _, own = name.rpartition("/")
                    found.setdefault(row, {})[own] = arrays[name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return {}
    return found


def thinned(losses: np.ndarray) -> dict[str, np.ndarray]:
    """Thins loss curves to at most 256 equally spaced steps.

    Args:
        losses: Losses of shape (v, r, num_steps).

    Returns:
        The "steps", which count from 1, shape (k,), and the "losses" at these steps, shape (v, r, k), with k at most
        256. The mapping is empty if num_steps is 0.

    Examples:
        >>> import numpy as np
        >>> from gia_jax.report.arrays import thinned
        >>> found = thinned(np.zeros((1, 1, 9_000)))
        >>> found["steps"][[0, -1]].tolist(), found["losses"].shape
        ([1, 9000], (1, 1, 256))
    """
    count = losses.shape[-1]
    if not count:
        return {}
    steps = np.unique(np.linspace(1, count, min(count, MAX_POINTS)).round().astype(int))
    return {"steps": steps, "losses": losses[..., steps - 1].astype(np.float32)}


def _fingerprint(content: bytes) -> str:
    """Returns the SHA-256 hash of a file in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
