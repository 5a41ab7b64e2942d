"""Rows: fields, entries and unknowns, what counts as right, and attacks that find rows or only guess."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gia_jax import Batch, ThreatModel, attacks, clients, control, gradient_matching, labels, observe, run, stack
from gia_jax.modalities import Field, Schema, fit_schema, row

# Categories before, between and after numbers.
SCHEMA = Schema(
    (
        Field("work", categories=("none", "private", "public")),
        Field("age", mean=40.0, std=10.0, low=17.0, high=90.0),
        Field("hours", mean=40.0, std=5.0),
        Field("sex", categories=("Female", "Male")),
    )
)
ROWS = {"work": ["public", "none"], "age": [55, 20], "hours": [40, 50], "sex": ["Male", "Female"]}
FIELDS = np.asarray([[2, 1.5, 0, 1], [0, -2, 2, 0]], np.float32)
ENTRIES = np.asarray([[0, 0, 1, 1.5, 0, 0, 1], [1, 0, 0, -2, 2, 1, 0]], np.float32)


def drawn(size: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    columns = [
        rng.choice(3, size, p=[0.1, 0.7, 0.2]),
        rng.normal(0, 1, size),
        rng.normal(0, 1, size),
        rng.integers(0, 2, size),
    ]
    return np.stack(columns, 1).astype(np.float32)


def test_columns_fields_and_entries_by_hand() -> None:
    np.testing.assert_array_equal(SCHEMA.fields_of(ROWS), FIELDS)
    np.testing.assert_array_equal(SCHEMA.encode(jnp.asarray(FIELDS)), ENTRIES)
    np.testing.assert_array_equal(SCHEMA.likeliest(ENTRIES), FIELDS)
    assert SCHEMA.columns_of(FIELDS) == {name: [str(value) for value in values] for name, values in ROWS.items()}
    assert (SCHEMA.num_entries, SCHEMA.sizes) == (7, (3, 1, 1, 2))
    assert [field.kind for field in SCHEMA.fields] == ["category", "number", "number", "category"]


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.float32, (3, 7), elements=st.floats(-50, 50, width=32)))
def test_whatever_is_searched_is_a_row_with_probabilities_and_reads_as_a_valid_one(unknowns: np.ndarray) -> None:
    entries = np.asarray(SCHEMA.relax(jnp.asarray(unknowns)))
    np.testing.assert_array_equal(entries[:, 3:5], unknowns[:, 3:5])
    for part in (entries[:, :3], entries[:, 5:]):
        assert np.all(part >= 0)
        np.testing.assert_allclose(part.sum(1), 1, rtol=1e-5)
    valid = SCHEMA.likeliest(entries)
    assert np.all((valid[:, 1] >= -2.3) & (valid[:, 1] <= 5))
    written = SCHEMA.columns_of(valid)
    read = SCHEMA.fields_of(written)
    np.testing.assert_array_equal(read[:, [0, 3]], valid[:, [0, 3]])
    np.testing.assert_allclose(read[:, 1:3], valid[:, 1:3], atol=0.01)


def test_unknowns_of_rows_relax_to_them() -> None:
    relaxed = SCHEMA.relax(SCHEMA.unknowns_of(jnp.asarray(FIELDS)))
    np.testing.assert_allclose(relaxed, ENTRIES, atol=1e-9)


def test_the_projection_moves_numbers_between_their_bounds_alone() -> None:
    unknowns = jnp.array([[-99.0, 0.0, 99.0, -99.0, 99.0, -99.0, 99.0]])
    np.testing.assert_allclose(SCHEMA.project(unknowns), [[-99, 0, 99, -2.3, 99, -99, 99]], rtol=1e-6)
    assert row(Schema((Field("x"),))).project_fn is None


def test_fields_are_right_one_by_one_and_numbers_within_their_tolerance() -> None:
    moved = FIELDS + np.asarray([0, 0.09, 0.11, 0], np.float32)
    np.testing.assert_array_equal(SCHEMA.right(moved, FIELDS), [[True, True, False, True]] * 2)
    np.testing.assert_array_equal(SCHEMA.right(moved, FIELDS, tolerance=0.2), np.ones((2, 4), bool))
    np.testing.assert_array_equal(SCHEMA.right(FIELDS[::-1], FIELDS).sum(1), [0, 0])


def test_distances_are_those_of_entries() -> None:
    entries = np.asarray(SCHEMA.relax(jax.random.normal(jax.random.key(0), (5, 7))))
    expected = np.square(entries[:, None] - ENTRIES[None]).sum(-1)
    np.testing.assert_allclose(SCHEMA.distances(entries, FIELDS), expected, rtol=1e-5)
    numbers = Schema((Field("x"), Field("y")))
    np.testing.assert_allclose(numbers.distances(np.asarray([[3.0, 4.0]]), np.zeros((1, 2))), [[25]])
    category = Schema((Field("kind", categories=("a", "b")),))
    np.testing.assert_allclose(category.distances(np.asarray([[0.5, 0.5]]), np.asarray([[1.0]])), [[0.5]])


def test_guesses_are_the_commonest_and_the_nearest_public_rows() -> None:
    fields = np.asarray([[2, 0.5, 0, 0], [2, 0.45, 0, 1], [0, -1.0, 0, 1], [0, 0.0, 0, 1]], np.float32)
    classes = np.asarray([0, 0, 1, 1])
    guesses = SCHEMA.guesses(fields[:1], fields[1:], labels=classes[:1], public_labels=classes[1:])
    np.testing.assert_array_equal(guesses["commonest values"], [[0, 0, 0, 1]])
    for name in ("nearest row", "commonest of the class", "nearest of the class"):
        np.testing.assert_array_equal(guesses[name], fields[[1]])
    with pytest.raises(ValueError, match="public_labels must have every class of labels, got none of 0"):
        SCHEMA.guesses(fields[:1], fields[2:], labels=classes[:1], public_labels=classes[2:])
    with pytest.raises(ValueError, match="must be given together, got no public_labels"):
        SCHEMA.guesses(fields[:1], fields[1:], labels=classes[:1])
    with pytest.raises(ValueError, match="public must hold at least one row"):
        SCHEMA.guesses(fields, fields[:0])


def test_a_reconstruction_with_a_nan_has_no_field_right_and_does_not_harm_the_others() -> None:
    truth = Batch(jnp.asarray(ENTRIES), jnp.array([0, 1]))
    broken = truth._replace(inputs=truth.inputs.at[0, 4].set(jnp.nan))
    scores = row(SCHEMA).score_fn(broken, truth).scores
    np.testing.assert_array_equal(scores["fields"], [0, 1])
    np.testing.assert_array_equal(scores["row"], [0, 1])


def test_a_linear_model_gives_every_field_away() -> None:
    modality, head = row(SCHEMA, tolerance=1e-3), labels.dense("head")
    client_fn = clients.federated_sgd(clients.cross_entropy(lambda p, x: x @ p["head"]["kernel"] + p["head"]["bias"]))
    params = {"head": {"kernel": jax.random.normal(jax.random.key(0), (7, 2)), "bias": jnp.zeros(2)}}
    truth = Batch(SCHEMA.encode(jnp.asarray(drawn(4)))[:, None], jnp.arange(4)[:, None] % 2)
    invert = attacks.linear_inversion(head, label_fn=labels.idlg(head))
    found = [
        invert(jax.random.key(1), observe(jax.random.key(2), ThreatModel(), client_fn, params, Batch(x, y)))
        for x, y in zip(truth.inputs, truth.labels, strict=True)
    ]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[one.batch for one in found])
    scores = modality.score_fn(together, truth).scores
    np.testing.assert_array_equal(scores["fields"], np.ones((4, 1)))
    np.testing.assert_array_equal(scores["row"], np.ones((4, 1)))


def test_the_attack_finds_rows_and_on_noise_is_no_better_than_the_guesses() -> None:
    modality = row(SCHEMA)
    client_fn = clients.federated_sgd(
        clients.cross_entropy(lambda params, x: jnp.tanh(x @ params["first"]) @ params["second"])
    )
    params = {
        "first": 0.5 * jax.random.normal(jax.random.key(0), (7, 30)),
        "second": 0.5 * jax.random.normal(jax.random.key(1), (30, 2)),
    }
    truth = Batch(SCHEMA.encode(jnp.asarray(drawn(8)))[:, None], jnp.arange(8)[:, None] % 2)
    public = Batch(SCHEMA.encode(jnp.asarray(drawn(200, seed=1))), jnp.arange(200) % 2)
    threat = ThreatModel(labels=True)
    seen = stack(
        [
            observe(jax.random.key(2), threat, client_fn, params, Batch(x, y))
            for x, y in zip(truth.inputs, truth.labels, strict=True)
        ]
    )
    attack = gradient_matching(client_fn, **modality.matching())

    @jax.jit
    def solve(seen):
        axes = seen._replace(params=None, update=0, extra=0)
        one = jax.vmap(lambda key, observation: run(attack, key, observation, num_steps=500)[0], (0, axes))
        return one(jax.random.split(jax.random.key(3), 8), seen)

    found = modality.score_fn(solve(seen).batch, truth).scores["fields"].mean()
    of_noise = modality.score_fn(solve(control(jax.random.key(4), seen)).batch, truth).scores["fields"].mean()
    guess = modality.guess_fn(truth, public)["commonest values"].mean()
    assert found > 0.9
    assert of_noise < guess + 0.05
    assert guess < 0.7


def test_a_row_is_printed_in_its_own_units(tmp_path: Path) -> None:
    modality, batch = row(SCHEMA), Batch(jnp.asarray(ENTRIES), jnp.array([0, 1]))
    other = jax.tree.map(lambda leaf: leaf[::-1], batch)
    modality.draw_fn({"truth": batch, "found": other}, tmp_path / "rows.txt")
    lines = (tmp_path / "rows.txt").read_text().splitlines()
    assert [line.split() for line in lines[:6] if "-" not in line] == [
        ["field", "truth", "found"],
        ["work", "public", "none"],
        ["age", "55", "20"],
        ["hours", "40", "50"],
        ["sex", "Male", "Female"],
    ]
    many = Batch(jnp.asarray(np.tile(ENTRIES, (10, 1))), jnp.zeros(20))
    modality.draw_fn({"truth": many}, tmp_path / "many.txt")
    assert (tmp_path / "many.txt").read_text().endswith("The first 16 of 20 rows are shown.\n")
    with pytest.raises(ValueError, match=r"columns must hold as many rows each, got \[2, 20\]"):
        modality.draw_fn({"truth": batch, "found": many}, tmp_path / "never.txt")
    with pytest.raises(ValueError, match="columns must hold rows, got none"):
        modality.draw_fn({}, tmp_path / "never.txt")
    assert not (tmp_path / "never.txt").exists()


def test_a_schema_is_fitted_to_public_rows() -> None:
    schema = fit_schema({"age": [30, 50, 40], "same": [7.0, 7.0, 7.0], "work": np.asarray(["b", "a", "b"])})
    assert schema.fields[0].mean == 40
    assert schema.fields[0].std == pytest.approx(np.sqrt(200 / 3))
    assert schema.fields[1][:3] == ("same", 7, 1)
    assert schema.fields[2].categories == ("a", "b")
    with pytest.raises(ValueError, match=r"columns\['age'\] must hold at least one value, got none"):
        fit_schema({"age": []})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (Schema(()), r"schema\.fields must have names that differ, at least one, got \[\]"),
        (
            Schema((Field("a"), Field("a"))),
            r"schema\.fields must have names that differ, at least one, got \['a', 'a'\]",
        ),
        (Schema((Field("a", std=0.0),)), r"schema\.fields\['a'\]\.std must be positive, got 0\.0"),
        (Schema((Field("a", mean=np.inf),)), r"schema\.fields\['a'\]\.mean must be finite, got inf"),
        (Schema((Field("a", low=2.0, high=1.0),)), r"schema\.fields\['a'\]\.low must be below high=1\.0, got 2\.0"),
        (Schema((Field("a", categories=("x", "x")),)), r"schema\.fields\['a'\]\.categories must be different values"),
    ],
)
def test_a_schema_that_is_none_is_refused(schema: Schema, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row(schema)


def test_rows_that_do_not_fit_the_schema_are_refused() -> None:
    for columns, message in (
        ({"age": [1]}, "columns must have 'work', got"),
        (ROWS | {"work": ["public", "army"]}, r"columns\['work'\] must be among .* got 'army'"),
        (ROWS | {"age": ["old", "young"]}, r"columns\['age'\] must be numbers, got 'old'"),
        (ROWS | {"age": [np.nan, 3.0]}, r"columns\['age'\] must be finite, got nan"),
        (ROWS | {"age": [3.0]}, "columns must be of one length"),
    ):
        with pytest.raises(ValueError, match=message):
            SCHEMA.fields_of(columns)
    with pytest.raises(ValueError, match=r"fields of 'work' must be integers from 0 to 2, got 3\.0"):
        SCHEMA.encode(jnp.array([[3.0, 0.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match=r"fields must have 4 columns, got the shape \(1, 3\)"):
        SCHEMA.encode(jnp.zeros((1, 3)))
    truth = Batch(jnp.asarray(ENTRIES), jnp.array([0, 1]))
    with pytest.raises(ValueError, match=r"found\.inputs must be rows of shape \(b, 7\) or \(v, b, 7\), got \(2, 6\)"):
        row(SCHEMA).score_fn(truth._replace(inputs=truth.inputs[:, 1:]), truth)
    with pytest.raises(ValueError, match=r"found\.inputs must have the shape \(1, 2, 7\) of truth\.inputs"):
        row(SCHEMA).score_fn(truth._replace(inputs=truth.inputs[:1]), truth)
    with pytest.raises(ValueError, match=r"tolerance must not be negative, got -0\.1"):
        row(SCHEMA, tolerance=-0.1)


def test_in_float64_and_in_half_precision_the_fields_are_the_same(x64: None) -> None:
    entries = SCHEMA.encode(jnp.asarray(FIELDS, jnp.float64))
    assert entries.dtype == jnp.float64
    truth = Batch(entries, jnp.array([0, 1]))
    half = Batch(entries.astype(jnp.bfloat16), truth.labels)
    np.testing.assert_array_equal(row(SCHEMA).score_fn(half, truth).scores["fields"], [1, 1])
