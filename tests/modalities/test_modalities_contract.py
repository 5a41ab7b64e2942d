"""What every modality keeps: its parts fit together, the truth has the best scores, and an attack takes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax import Batch, ThreatModel, clients, gradient_matching, metrics, modalities, observe, observed, run
from gia_jax.matching import initializations
from gia_jax.modalities import Field, Modality, Schema, Scored, Shown
from gia_jax.models.functional import ApplyFn


def sensor() -> Modality:
    """A third modality, as anybody may write one in a file: two arrays, of which one is never negative."""

    def score_fn(found: Batch, truth: Batch) -> Scored:
        squares = jax.tree.map(lambda a, b: np.square(np.asarray(a - b)).sum(-1), found.inputs, truth.inputs)
        return Scored({"closeness": -sum(jax.tree.leaves(squares))}, found)

    def draw_fn(columns: Mapping[str, Batch], path: Path, *, captions: Any = None, title: str = "") -> None:
        path.write_text(title + str(captions) + str({name: batch.inputs for name, batch in columns.items()}))

    return Modality(
        init_fn=initializations.normal(),
        decode_fn=Batch,
        project_fn=lambda z: z | {"power": jnp.maximum(z["power"], 0)},
        prior_fn=None,
        like={"power": jax.ShapeDtypeStruct((2,), jnp.float32), "angle": jax.ShapeDtypeStruct((3,), jnp.float32)},
        score_fn=score_fn,
        shown={"closeness": Shown("closeness", ".3g")},
        guess_fn=lambda truth, public: {"zero": -np.square(np.asarray(truth.inputs["power"])).sum(-1)},
        draw_fn=draw_fn,
    )


SCHEMA = Schema(
    (
        Field("work", categories=("none", "private", "public")),
        Field("age", mean=40.0, std=10.0, low=17.0, high=90.0),
        Field("hours", mean=40.0, std=5.0),
        Field("sex", categories=("Female", "Male")),
    )
)


class Case(NamedTuple):
    """A modality, and examples of it with a last axis that a dense layer takes."""

    modality: Modality
    batch: Any


def case(name: str, size: int = 2, seed: int = 0) -> Case:
    rng, labels = np.random.default_rng(seed), jnp.arange(size) % 2
    if name == "image":
        pixels = jnp.asarray(rng.uniform(0.1, 0.9, (size, 4, 4, 1)), jnp.float32)
        modality = modalities.image((4, 4, 1), mean=[0.5], std=[0.25])
        return Case(modality, Batch((pixels - 0.5) / 0.25, labels))
    if name == "row":
        numbers = {"age": rng.integers(20, 80, size), "hours": rng.integers(20, 60, size)}
        chosen = {name: rng.choice(SCHEMA.fields[i].categories, size) for i, name in ((0, "work"), (3, "sex"))}
        return Case(
            modalities.row(SCHEMA), Batch(SCHEMA.encode(jnp.asarray(SCHEMA.fields_of(numbers | chosen))), labels)
        )
    if name == "array":
        entries = jnp.asarray(rng.normal(0, 1, (size, 5)), jnp.float32)
        return Case(modalities.array((5,), bounds=(-3.0, 3.0)), Batch(entries, labels))
    draws = {"power": rng.uniform(0, 1, (size, 2)), "angle": rng.normal(0, 1, (size, 3))}
    return Case(sensor(), Batch(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), draws), labels))


def flat(inputs: Any) -> jax.Array:
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(inputs)], 1)


def model(modality: Modality) -> tuple[ApplyFn, dict[str, jax.Array]]:
    width = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(modality.like))
    keys = jax.random.split(jax.random.key(5), 2)
    params = {"first": jax.random.normal(keys[0], (width, 20)), "second": 0.3 * jax.random.normal(keys[1], (20, 2))}
    return lambda params, inputs: jnp.tanh(0.3 * flat(inputs) @ params["first"]) @ params["second"], params


NAMES = ("image", "row", "array", "sensor")


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_takes_a_modality_and_its_reconstruction_explains_the_update(name: str) -> None:
    modality, batch = case(name, size=1)
    apply_fn, params = model(modality)
    client_fn = clients.federated_sgd(clients.cross_entropy(apply_fn))
    threat = ThreatModel(labels=True, label_order=True)
    seen = observe(jax.random.key(1), threat, client_fn, params, batch, num_classes=2)
    attack = gradient_matching(client_fn, **modality.matching())
    found, info = jax.jit(lambda key: run(attack, key, seen, num_steps=300))(jax.random.key(2))
    assert bool(found.is_finite)
    assert float(info.match[-1]) < 0.05 * float(info.match[0])
    assert float(metrics.explained(client_fn, seen, found.batch).share) > 0.9
    (first, scores), *_ = modality.score_fn(found.batch, batch).scores.items()
    assert first == modality.main
    noise = modality.decode_fn(modality.init_fn(jax.random.key(3), seen), batch.labels)
    assert scores.shape == (1,)
    assert scores[0] > modality.score_fn(noise, batch).scores[first][0]


@pytest.mark.parametrize("name", NAMES)
def test_the_shapes_are_those_of_a_batch_and_make_an_observation_of_a_record(name: str) -> None:
    modality, batch = case(name)
    found, true = modality.inputs_like(2), batch.inputs
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), true
    )
    apply_fn, params = model(modality)
    update = clients.federated_sgd(clients.cross_entropy(apply_fn))(params, batch)
    seen = observed(params, update, inputs_like=found, labels=batch.labels, apply_fn=apply_fn)
    unknowns = modality.init_fn(jax.random.key(0), seen)
    decoded = modality.decode_fn(unknowns, batch.labels)
    assert jax.tree.map(jnp.shape, decoded.inputs) == jax.tree.map(jnp.shape, true)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        modality.inputs_like(0)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_projected_stays_and_what_is_possible_is_not_moved(name: str) -> None:
    modality, _ = case(name)
    assert modality.project_fn is not None
    far = jax.tree.map(
        lambda leaf: 50 * jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype), modality.inputs_like(3)
    )
    once = jax.jit(modality.project_fn)(far)
    twice = modality.project_fn(once)
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    assert any(bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(far), jax.tree.leaves(once), strict=True))


@pytest.mark.parametrize("name", ["image", "row", "array"])
def test_the_order_of_reconstructions_plays_no_part_and_victims_are_scored_side_by_side(name: str) -> None:
    modality, batch = case(name, size=3)
    others = case(name, size=3, seed=1).batch
    turned = jax.tree.map(lambda leaf: leaf[::-1], batch)
    best = {
        "image": {"psnr": np.inf, "ssim": 1.0, "mse": 0.0},
        "row": {"fields": 1.0, "row": 1.0},
        "array": {"snr": np.inf, "mse": 0.0},
    }[name]
    scored = modality.score_fn(turned, batch)
    assert set(modality.shown) <= set(scored.scores) == set(best)
    for score, wanted in best.items():
        np.testing.assert_allclose(scored.scores[score], wanted, atol=1e-5)
    np.testing.assert_array_equal(scored.batch.inputs, batch.inputs)  # in the order of the truth
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), batch, others)
    mixed = modality.score_fn(jax.tree.map(lambda *leaves: jnp.stack(leaves), others, others), both)
    alone = modality.score_fn(others, batch)
    assert mixed.batch.inputs.shape == both.inputs.shape
    np.testing.assert_array_equal(mixed.batch.inputs[0], alone.batch.inputs)
    for score, values in mixed.scores.items():
        assert values.shape == (2, 3)
        np.testing.assert_allclose(values[0], alone.scores[score], rtol=1e-4)
        np.testing.assert_allclose(values[1], best[score], atol=1e-5)


@pytest.mark.parametrize("name", ["image", "row", "array"])
def test_guesses_are_of_the_first_score_and_the_oracle_finds_what_is_public(name: str) -> None:
    modality, batch = case(name, size=4)
    public = case(name, size=30, seed=1).batch
    guesses = modality.guess_fn(batch, public)
    assert all(values.shape == (4,) for values in guesses.values())
    nearest = {
        "image": ("nearest image", "nearest of the class"),
        "row": ("nearest row", "nearest of the class"),
        "array": ("nearest example",),
    }[name]
    assert set(nearest) < set(guesses)
    both = Batch(jnp.concatenate([public.inputs, batch.inputs]), jnp.concatenate([public.labels, batch.labels]))
    for oracle in nearest:
        best = modality.score_fn(batch, batch).scores[modality.main]
        np.testing.assert_array_equal(modality.guess_fn(batch, both)[oracle], best)
    # Of labels that are no classes nothing is made.
    soft = [one._replace(labels=jnp.zeros((len(one.labels), 2))) for one in (batch, public)]
    assert "nearest of the class" not in modality.guess_fn(*soft)


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_shown_in_a_file(name: str, tmp_path: Path) -> None:
    modality, batch = case(name)
    if name == "array":  # of which nothing can be drawn
        assert modality.draw_fn is None
        return
    assert modality.draw_fn is not None
    captions = {"reconstruction": ["first", "second"]}
    path = (tmp_path / "shown").with_suffix(modality.suffix)
    modality.draw_fn({"original": batch, "reconstruction": batch}, path, captions=captions, title="what is seen")
    assert path.stat().st_size > 40
    assert name == "image" or all(words in path.read_text() for words in ("first", "second", "what is seen"))
