"""The fields of a row of a table, numbers and categories, and the forms in which a row exists.

* Columns: the values of every field by its name, in their own units, such as {"age": [39], "sex": ["Male"]}.
* Fields, shape (..., fields): numbers in standard deviations from their mean, and the index of each category's value.
* Entries, shape (..., entries): numbers likewise, and the probability of every value of each category. This is what the
  model takes. A category that is certain is one-hot.
* Unknowns, shape (..., entries): numbers likewise, and logits, of which the softmax makes the probabilities.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gia_jax import _check

SURE = 30.0  # the logit of a value that is certain: the softmax is one-hot to within 1e-9


class Field(NamedTuple):
    """A field of a row: a number, or a category if it has values to choose from.

    Attributes:
        name: Name of the field.
        mean: Mean that is subtracted from a number, in its own units.
        std: Standard deviation that a number is divided by, positive.
        low: Least possible number, in its own units.
        high: Largest possible number, above `low`.
        categories: Values of a category, all different; () for a number.
    """

    name: str
    mean: float = 0.0
    std: float = 1.0
    low: float = -math.inf
    high: float = math.inf
    categories: tuple[str, ...] = ()

    @property
    def kind(self) -> Literal["number", "category"]:
        """Whether the field is a number or a category."""
        return "category" if self.categories else "number"

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest possible number, in standard deviations from the mean."""
        return (self.low - self.mean) / self.std, (self.high - self.mean) / self.std


class Schema(NamedTuple):
    """The fields of a row, in the order of its columns.

    Attributes:
        fields: The fields, with names that differ.

    Examples:
        >>> import jax.numpy as jnp
        >>> from gia_jax.modalities import Field, Schema
        >>> schema = Schema((Field("age", mean=40.0, std=10.0), Field("work", categories=("private", "public"))))
        >>> fields = schema.fields_of({"age": [55], "work": ["public"]})
        >>> fields.tolist(), schema.encode(jnp.asarray(fields)).tolist()
        ([[1.5, 1.0]], [[1.5, 0.0, 1.0]])
        >>> schema.columns_of(fields)
        {'age': ['55'], 'work': ['public']}
    """

    fields: tuple[Field, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of entries of each field."""
        return tuple(max(len(field.categories), 1) for field in self.fields)

    @property
    def num_entries(self) -> int:
        """The number of entries of a row."""
        return sum(self.sizes)

    @property
    def slices(self) -> list[slice]:
        """The entries of each field."""
        ends = np.cumsum((0, *self.sizes)).tolist()
        return [slice(start, end) for start, end in itertools.pairwise(ends)]

    def places(self, kind: str) -> list[int]:
        """Returns the places of the fields of one kind, "number" or "category"."""
        return [i for i, field in enumerate(self.fields) if field.kind == kind]

    def check(self) -> None:
        """Checks that this is the schema of a row.

        Raises:
            ValueError: If there are no fields, two have one name, or a field has a deviation that is not positive,
                bounds in the wrong order, a mean that is not finite or twice the same value.
        """
        names = [field.name for field in self.fields]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"schema.fields must have names that differ, at least one, got {names}")
        for field in self.fields:
            where = f"schema.fields[{field.name!r}]"
            _check.positive(**{f"{where}.std": field.std})
            _check.finite(f"{where}.mean", field.mean)
            _check.finite(f"{where}.std", field.std)
            if not field.low < field.high:
                raise ValueError(f"{where}.low must be below high={field.high}, got {field.low}")
            if len(set(field.categories)) < len(field.categories):
                raise ValueError(f"{where}.categories must be different values, got {field.categories}")

    def fields_of(self, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> Float[np.ndarray, "n fields"]:
        """Reads rows in their own units.

        Args:
            columns: The n values of every field, by its name. Other columns are not read.

        Returns:
            The fields of the rows, float32.

        Raises:
            ValueError: If a column is missing or of another length, a number is none, or a category has another value
                than those of the schema.
        """
        read = []
        for field in self.fields:
            if field.name not in columns:
                raise ValueError(f"columns must have {field.name!r}, got {sorted(columns)}")
            values = np.asarray(columns[field.name])
            if field.categories:
                read.append(_indices(field, values).astype(np.float32))
                continue
            try:
                numbers = values.astype(np.float32)
            except ValueError:
                raise ValueError(f"columns[{field.name!r}] must be numbers, got {str(values.flat[0])!r}") from None
            _check.finite(f"columns[{field.name!r}]", numbers)
            read.append((numbers - np.float32(field.mean)) / np.float32(field.std))
        if len({column.shape for column in read}) > 1 or read[0].ndim != 1:
            raise ValueError(f"columns must be of one length, got the shapes {[column.shape for column in read]}")
        return np.stack(read, 1)

    def columns_of(self, fields: Float[np.ndarray, "n fields"]) -> dict[str, list[str]]:
        """Writes rows in their own units, as text.

        Args:
            fields: The fields of n rows.

        Returns:
            The n values of every field, by its name: numbers with four digits, and the names of categories.
        """
        written = {}
        for field, column in zip(self.fields, np.asarray(fields, np.float64).T, strict=True):
            # Rounded to a ten-thousandth of the deviation: less is rounding of the entries.
            numbers = np.round(column * field.std + field.mean, 4 - math.ceil(math.log10(field.std))) + 0.0
            named = [field.categories[int(value)] for value in column] if field.categories else None
            written[field.name] = [f"{number:.4g}" for number in numbers] if named is None else named
        return written

    def encode(self, fields: Float[Array, "*n fields"]) -> Float[Array, "*n entries"]:
        """Makes entries of fields, one-hot for categories.

        Args:
            fields: Fields of rows.

        Returns:
            What the model takes.

        Raises:
            ValueError: If there is another number of fields, or a concrete index is none of its category.
        """
        if jnp.shape(fields)[-1:] != (len(self.fields),):
            raise ValueError(f"fields must have {len(self.fields)} columns, got the shape {jnp.shape(fields)}")
        pieces = []
        for i, (field, size) in enumerate(zip(self.fields, self.sizes, strict=True)):
            if field.categories:
                _check_index(field.name, fields[..., i], size)
                pieces.append(jax.nn.one_hot(fields[..., i].astype(jnp.int32), size, dtype=fields.dtype))
            else:
                pieces.append(fields[..., i : i + 1])
        return jnp.concatenate(pieces, -1)

    def relax(self, unknowns: Float[Array, "*n entries"]) -> Float[Array, "*n entries"]:
        """Makes entries of unknowns: the values of each category have probabilities.

        Args:
            unknowns: Numbers, and logits of the values of each category.

        Returns:
            Numbers as they are, and the softmax of the logits.
        """
        pairs = zip(self.fields, self.slices, strict=True)
        parts = [(field.categories, unknowns[..., own]) for field, own in pairs]
        return jnp.concatenate([jax.nn.softmax(part) if values else part for values, part in parts], -1)

    def unknowns_of(self, fields: Float[Array, "*n fields"]) -> Float[Array, "*n entries"]:
        """Returns unknowns that `relax` makes these rows of, categories to within 1e-9.

        Args:
            fields: Fields of rows.

        Returns:
            Numbers, and logits of 0 and of `SURE`.
        """
        factors = np.repeat([SURE if field.categories else 1.0 for field in self.fields], self.sizes)
        entries = self.encode(fields)
        return entries * jnp.asarray(factors, entries.dtype)

    def project(self, unknowns: Float[Array, "*n entries"]) -> Float[Array, "*n entries"]:
        """Moves numbers between their bounds. Logits are all possible.

        Args:
            unknowns: Numbers, and logits.

        Returns:
            The nearest unknowns that are possible.
        """
        bounds = np.repeat([field.bounds for field in self.fields], self.sizes, axis=0).T
        return jnp.clip(unknowns, *jnp.asarray(bounds, unknowns.dtype))

    def likeliest(self, entries: Float[np.ndarray, "*n entries"]) -> Float[np.ndarray, "*n fields"]:
        """Returns the rows that entries stand for: numbers between their bounds, and each category's likeliest value.

        Args:
            entries: Numbers, and the probabilities of the values of each category.

        Returns:
            The fields of rows that are valid. A number that is NaN stays so.
        """
        columns = []
        for field, own in zip(self.fields, self.slices, strict=True):
            part = entries[..., own]
            columns.append(np.argmax(part, -1) if field.categories else np.clip(part[..., 0], *field.bounds))
        return np.stack(columns, -1).astype(entries.dtype)

    def right(
        self,
        fields: Float[np.ndarray, "*n fields"],
        truth: Float[np.ndarray, "*n fields"],
        *,
        tolerance: float = 0.1,
    ) -> Bool[np.ndarray, "*n fields"]:
        """Tells which fields are right.

        Args:
            fields: Fields of reconstructed rows.
            truth: Fields of the true rows, in the same order.
            tolerance: Standard deviations within which a number counts as right, at least 0.

        Returns:
            Whether each number is near the true one, and each category the same.
        """
        differences = np.abs(fields - truth)
        limits = np.asarray([0 if field.categories else tolerance for field in self.fields], differences.dtype)
        return differences <= limits

    def distances(
        self, entries: Float[np.ndarray, "n entries"], fields: Float[np.ndarray, "m fields"]
    ) -> Float[np.ndarray, "n m"]:
        """Computes squared distances from rows by their entries to rows by their fields, as if these were one-hot.

        Args:
            entries: Entries of n rows.
            fields: Fields of m rows.

        Returns:
            The sum of squared differences of entries for each pair.
        """
        starts, numbers, categories = np.cumsum((0, *self.sizes)), self.places("number"), self.places("category")
        mine, theirs = entries[:, starts[numbers]], fields[:, numbers]
        squares = np.square(mine[:, None] - theirs[None]).sum(-1)
        if not categories:
            return squares
        probabilities = np.concatenate([entries[:, self.slices[i]] for i in categories], 1)
        indices = fields[:, categories].astype(int) + starts[categories]
        shared = sum(entries[:, index] for index in indices.T)
        return squares + np.square(probabilities).sum(1)[:, None] - 2 * shared + len(categories)

    def commonest(self, fields: Float[np.ndarray, "n fields"]) -> Float[np.ndarray, " fields"]:
        """Returns the median of each number and the commonest value of each category.

        Args:
            fields: Fields of n rows, at least one.

        Returns:
            The fields of one row.
        """

        def of_one(field: Field, column: np.ndarray) -> float:
            return float(np.bincount(column.astype(int)).argmax() if field.categories else np.median(column))

        columns = [of_one(field, column) for field, column in zip(self.fields, fields.T, strict=True)]
        return np.asarray(columns, fields.dtype)

    def guesses(
        self,
        truth: Float[np.ndarray, "n fields"],
        public: Float[np.ndarray, "m fields"],
        *,
        labels: np.ndarray | None = None,
        public_labels: np.ndarray | None = None,
    ) -> dict[str, Float[np.ndarray, "n fields"]]:
        """Guesses rows without a gradient.

        Args:
            truth: Fields of the true rows.
            public: Fields of public rows of the same kind, none of them a victim, at least one.
            labels: The class of each true row, an integer. None where it is not known.
            public_labels: The class of each public row; with `labels` only.

        Returns:
            "commonest values" of the public rows, and "nearest row", the one of them closest to the truth, which is an
            oracle; with labels "commonest of the class" and "nearest of the class", an oracle too.

        Raises:
            ValueError: If there are no public rows, labels are given without the other ones, or no public row has the
                class of a true one.
        """
        if not len(public):
            raise ValueError(f"public must hold at least one row, got the shape {public.shape}")
        if (labels is None) != (public_labels is None):
            missing = "labels" if labels is None else "public_labels"
            raise ValueError(f"labels and public_labels must be given together, got no {missing}")

        def nearest(own: np.ndarray, among: np.ndarray) -> np.ndarray:
            return among[np.argmin(self.distances(np.asarray(self.encode(jnp.asarray(own))), among), 1)]

        commonest = np.broadcast_to(self.commonest(public), truth.shape)
        found = {"commonest values": commonest, "nearest row": nearest(truth, public)}
        if labels is None or public_labels is None:
            return found
        of_class, nearest_of_class = np.empty_like(truth), np.empty_like(truth)
        for one in np.unique(labels):
            members, own = public[public_labels == one], labels == one
            if not len(members):
                raise ValueError(f"public_labels must have every class of labels, got none of {one}")
            of_class[own] = self.commonest(members)
            nearest_of_class[own] = nearest(truth[own], members)
        return found | {"commonest of the class": of_class, "nearest of the class": nearest_of_class}


def fit_schema(columns: Mapping[str, Sequence[Any] | np.ndarray]) -> Schema:
    """Makes the schema of public rows.

    Args:
        columns: The n values of every field, by its name. Those of numbers are a number with the mean and the standard
            deviation of these rows, and those of text are a category with the values of these rows, sorted.

    Returns:
        The schema, in the order of the columns. A number that never changes has a deviation of 1.

    Raises:
        ValueError: If there are no columns, a column is empty, or a number is not finite.

    Examples:
        >>> from gia_jax.modalities import fit_schema
        >>> schema = fit_schema({"age": [30, 50], "work": ["public", "private"]})
        >>> [(field.name, field.kind, field.mean, field.std) for field in schema.fields]
        [('age', 'number', 40.0, 10.0), ('work', 'category', 0.0, 1.0)]
    """
    fields = []
    for name, values in columns.items():
        column = np.asarray(values)
        if not column.size:
            raise ValueError(f"columns[{name!r}] must hold at least one value, got none")
        if column.dtype.kind in "iuf":
            _check.finite(f"columns[{name!r}]", column)
            fields.append(Field(name, float(column.mean(dtype=np.float64)), float(column.std(dtype=np.float64)) or 1.0))
        else:
            fields.append(Field(name, categories=tuple(np.unique(column.astype(str)).tolist())))
    schema = Schema(tuple(fields))
    schema.check()
    return schema


def _indices(field: Field, values: np.ndarray) -> np.ndarray:
    """Returns the places of values among those of a category."""
    order = np.argsort(field.categories)
    known = np.asarray(field.categories)[order]
    places = np.minimum(np.searchsorted(known, values.astype(str)), len(known) - 1)
    wrong = known[places] != values.astype(str)
    if wrong.any():
        raise ValueError(
            f"columns[{field.name!r}] must be among {field.categories}, got {str(values[wrong].flat[0])!r}"
        )
    return order[places]


def _check_index(name: str, values: Array, size: int) -> None:
    """Raises ValueError for a concrete index that is none of a category."""
    if _check.is_concrete(values) and jnp.size(values):
        indices = np.asarray(values)
        wrong = ~((indices >= 0) & (indices < size) & (indices == np.floor(indices)))
        if wrong.any():
            raise ValueError(f"fields of {name!r} must be integers from 0 to {size - 1}, got {indices[wrong].flat[0]}")
