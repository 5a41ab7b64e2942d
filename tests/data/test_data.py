"""Images that come with packages, and prepared sets where there are any."""

import importlib
import inspect
import os
import re
import shutil
import types

import numpy as np
import pytest

from gia_jax import data
from gia_jax.data.prepared import _statistics, data_directory

needs_cifar10 = pytest.mark.skipif(
    not (data_directory() and (data_directory() / "cifar10").is_dir()), reason="needs CIFAR-10 in GIA_JAX_DATA_DIR"
)

needs_mnist = pytest.mark.skipif(
    not (data_directory() and (data_directory() / "mnist").is_dir()), reason="needs MNIST in GIA_JAX_DATA_DIR"
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


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_a_limit_that_is_no_number_of_images_is_refused(name, limit):
    with pytest.raises(ValueError, match=f"limit must be an integer of at least 1, got {limit}"):
        inspect.unwrap(data.load if name == "digits" else data.prepared)(name, limit=limit)


@pytest.mark.parametrize(
    ("size", "message"), [(0, "an integer of at least 1"), (1.5, "an integer"), (10**7, "fit into")]
)
def test_a_size_of_photos_that_is_none_is_refused(size, message):
    with pytest.raises(ValueError, match=f"size must {message if size == 10**7 else f'be {message}'}.*, got {size}"):
        inspect.unwrap(data.photos)(size=size)


def test_embedded_sets_have_one_split():
    with pytest.raises(ValueError, match="split must be 'test' for data digits, got 'train'"):
        data.load("digits", split="train")


def test_digits_are_normalised_alike_however_many_are_loaded():
    assert data.load("digits", limit=1).mean == data.digits().mean == pytest.approx((0.30526,), abs=1e-5)
    assert data.load("digits", limit=1).std == data.digits().std == pytest.approx((0.37605,), abs=1e-5)


@pytest.mark.parametrize(
    "name", ["", "../x", "/etc", "a b", "mnist/", "mnist:", "mnist:abc", "huggingface:mnist", "~/x"]
)
def test_names_of_no_set_are_refused(name):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match=f"data must be photos, digits or a TFDS set, got '{re.escape(name)}'"):
        data.load(name)


def test_a_data_directory_that_is_a_file_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GIA_JAX_DATA_DIR", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"GIA_JAX_DATA_DIR or TFDS_DATA_DIR must be a folder, got '.*file'"):
        data.load("mnist")


def test_a_version_that_there_is_not_is_one_line():
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match=r"data 'mnist:9.9.9' cannot be read: .*only: 3.0.1") as error:
        data.load("mnist:9.9.9")
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None


@needs_mnist
def test_a_version_does_not_change_the_statistics():
    found = data.load("mnist:3.0.1", limit=2)
    assert (found.mean, found.std) == (data.load("mnist", limit=2).mean, ((0.3081,)))
    with pytest.raises(ValueError, match=r"split must be one of \['test', 'train'\], got 'train\[:10\]'"):
        data.load("mnist", split="train[:10]", limit=2)


@needs_mnist
def test_a_set_without_published_statistics_takes_those_of_other_images(monkeypatch):
    module = importlib.import_module("gia_jax.data.prepared")
    monkeypatch.setattr(module, "STATISTICS", {})
    monkeypatch.setattr(module, "NUM_PUBLIC", 300)
    test, train = data.load("mnist", limit=1), data.load("mnist", split="train", limit=300)
    # The statistics are of the training split for another split, and of another split for the training split.
    assert test.mean == pytest.approx(train.images.mean((0, 1, 2)).tolist(), rel=1e-5)
    assert test.std == pytest.approx(train.images.std((0, 1, 2)).tolist(), rel=1e-5)
    assert data.load("mnist", limit=9)[5:] == test[5:]
    assert train.mean == pytest.approx(data.load("mnist", limit=300).images.mean((0, 1, 2)).tolist(), rel=1e-5)
    assert test.mean[0] != pytest.approx(test.images.mean(), rel=0.05)


@needs_mnist
def test_a_set_of_one_split_takes_the_statistics_of_its_rest(monkeypatch):
    import tensorflow_datasets as tfds

    every, built = data.load("mnist", limit=30), tfds.builder  # no statistics are published for "thirty"

    class Part:
        """The builder of a set with a single split of thirty images."""

        def __init__(self, builder):
            self.name, self.data_path, few = "thirty", builder.data_path, {"test": builder.info.splits["test"]}
            self.info = types.SimpleNamespace(splits=few, features=builder.info.features)
            self.records = builder.as_data_source(split="test")

        def as_data_source(self, split):
            return [self.records[i] for i in range(30)]

    monkeypatch.setattr(tfds, "builder", lambda *args, **options: Part(built(*args, **options)))
    found = data.load("mnist", limit=10)
    np.testing.assert_array_equal(found.images, every.images[:10])
    assert found.mean == pytest.approx(every.images[10:].mean((0, 1, 2)).tolist(), rel=1e-5)
    assert found.std == pytest.approx(every.images[10:].std((0, 1, 2)).tolist(), rel=1e-5)
    whole = data.load("mnist")
    assert (whole.mean, whole.std) == ((0.5,), (0.5,))


def test_a_channel_that_is_the_same_everywhere_only_loses_its_mean():
    images = [np.full((2, 2, 1), 51, np.uint8), np.full((3, 1, 1), 51, np.uint8)]
    assert _statistics(images) == (pytest.approx((0.2,)), (1.0,))
    assert _statistics([]) is None


@needs_mnist
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "description"])
def test_files_that_cannot_be_read_are_one_line(tmp_path, monkeypatch, damage):
    shutil.copytree(data_directory() / "mnist", tmp_path / "mnist")
    (folder,) = (tmp_path / "mnist").iterdir()
    (records,) = folder.glob("*test*")
    for path in (records, folder / "dataset_info.json"):
        path.chmod(0o600)
    if damage == "gone":
        records.unlink()
    elif damage == "description":
        (folder / "dataset_info.json").write_text("{")
    else:
        records.write_bytes(records.read_bytes()[: 10**6 if damage == "cut" else 0])
    monkeypatch.setenv("GIA_JAX_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"data 'mnist' .*cannot be read: ") as error:
        data.load("mnist", limit=2)
    assert "\n" not in str(error.value)


def test_normalisation_takes_floating_pixels_of_its_channels(photos):
    for name, call in (("images", photos.normalize), ("inputs", photos.denormalize)):
        with pytest.raises(ValueError, match=f"{name} must be of a floating type, got uint8: divide pixels by 255"):
            call(np.zeros((2, 2, 3), np.uint8))
        with pytest.raises(ValueError, match=rf"{name} must have 3 channels, their last axis, got shape \(2, 2, 1\)"):
            call(np.zeros((2, 2, 1), np.float32))
    half = photos.images.astype(np.float16)
    expected = photos.normalize(half.astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(photos.normalize(half), expected)
