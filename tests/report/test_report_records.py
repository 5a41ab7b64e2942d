"""Numbers for people: scores, guesses without a gradient, noise in place of updates, tables and JSON."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gia_jax import Batch, Observation, Reconstruction, control, metrics, report
from gia_jax.data import ImageData
from gia_jax.sweep.study import Study, Timing

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


def _data(images: np.ndarray) -> ImageData:
    labels = np.arange(len(images), dtype=np.int32)
    names = [str(i) for i in labels]
    return ImageData("made up", images.astype(np.float32), labels, names, names, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


@pytest.fixture
def data() -> ImageData:
    return _data(np.random.default_rng(0).uniform(0.1, 0.9, (6, 12, 12, 3)))


def _truth(data: ImageData) -> Batch:
    """Three victims of two images."""
    inputs = data.normalize(data.images).reshape(3, 2, *data.images.shape[1:])
    return Batch(jnp.asarray(inputs), jnp.asarray(data.labels.reshape(3, 2)))


def _same(left: Any, right: Any) -> bool:
    """Whether `right` is `left` read back from JSON."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, float) and not math.isfinite(left):
        return isinstance(right, str) and (float(right) == left or (math.isnan(left) and math.isnan(float(right))))
    return left == right


@settings(derandomize=True, max_examples=25, deadline=None)
@given(JSON_VALUES)
def test_anything_becomes_valid_json_and_reads_back(content: Any) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert _same(content, json.loads(report.to_json(content), parse_constant=refuse))


def test_numpy_numbers_and_infinities_become_json() -> None:
    content = {"a": np.float32(np.inf), "b": [np.int64(3), -np.inf, (np.float64(np.nan),)], 4: np.bool_(True).item()}
    read = json.loads(report.to_json(content))
    assert read == {"a": "inf", "b": [3, "-inf", ["nan"]], "4": True}
    assert float(read["a"]) == math.inf


def test_a_perfect_reconstruction_scores_perfectly_in_any_order(data: ImageData) -> None:
    truth = _truth(data)
    scores = metrics.score(Batch(truth.inputs[:, ::-1], truth.labels[:, ::-1]), truth, data)
    assert scores.psnr.shape == scores.ssim.shape == scores.mse.shape == (3, 2)
    assert scores.psnr.min() > 100
    np.testing.assert_allclose(scores.ssim, 1, atol=1e-5)
    np.testing.assert_allclose(scores.label_correct, 1)
    np.testing.assert_allclose(scores.images.reshape(data.images.shape), data.images, atol=1e-6)


def test_scores_are_in_pixels_and_clipped(data: ImageData) -> None:
    """An offset of one standard deviation a channel is std in pixels, where no pixel leaves [0, 1]."""
    data = _data(np.full_like(data.images, 0.5))
    truth = _truth(data)
    shifted = metrics.score(Batch(truth.inputs + 1, truth.labels), truth, data)
    np.testing.assert_allclose(shifted.mse, np.mean(np.square(data.std)), rtol=1e-5)
    np.testing.assert_allclose(shifted.psnr, -10 * np.log10(np.mean(np.square(data.std))), rtol=1e-5)
    far = metrics.score(Batch(truth.inputs + 1e3, truth.labels), truth, data)
    np.testing.assert_allclose(far.mse, 0.25, rtol=1e-5)


def test_a_reconstruction_of_nan_is_scored_as_a_grey_one(data: ImageData) -> None:
    truth = _truth(data)
    inputs = truth.inputs.at[1].set(jnp.nan)
    scores = metrics.score(Batch(inputs, truth.labels), truth, data)
    assert scores.psnr[[0, 2]].min() > 100
    np.testing.assert_allclose(scores.psnr[1], metrics.baselines(data.images[2:4], data.images)["grey"], rtol=1e-5)
    np.testing.assert_array_equal(scores.images[1], 0.5)


def test_baselines_are_the_mean_squared_errors_of_their_guesses(data: ImageData) -> None:
    truth = data.images[:4].reshape(2, 2, 12, 12, 3)
    gallery = np.concatenate([data.images[4:], data.images[1:2] + np.float32(0.01)])
    found = metrics.baselines(truth, gallery)
    assert {name: psnr.shape for name, psnr in found.items()} == dict.fromkeys(
        ("grey", "data mean", "nearest image"), (2, 2)
    )

    def psnr(guess: np.ndarray) -> np.ndarray:
        return -10 * np.log10(np.mean((truth - guess) ** 2, (2, 3, 4)))

    np.testing.assert_allclose(found["grey"], psnr(np.asarray(0.5)), rtol=1e-5)
    np.testing.assert_allclose(found["data mean"], psnr(gallery.mean(0)), rtol=1e-5)
    every = np.stack([psnr(image) for image in gallery])
    np.testing.assert_allclose(found["nearest image"], every.max(0), rtol=1e-5)
    np.testing.assert_allclose(found["nearest image"][0, 1], 40, rtol=1e-2)  # an error of 0.01


def test_guesses_that_know_the_class_are_of_its_public_images_only(data: ImageData) -> None:
    truth = data.images[:4].reshape(2, 2, 12, 12, 3)
    gallery = np.concatenate([data.images[4:], data.images[1:2] + np.float32(0.01)])
    labels, gallery_labels = np.asarray([[0, 1], [1, 0]]), np.asarray([0, 1, 1])
    found = metrics.baselines(truth, gallery, labels=labels, gallery_labels=gallery_labels)
    for place, label in np.ndenumerate(labels):
        members = gallery[gallery_labels == label]
        mean = -10 * np.log10(np.mean((members.mean(0) - truth[place]) ** 2))
        closest = -10 * np.log10(np.mean((members - truth[place]) ** 2, (1, 2, 3)).min())
        np.testing.assert_allclose(found["class mean"][place], mean, rtol=1e-5)
        np.testing.assert_allclose(found["nearest of the class"][place], closest, rtol=1e-5)
    np.testing.assert_allclose(found["nearest of the class"][0, 1], 40, rtol=1e-2)
    # The oracle of all classes is at least as good, and no worse for knowing labels.
    assert np.all(found["nearest image"] >= found["nearest of the class"])
    np.testing.assert_array_equal(found["nearest image"], metrics.baselines(truth, gallery)["nearest image"])


def test_labels_of_guesses_are_refused_where_they_say_nothing(data: ImageData) -> None:
    truth, gallery = data.images[:2], data.images[2:]
    labels, gallery_labels = np.asarray([0, 1]), np.asarray([0, 0, 0, 1])
    with pytest.raises(ValueError, match="labels and gallery_labels must be given together, got no gallery_labels"):
        metrics.baselines(truth, gallery, labels=labels)
    with pytest.raises(ValueError, match=r"^labels must have the shape \(2,\), got \(1,\)"):
        metrics.baselines(truth, gallery, labels=labels[:1], gallery_labels=gallery_labels)
    with pytest.raises(ValueError, match=r"gallery_labels must have the shape \(4,\), got \(3,\)"):
        metrics.baselines(truth, gallery, labels=labels, gallery_labels=gallery_labels[:3])
    with pytest.raises(ValueError, match=r"gallery_labels must have every class of labels, got none of \[1\]"):
        metrics.baselines(truth, gallery, labels=labels, gallery_labels=np.zeros(4, int))


def _observations() -> Observation:
    params = {"kernel": jnp.zeros((20, 30)), "bias": jnp.zeros(30)}
    keys = jax.random.split(jax.random.key(0), 2)
    update = {"kernel": jax.random.normal(keys[0], (3, 20, 30)), "bias": 5 * jax.random.normal(keys[1], (3, 30))}
    return Observation(params, update, {"inputs_like": jnp.zeros((3, 1, 4, 4, 1))})


def test_random_updates_have_the_norms_of_the_true_ones_and_nothing_else() -> None:
    true = _observations()
    noise = control(jax.random.key(1), true)
    for name, leaf in noise.update.items():
        flat, want = leaf.reshape(3, -1), true.update[name].reshape(3, -1)
        np.testing.assert_allclose(jnp.linalg.norm(flat, axis=1), jnp.linalg.norm(want, axis=1), rtol=1e-5)
        cosines = jnp.sum(flat * want, 1) / jnp.linalg.norm(want, axis=1) ** 2
        assert np.abs(cosines).max() < 5 / flat.shape[1] ** 0.5
        assert np.abs(np.corrcoef(flat) - np.eye(3)).max() < 5 / flat.shape[1] ** 0.5  # every victim its own noise
    assert noise.params is true.params
    assert noise.extra is true.extra
    other = control(jax.random.key(2), true)
    assert not np.allclose(noise.update["bias"], other.update["bias"])


def test_a_zero_update_stays_zero() -> None:
    true = _observations()
    noise = control(jax.random.key(1), true._replace(update=jax.tree.map(jnp.zeros_like, true.update)))
    assert all(not leaf.any() for leaf in jax.tree.leaves(noise.update))


def test_results_hold_what_a_reader_needs_to_judge_them(data: ImageData) -> None:
    truth = _truth(data)
    losses = jnp.asarray([[0.1, jnp.inf], [0.3, 0.2], [0.5, 0.5]])
    reconstruction = Reconstruction(truth, losses.min(1), jnp.asarray([True, True, False]), losses)
    study = Study(reconstruction, np.zeros((3, 2, 4)), Timing(1.0, 2.0, 3.0))
    scores = metrics.score(Batch(truth.inputs + 0.1, truth.labels), truth, data)
    explained = metrics.Explained(np.array([1.0, 0.5, np.nan]), np.array([0.0, 0.7, np.nan]), np.ones(3))
    given = {"settings": {"seed": 1}, "threat_model": "a curious server", "explained": explained}
    named = {"psnr": scores.psnr, "ssim": scores.ssim}
    content = report.results(study, named, label_correct=scores.label_correct, **given, extra={"more": 2})
    read = json.loads(report.to_json(content))
    assert read["settings"] == {"seed": 1}
    assert read["threat_model"] == "a curious server"
    assert read["more"] == 2
    assert [read[name] for name in ("compile_seconds", "run_seconds", "ms_per_step_per_restart")] == [1, 2, 3]
    assert read["versions"]["jax"] == jax.__version__
    assert read["hardware"]
    assert len(read["victims"]) == 3
    for v, victim in enumerate(read["victims"]):
        keys = {"psnr", "ssim", "psnr_per_example", "label_correct", "loss", "is_finite", "restart_losses", "explained"}
        assert keys == victim.keys()
        assert victim["psnr"] == pytest.approx(np.mean(scores.psnr[v]))
        assert victim["psnr_per_example"] == scores.psnr[v].tolist()
        assert victim["label_correct"] == 1
        assert victim["is_finite"] == (v < 2)
        assert victim["explained"].keys() == {"share", "mismatch", "scale"}
    assert [victim["explained"]["share"] for victim in read["victims"]] == [1, 0.5, "nan"]
    assert read["victims"][0]["restart_losses"] == [pytest.approx(0.1), "inf"]
    unknown = report.results(study, None, **given)  # without a truth there is no score
    assert [victim.keys() for victim in unknown["victims"]] == [
        {"explained", "loss", "is_finite", "restart_losses"}
    ] * 3


def test_tables_align_their_columns() -> None:
    lines = report.table(["name", "dB"], [["a", "12.5"], ["longer", "3"]]).splitlines()
    assert lines == ["name      dB", "------------", "a       12.5", "longer     3"]


def test_without_public_images_there_is_only_the_grey_guess(data: ImageData) -> None:
    found = metrics.baselines(data.images[:2], data.images[:0])
    assert list(found) == ["grey"]
    np.testing.assert_allclose(found["grey"], metrics.baselines(data.images[:2], data.images[2:])["grey"])


def test_what_is_no_image_of_a_baseline_is_named(data: ImageData) -> None:
    truth, gallery = data.images[:2], data.images[2:]
    wrong = [
        (truth * 255, gallery, r"truth must be pixels in \[0, 1\], got"),
        (truth, gallery * np.nan, r"gallery must be pixels in \[0, 1\], got nan"),
        ((truth * 255).astype(np.uint8), gallery, "truth must be pixels .* floating type, got uint8: divide by 255"),
        (truth, gallery[:, :1], r"gallery must have the shape \(n, 12, 12, 3\) of the images of truth, got \(4, 1, 12"),
        (truth, gallery[0], r"gallery must have the shape \(n, 12, 12, 3\) of the images of truth, got \(12, 12, 3\)"),
        (truth[:0], gallery, r"truth must be images of shape \(..., h, w, c\), at least one, got \(0, 12, 12, 3\)"),
    ]
    for images, public, message in wrong:
        with pytest.raises(ValueError, match=message):
            metrics.baselines(images, public)
    with pytest.raises(ValueError, match="labels must be class indices, integers, got float64"):
        metrics.baselines(truth, gallery, labels=np.zeros(2), gallery_labels=np.zeros(4))


def test_baselines_in_half_precision_are_those_of_its_values(data: ImageData) -> None:
    half = data.images.astype(np.float16)
    wide = metrics.baselines(half[:2].astype(np.float32), half[2:].astype(np.float32))
    for name, psnr in metrics.baselines(half[:2], half[2:]).items():
        np.testing.assert_allclose(psnr, wide[name], rtol=1e-6)


def test_a_truth_that_is_no_image_of_the_data_is_refused(data: ImageData) -> None:
    truth = _truth(data)
    with pytest.raises(ValueError, match=r"denormalised truth.inputs must be pixels in \[0, 1\], got"):
        metrics.score(truth, truth._replace(inputs=truth.inputs + 9), data)
    with pytest.raises(
        ValueError, match=r"reconstructed.inputs must have the shape \(3, 2, 12, 12, 3\) of truth.inputs"
    ):
        metrics.score(jax.tree.map(lambda leaf: leaf[:1], truth), truth, data)
    with pytest.raises(ValueError, match=r"truth.inputs must be images of shape \(v, b, h, w, c\), at least one"):
        metrics.score(truth, jax.tree.map(lambda leaf: leaf[0], truth), data)
    with pytest.raises(ValueError, match=r"data.std must have 3 numbers, one for each channel, got \(1.0,\)"):
        metrics.score(truth, truth, data._replace(std=(1.0,)))
    with pytest.raises(ValueError, match=r"reconstructed.labels must be \(3, 2\), victims and images, got \(3, 1\)"):
        metrics.score(truth._replace(labels=truth.labels[:, :1]), truth, data)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_scores_of_half_precision_are_in_float32(data: ImageData, dtype: Any) -> None:
    truth = _truth(data)
    half = Batch(truth.inputs.astype(dtype), truth.labels)
    scores = metrics.score(half, half, data)
    assert scores.psnr.dtype == scores.images.dtype == np.float32
    assert np.isposinf(scores.psnr).all()
    again = metrics.score(half, truth, data)
    assert 40 < again.psnr.min() < again.psnr.max() < 90


def test_labels_that_are_no_classes_have_no_score(data: ImageData) -> None:
    truth = _truth(data)
    for labels in (jnp.zeros((3, 2)), jnp.zeros((3, 2, 4), int), jnp.zeros((3, 5, 2, 4)), jnp.zeros((7, 2), bool)):
        scores = metrics.score(truth._replace(labels=labels), truth, data)
        assert np.isnan(scores.label_correct).all()
        assert scores.label_correct.shape == (3,)
        assert scores.psnr.min() > 100


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_random_updates_keep_norms_that_half_precision_cannot_square(dtype: Any) -> None:
    update = {
        "large": jnp.full((2, 400), 300.0, dtype),
        "small": jnp.full((2, 3), 2e-4, dtype),
        "none": jnp.zeros((2, 0)),
    }
    noise = control(jax.random.key(0), Observation((), update, {})).update
    for name, leaf in update.items():
        assert noise[name].dtype == leaf.dtype
        want, got = (np.linalg.norm(np.asarray(one, np.float64), axis=1) for one in (leaf, noise[name]))
        np.testing.assert_allclose(got, want, rtol=1e-2)
    extreme = jnp.stack([jnp.full(4, 1e-30), jnp.full(4, 1e30), jnp.full(4, jnp.nan), jnp.array([0, jnp.inf, 0, 0])])
    found = control(jax.random.key(0), Observation((), extreme, {})).update
    np.testing.assert_allclose(np.linalg.norm(np.asarray(found[:2], np.float64), axis=1), [2e-30, 2e30], rtol=1e-5)
    assert np.isnan(found[2:]).all()


def test_updates_that_have_no_noise_are_named() -> None:
    def noise(update: Any) -> None:
        control(jax.random.key(0), Observation((), update, {}))

    with pytest.raises(ValueError, match=r"observations.update must have leaves, got none"):
        noise({})
    with pytest.raises(ValueError, match=r"observations.update\['x'\] must be of a floating type, got int32"):
        noise({"x": jnp.zeros((2, 3), int)})
    with pytest.raises(
        ValueError, match=r"update\['y'\] must have a leading axis of the \(2,\) victims, got the shape"
    ):
        noise({"x": jnp.zeros((2, 3)), "y": jnp.zeros(3)})


def test_arrays_sets_and_paths_become_json() -> None:
    content = {
        Path("a"): jnp.asarray([1.5, jnp.nan], jnp.bfloat16),
        2.5: np.array([[1, 2]]),
        (1, 2): {Path("/x")},
        "scalars": [jnp.bfloat16(0.5), np.bool_(True), jnp.float32(2), np.float16("inf"), jnp.asarray(True), None],
    }
    assert json.loads(report.to_json(content)) == {
        "a": [1.5, "nan"],
        "2.5": [[1, 2]],
        "[1, 2]": ["/x"],
        "scalars": [0.5, True, 2.0, "inf", True, None],
    }
    for value in (1j, b"x", object(), jax.random.key(0)):
        with pytest.raises(ValueError, match="content must be of numbers, text, lists and mappings, got"):
            report.to_json([value])
    with pytest.raises(ValueError, match=r"content must have keys of different text, got \[1, '1'\]"):
        report.to_json({1: 2, "1": 3})


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows must have 2 cells like the header, got 1 in \['a'\]"):
        report.table(["name", "dB"], [["a"]])
