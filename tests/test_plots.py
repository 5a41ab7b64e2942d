"""Pictures: files of a sane size, with something on them."""

from pathlib import Path

import numpy as np
import pytest

from gia_jax.plots import loss_curves, picture_grid

PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(PIL.open(path).convert("RGB"), int)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_image(tmp_path: Path, channels: int) -> None:
    images = np.random.default_rng(0).uniform(size=(2, 8, 8, channels))
    picture_grid({"original": images, "found": 0 * images}, tmp_path / "a.png", captions={"found": ["1 dB", "2 dB"]})
    picture_grid({"original": images, "found": images}, tmp_path / "b.png", captions={"found": ["1 dB", "2 dB"]})
    first, second = _pixels(tmp_path / "a.png"), _pixels(tmp_path / "b.png")
    assert first.shape == second.shape
    assert 200 < min(first.shape[:2]) <= max(first.shape[:2]) < 2_000
    differs = np.argwhere((first != second).any(-1))
    assert differs[:, 1].min() > first.shape[1] / 2  # the right column alone
    assert np.ptp(differs[:, 0]) > first.shape[0] / 2  # both rows of it


def test_values_outside_of_the_range_are_clipped(tmp_path: Path) -> None:
    images = np.zeros((1, 4, 4, 3))
    images[:, :2] = 1
    picture_grid({"x": images}, tmp_path / "a.png")
    picture_grid({"x": images * 20 - 5}, tmp_path / "b.png")
    np.testing.assert_array_equal(_pixels(tmp_path / "a.png"), _pixels(tmp_path / "b.png"))


def test_a_large_grid_stays_a_picture(tmp_path: Path) -> None:
    picture_grid({"x": np.zeros((200, 4, 4, 3))}, tmp_path / "a.png")
    assert max(_pixels(tmp_path / "a.png").shape[:2]) < 5_000


@pytest.mark.parametrize("last", [1e-6, np.nan, np.inf, 0])
def test_curves_are_drawn_whatever_the_loss_becomes(tmp_path: Path, last: float) -> None:
    curve = np.geomspace(1, 1e-5, 50)
    loss_curves({"falls": curve}, tmp_path / "a.png")
    loss_curves({"falls": np.append(curve[:20], last)}, tmp_path / "b.png", title="another")
    first, second = _pixels(tmp_path / "a.png"), _pixels(tmp_path / "b.png")
    assert first.shape == second.shape
    assert 300 < min(first.shape[:2]) <= max(first.shape[:2]) < 2_000
    assert (first != second).any()
