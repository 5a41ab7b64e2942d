"""Images that come with packages, and prepared sets where there are any."""

import os

import numpy as np
import pytest

from gia_jax import data
from gia_jax.data.prepared import data_directory

needs_cifar10 = pytest.mark.skipif(
    not (data_directory() and (data_directory() / "cifar10").is_dir()), reason="needs CIFAR-10 in GIA_JAX_DATA_DIR"
)


@pytest.fixture(scope="module")
def photos():
    return data.load("photos")


def check(found, shape, classes):
    count = len(found.images)
    assert found.images.shape[1:] == shape
    assert found.images.dtype == np.float32
    assert 0 <= found.images.min() < 0.1
    assert 0.9 < found.images.max() <= 1
    assert found.labels.shape == (count,)
    assert found.labels.dtype == np.int32
    assert set(found.labels.tolist()) <= set(range(classes))
    assert len(found.class_names) == classes
    assert len(set(found.ids)) == count
    assert len(found.mean) == len(found.std) == shape[-1]


def test_photos_are_forty_different_images_of_eight_classes(photos):
    check(photos, (32, 32, 3), 8)
    assert len(photos.images) == 40
    np.testing.assert_array_equal(photos.labels, np.tile(np.arange(8), 5))
    assert len({image.tobytes() for image in photos.images}) == 40
    assert min(image.std() for image in photos.images) > 0.01  # none is blank
    assert list(photos.ids[:9:8]) == ["astronaut", "astronaut_ul"]


def test_quarters_are_the_quarters_of_their_photograph(photos):
    # Four quarters at full size, each scaled to half, are the photograph scaled down.
    whole = photos.images[1]
    quarters = [photos.images[1 + 8 * i].reshape(16, 2, 16, 2, 3).mean((1, 3)) for i in (1, 2, 3, 4)]
    top, bottom = np.concatenate(quarters[:2], 1), np.concatenate(quarters[2:], 1)
    error = np.abs(np.concatenate([top, bottom], 0) - whole).mean()
    assert error < 0.03
    swapped = np.abs(np.concatenate([bottom, top], 0) - whole).mean()
    assert swapped > 2 * error


def test_photos_of_another_size():
    assert data.photos(size=8).images.shape == (40, 8, 8, 3)


def test_digits_are_scikit_learns_in_its_order():
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    check(digits, (8, 8, 1), 10)
    expected = load_digits()
    np.testing.assert_allclose(digits.images[..., 0] * 16, expected.images)
    np.testing.assert_array_equal(digits.labels, expected.target)
    assert digits.ids[12] == "digit_00012"


def test_limit_takes_the_first_images(photos):
    few = data.load("photos", limit=3)
    np.testing.assert_array_equal(few.images, photos.images[:3])
    assert list(few.ids) == list(photos.ids[:3])
    assert len(few.labels) == 3


def test_normalisation_round_trip_and_bounds(photos):
    inputs = photos.normalize(photos.images)
    assert inputs.dtype == np.float32
    np.testing.assert_allclose(photos.denormalize(inputs), photos.images, atol=1e-6)
    np.testing.assert_allclose(inputs[..., 0], (photos.images[..., 0] - 0.485) / 0.229, rtol=1e-5, atol=1e-6)
    low, high = photos.bounds()
    np.testing.assert_allclose(photos.denormalize(low), np.zeros(3), atol=1e-6)
    np.testing.assert_allclose(photos.denormalize(high), np.ones(3), atol=1e-6)
    assert np.all((inputs >= low - 1e-6) & (inputs <= high + 1e-6))
    # Values beyond the box are clipped on the way back.
    np.testing.assert_allclose(photos.denormalize(np.stack([low - 1, high + 1])), [[0, 0, 0], [1, 1, 1]], atol=1e-6)


def test_digits_are_normalised_to_zero_mean_and_unit_variance():
    digits = data.digits()
    inputs = digits.normalize(digits.images)
    np.testing.assert_allclose([inputs.mean(), inputs.std()], [0, 1], atol=1e-3)


def test_unknown_sets_are_named():
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match="data must be photos, digits or a TFDS set, got 'no_such_set'"):
        data.load("no_such_set")


def test_a_set_that_is_not_prepared_says_how_to_prepare_it(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("GIA_JAX_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="data 'cifar10' is not prepared in") as error:
        data.load("cifar10")
    assert "GIA_JAX_DATA_DIR" in str(error.value)
    assert "download_and_prepare" in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_the_data_directory_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/tfds")
    monkeypatch.setenv("GIA_JAX_DATA_DIR", str(tmp_path))
    assert data_directory() == tmp_path
    (tmp_path / "tfds").mkdir()
    assert data_directory() == tmp_path / "tfds"
    monkeypatch.delenv("GIA_JAX_DATA_DIR")
    assert str(data_directory()) == os.environ["TFDS_DATA_DIR"]
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert data_directory() is None


@needs_cifar10
def test_cifar10_comes_in_the_order_of_its_ids():
    found = data.load("cifar10", limit=16)
    check(found, (32, 32, 3), 10)
    assert list(found.ids) == [f"test_{i:05d}" for i in range(16)]
    # The labels of the original test batch, in its order: cat, ship, ship, airplane, frog, frog, automobile, frog.
    np.testing.assert_array_equal(found.labels[:8], [3, 8, 8, 0, 6, 6, 1, 6])
    assert found.class_names[3] == "cat"
    assert found.name == "cifar10/test"


@needs_cifar10
def test_a_split_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"split must be one of \['test', 'train'\], got 'validation'"):
        data.load("cifar10", split="validation")
