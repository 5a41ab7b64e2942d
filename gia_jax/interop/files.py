"""Files of named arrays, `.safetensors` and `.npz`: what a server recorded, on its way into and out of the library."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gia_jax._files import write_whole
from gia_jax.interop.tensors import as_numpy, named, natural

ORDER = "gia_jax.order"  # the key under which a .safetensors file keeps the order of its names, which the format sorts

# The types that are read, by their codes in a .safetensors file.
TYPES = {
    "BOOL": np.dtype(bool),
    "BF16": jnp.dtype(jnp.bfloat16),
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    **{f"{kind.upper()}{8 * size}": np.dtype(f"<{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)},
}


class Format(NamedTuple):
    """How a kind of file is written and read.

    Attributes:
        pack: Function from arrays by name to the content of a file.
        unpack: Function from the content of a file to arrays by name.
    """

    pack: Callable[[dict[str, np.ndarray]], bytes]
    unpack: Callable[[bytes], dict[str, np.ndarray]]


def save_tensors(path: str | Path, tree: PyTree) -> None:
    """Writes the arrays of a tree to a file, by their names and in their order, whole or not at all.

    Args:
        path: Path of the file, whose folder must exist. The suffix is ".safetensors" or ".npz".
        tree: Tree of arrays of NumPy or JAX or of PyTorch's tensors, such as parameters, an update, or a state dict.
            An array's name is its path's keys joined by dots, such as "conv1.kernel".

    Raises:
        ValueError: If the suffix is unknown, the tree is empty, a leaf is no array of numbers, two leaves have one
            name, the format has no place for a type (".npz" for bfloat16), or the file cannot be written.
        ImportError: If the suffix is ".safetensors" and the package of that name is not installed.

    Examples:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from gia_jax import interop
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "update.npz"
        ...     interop.save_tensors(path, {"head": {"bias": np.ones(3)}})
        ...     interop.load_tensors(path)
        {'head.bias': array([1., 1., 1.])}
    """
    path = Path(path)
    pack = _format(path).pack
    arrays = {name: np.asarray(array, order="C") for name, array in named(tree).items()}
    native = {name: array.astype(array.dtype.newbyteorder("=")) for name, array in arrays.items()}
    try:
        write_whole(path, pack(native))
    except OSError as error:
        raise ValueError(f"path must be a file that can be written, got '{path}': {error.strerror or error}") from None


def load_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a file by their names. Nothing in the file is run: pickled objects are refused.

    Args:
        path: Path of a `.safetensors` or `.npz` file, of `save_tensors` or of any other program.

    Returns:
        The arrays by name, in the order in which they were saved. A `.safetensors` file of another program keeps no
        order, and its names come in their natural order (conv2 before conv10).

    Raises:
        ValueError: If the suffix is unknown, the file cannot be read, is damaged or empty, or holds anything but
            arrays of numbers.
        ImportError: If the suffix is ".safetensors" and the package of that name is not installed.

    Examples:
        >>> from gia_jax import interop
        >>> interop.load_tensors("weights.pt")
        Traceback (most recent call last):
        ValueError: path must end in .safetensors or .npz, got 'weights.pt'
    """
    path = Path(path)
    unpack = _format(path).unpack
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"path must be a file that can be read, got '{path}': {error.strerror or error}") from None
    if not content:
        raise ValueError(f"path must be a file with arrays in it, got '{path}', which is empty")
    try:
        arrays = unpack(content)
    except ImportError:
        raise
    except Exception as error:  # what reads a damaged file may raise anything, from zlib.error to a TokenError
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"path must be a whole {path.suffix} file of arrays, got '{path}': {reason}") from None
    if not arrays:
        raise ValueError(f"path must be a file with arrays in it, got '{path}', which has none")
    return {name: as_numpy(f"{name!r} in '{path}'", array) for name, array in arrays.items()}


def _format(path: Path) -> Format:
    """Returns how the file is written and read, by its suffix."""
    if path.suffix not in FORMATS:
        raise ValueError(f"path must end in {' or '.join(FORMATS)}, got '{path}'")
    return FORMATS[path.suffix]


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    """Returns the content of a `.npz` file. `np.savez` itself refuses names such as "file"."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            if array.dtype.kind == "V":
                raise ValueError(f"tree[{name!r}] of type {array.dtype} has no place in .npz, save it as .safetensors")
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return buffer.getvalue()


def _from_npz(content: bytes) -> dict[str, np.ndarray]:
    """Returns the arrays of a `.npz` file."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise ValueError("it is another kind of file, or a part of one")
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        others = [name for name in archive.zip.namelist() if not name.endswith(".npy")]
        if others:
            raise ValueError(f"it holds {others[0]!r}, which is no array, as files of torch.save do")
        return {name: _one(archive, name) for name in archive.files}


def _one(archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    try:
        return archive[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise ValueError(f"{name!r} is a pickled object, which is never loaded") from None


def _safetensors() -> ModuleType:
    """Imports the package that reads and writes `.safetensors`."""
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError("a .safetensors file needs the extra 'interop': pip install 'gia-jax[interop]'") from None
    return safetensors


def _packed(arrays: dict[str, np.ndarray]) -> bytes:
    """Returns the content of a `.safetensors` file."""
    return _safetensors().numpy.save(arrays, metadata={ORDER: json.dumps(list(arrays))})


def _unpacked(content: bytes) -> dict[str, np.ndarray]:
    """Returns the arrays of a `.safetensors` file."""
    tensors = dict(_safetensors().deserialize(content))
    arrays = {name: _array(name, tensor["dtype"], tensor["data"], tensor["shape"]) for name, tensor in tensors.items()}
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    order = json.loads(header.get("__metadata__", {}).get(ORDER, "[]"))
    kept = order if sorted(order) == sorted(arrays) else sorted(arrays, key=natural)
    return {name: arrays[name] for name in kept}


def _array(name: str, code: str, data: bytes | bytearray, shape: list[int]) -> np.ndarray:
    """Returns an array of a `.safetensors` file, which the package's own reader refuses to do for bfloat16."""
    if code not in TYPES:
        raise ValueError(f"{name!r} is of type {code}, which is not read")
    return np.frombuffer(data, TYPES[code]).reshape(shape).copy()


FORMATS = {".safetensors": Format(_packed, _unpacked), ".npz": Format(_npz, _from_npz)}
