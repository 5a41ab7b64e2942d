"""Images: pixels in the model's space and the scores of the pixels behind them."""

import jax.numpy as jnp
import numpy as np
import pytest

from gia_jax import Batch, Observation, modalities


def test_scores_are_of_pixels_and_not_of_normalised_inputs() -> None:
    modality = modalities.image((4, 4, 3), mean=[0.5, 0.4, 0.3], std=[0.5, 0.25, 0.2])
    pixels = np.full((1, 4, 4, 3), 0.5, np.float32)
    truth = Batch(jnp.asarray((pixels - [0.5, 0.4, 0.3]) / [0.5, 0.25, 0.2], jnp.float32), jnp.array([0]))
    moved = truth._replace(inputs=truth.inputs + 0.1 / jnp.array([0.5, 0.25, 0.2]))
    scores = modality.score_fn(moved, truth).scores
    np.testing.assert_allclose(scores["mse"], 0.01, rtol=1e-4)
    np.testing.assert_allclose(scores["psnr"], 20, rtol=1e-4)
    np.testing.assert_allclose(modality.guess_fn(truth, truth._replace(labels=()))["grey"], np.inf)


def test_the_box_is_black_to_white_in_each_channel() -> None:
    modality = modalities.image((1, 1, 2), mean=[0.5, 0.25], std=[0.5, 0.25])
    assert modality.project_fn is not None
    held = modality.project_fn(jnp.array([-9.0, -9.0, 9.0, 9.0]).reshape(2, 1, 1, 2))
    np.testing.assert_allclose(held.reshape(2, 2), [[-1, -1], [1, 3]])


def test_the_prior_is_the_total_variation_by_its_weight_or_none() -> None:
    batch = Batch(jnp.array([0.0, 3.0]).reshape(1, 1, 2, 1), jnp.array([0]))
    weighted = modalities.image((1, 2, 1), total_variation_weight=0.5).prior_fn
    assert weighted is not None
    assert float(weighted(batch, Observation({}, {}, {}))) == pytest.approx(1.5)
    assert modalities.image((1, 2, 1), total_variation_weight=0.0).prior_fn is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (4, 4)}, r"shape must be \(h, w, c\), got \(4, 4\)"),
        ({"shape": (4, 0, 1)}, "shape must be an integer of at least 1, got 0"),
        ({"mean": [0.1]}, r"mean must be 3 numbers, one for each channel, got \[0\.1\]"),
        ({"std": [1.0, 0.0, 1.0]}, r"std must be positive, got 0\.0"),
        ({"mean": [0.1, np.nan, 0.1]}, "mean must be finite, got nan"),
        ({"total_variation_weight": -1.0}, r"total_variation_weight must not be negative, got -1\.0"),
        ({"dtype": jnp.int32}, "dtype must be a floating-point type"),
    ],
)
def test_what_is_wrong_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modalities.image(**({"shape": (4, 4, 3)} | arguments))


def test_pixels_are_what_a_person_sees() -> None:
    inputs = np.array([-2.0, 0.0, 1.0, np.nan], np.float32).reshape(1, 1, 2, 2, 1)
    pixels_fn = modalities.image((2, 2, 1), mean=[0.5], std=[0.25]).pixels_fn
    assert pixels_fn is not None
    pixels, note = pixels_fn(Batch(inputs, ()))
    np.testing.assert_array_equal(pixels, np.array([0.0, 0.5, 0.75, 0.5]).reshape(1, 2, 2, 1))
    assert note == ""
    unknown_range = modalities.image((2, 2, 1), in_range=False).pixels_fn
    assert unknown_range is not None
    pixels, note = unknown_range(Batch(inputs, ()))
    assert (pixels.min(), pixels.max(), note) == (0, 1, ", each rescaled to [0, 1]")
    assert modalities.image((2, 2, 4)).pixels_fn is None
