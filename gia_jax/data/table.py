"""A set of labelled rows as NumPy columns."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class TableData(NamedTuple):
    """Labelled rows of a table. `gia_jax.modalities.fit_schema` makes the schema of its columns.

    Attributes:
        name: Name of the set and its split.
        columns: Values of the n rows in each column, by its name: numbers of a floating type, or categories as text.
        labels: Class indices, int32, shape (n,).
        class_names: One name for each class.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from gia_jax import data, modalities
        >>> columns = {"age": np.array([30.0, 50.0]), "work": np.array(["public", "private"])}
        >>> rows = data.TableData("two rows", columns, np.array([0, 1]), ("no", "yes"))
        >>> schema = modalities.fit_schema(rows.columns)
        >>> schema.encode(jnp.asarray(schema.fields_of(rows.columns))).tolist()
        [[-1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    """

    name: str
    columns: Mapping[str, np.ndarray]
    labels: np.ndarray
    class_names: Sequence[str]
