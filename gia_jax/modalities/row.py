"""Rows of a table: numbers and categories, with the unknowns of `schema.Schema`.

That categories are searched as the softmax of logits, and that the share of right fields is the score, follows Vero et
al., TabLeak: Tabular Data Leakage in Federated Learning, ICML 2023. Its vote of many restarts is not here.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float

from gia_jax import _check
from gia_jax._files import write_whole
from gia_jax.base import Batch, InitFn, PriorFn
from gia_jax.matching.initializations import normal
from gia_jax.modalities.base import Modality, Scored, Shown, class_labels, filled, reordered
from gia_jax.modalities.schema import Schema

MAX_ROWS = 16


def row(
    schema: Schema,
    *,
    tolerance: float = 0.1,
    prior_fn: PriorFn | None = None,
    init_fn: InitFn | None = None,
) -> Modality:
    """Builds the modality of rows that the model takes as entries: numbers, and the values of categories one-hot.

    Args:
        schema: Fields of a row, which the attacker knows.
        tolerance: Standard deviations within which a number counts as right, at least 0 and finite.
        prior_fn: Prior `(batch, observation) -> ` scalar. None has none.
        init_fn: Function `(key, observation) -> unknowns` of the first unknowns. None draws normal ones.

    Returns:
        The modality. Its scores are "fields", the share of fields that are right, in [0, 1], and "row", 1 where all of
        a row's fields are right and else 0; a reconstruction with a NaN has none right. Its guesses are those of
        `Schema.guesses`, with those by class where all labels are class indices and there are public rows of every
        class. `draw_fn` writes a text file.

    Raises:
        ValueError: If `schema` is no valid schema, or `tolerance` is no finite number of at least 0. `score_fn` and
            `guess_fn` raise it for rows of another width, for none, and for a truth or public rows that are not finite.

    Examples:
        An attack on a row:

        >>> import jax, jax.numpy as jnp
        >>> from gia_jax import Batch, ThreatModel, clients, gradient_matching, modalities, observe, run
        >>> schema = modalities.fit_schema({"age": [25, 39, 61], "work": ["private", "public", "none"]})
        >>> modality = modalities.row(schema)
        >>> fields = schema.fields_of({"age": [52], "work": ["public"]})
        >>> truth = Batch(schema.encode(jnp.asarray(fields)), jnp.array([1]))
        >>> client_fn = clients.federated_sgd(clients.cross_entropy(lambda params, x: jnp.tanh(x @ params)))
        >>> params = jax.random.normal(jax.random.key(0), (schema.num_entries, 3))
        >>> seen = observe(jax.random.key(1), ThreatModel(labels=True), client_fn, params, truth)
        >>> attack = gradient_matching(client_fn, **modality.matching())
        >>> found, _ = jax.jit(lambda key: run(attack, key, seen, num_steps=400))(jax.random.key(2))
        >>> float(modality.score_fn(found.batch, truth).scores["fields"][0])
        1.0
    """
    if not isinstance(schema, Schema):
        raise ValueError(f"schema must be a Schema, such as fit_schema makes it, got {_check.brief(schema)}")
    schema.check()
    _check.weight(tolerance=tolerance)
    _check.functions(prior_fn=prior_fn, init_fn=init_fn)
    bounded = any(math.isfinite(bound) for field in schema.fields for bound in (field.low, field.high))

    def read(name: str, batch: Batch) -> Float[np.ndarray, "v b entries"]:
        entries = np.asarray(batch.inputs)
        if entries.ndim not in (2, 3) or entries.shape[-1] != schema.num_entries:
            wanted = f"(b, {schema.num_entries}) or (v, b, {schema.num_entries})"
            raise ValueError(f"{name}.inputs must be rows of shape {wanted}, got {entries.shape}")
        if name != "found":
            _check.finite(f"{name}.inputs", entries)
        filled(name, entries.shape)
        return entries.astype(np.promote_types(entries.dtype, np.float32)).reshape(-1, *entries.shape[-2:])

    def of_shape(scores: Any, batch: Batch) -> np.ndarray:
        return np.asarray(scores).reshape(np.shape(batch.inputs)[:-1])

    def decode_fn(unknowns: Float[Array, "b entries"], labels: Any) -> Batch:
        return Batch(schema.relax(unknowns), labels)

    def score_fn(found: Batch, truth: Batch) -> Scored:
        entries, true = read("found", found), read("truth", truth)
        if entries.shape != true.shape:
            raise ValueError(f"found.inputs must have the shape {true.shape} of truth.inputs, got {entries.shape}")
        pairs = [_right_of_one(schema, *pair, tolerance) for pair in zip(entries, true, strict=True)]
        right, assignment = (np.stack(values) for values in zip(*pairs, strict=True))
        batch = reordered(Batch(np.asarray(found.inputs).reshape(entries.shape), ()), assignment)
        scores = {"fields": of_shape(right.mean(-1), truth), "row": of_shape(1.0 * right.all(-1), truth)}
        return Scored(scores, Batch(batch.inputs.reshape(np.shape(truth.inputs)), ()))

    def guess_fn(truth: Batch, public: Batch) -> dict[str, np.ndarray]:
        fields, known = (
            schema.likeliest(read(name, batch)).reshape(-1, len(schema.fields))
            for name, batch in (("truth", truth), ("public", public))
        )
        labels, public_labels = (class_labels(batch, np.shape(batch.inputs)[:-1]) for batch in (truth, public))
        if labels is None or public_labels is None or not np.isin(labels, public_labels).all():
            guesses = schema.guesses(fields, known)
        else:
            guesses = schema.guesses(fields, known, labels=labels.ravel(), public_labels=public_labels.ravel())
        return {
            name: of_shape(schema.right(guess, fields, tolerance=tolerance).mean(-1), truth)
            for name, guess in guesses.items()
        }

    def draw_fn(
        columns: Mapping[str, Batch],
        path: Path,
        *,
        captions: Mapping[str, Sequence[str]] | None = None,
        title: str = "",
    ) -> None:
        read_columns = {name: read(name, batch).reshape(-1, schema.num_entries) for name, batch in columns.items()}
        text = _as_text(schema, read_columns, captions or {})
        write_whole(path, ((f"{title}\n\n" if title else "") + text + "\n").encode())

    return Modality(
        init_fn=normal() if init_fn is None else init_fn,
        decode_fn=decode_fn,
        project_fn=schema.project if bounded else None,
        prior_fn=prior_fn,
        like=jax.ShapeDtypeStruct((schema.num_entries,), jnp.dtype(jnp.float32)),
        score_fn=score_fn,
        shown={"fields": Shown("fields right", ".0%", " right"), "row": Shown("rows right", ".0%", average="mean")},
        guess_fn=guess_fn,
        draw_fn=draw_fn,
        suffix=".txt",
    )


def _right_of_one(
    schema: Schema, entries: np.ndarray, true: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns which fields of one client's rows are right, after reconstructions were assigned to the true rows, and
    this assignment.
    """
    truth, finite = schema.likeliest(true), np.isfinite(entries).all(-1, keepdims=True)
    entries = np.where(finite, entries, 0)
    _, chosen = scipy.optimize.linear_sum_assignment(schema.distances(entries, truth).T)
    right = schema.right(schema.likeliest(entries)[chosen], truth, tolerance=tolerance) & np.take(finite, chosen, 0)
    return right, chosen


def _as_text(schema: Schema, columns: Mapping[str, np.ndarray], captions: Mapping[str, Sequence[str]]) -> str:
    """Writes the first rows, a table each: a line for each field, and a column for each version of the row. The last
    line of a table has the captions.
    """
    from gia_jax.report.tables import table  # the report is made of what stands before it

    if not columns:
        raise ValueError("columns must hold rows, got none")
    counts = {len(entries) for entries in columns.values()}
    if len(counts) > 1:
        raise ValueError(f"columns must hold as many rows each, got {sorted(counts)}")
    (count,) = counts
    written = {name: schema.columns_of(schema.likeliest(entries)) for name, entries in columns.items()}
    _check.captions(captions, columns, count, "rows")

    def block(i: int) -> str:
        lines = [[field.name, *(values[field.name][i] for values in written.values())] for field in schema.fields]
        if captions:
            lines.append(["", *(captions[name][i] if name in captions else "" for name in written)])
        return table(["field", *written], lines)

    blocks = [block(i) for i in range(min(count, MAX_ROWS))]
    note = [f"The first {MAX_ROWS} of {count} rows are shown."] if count > MAX_ROWS else []
    return "\n\n".join(blocks + note)
