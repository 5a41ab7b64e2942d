"""Pictures: files of a sane size, with something on them."""

from pathlib import Path

import numpy as np
import pytest

from gia_jax.report import loss_curves, picture_grid

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


def test_nan_is_grey_and_every_shape_is_drawn(tmp_path: Path) -> None:
    broken, grey = np.full((2, 1, 4, 1), np.nan), np.full((2, 1, 4, 1), 0.5)
    colour = np.full((2, 1, 4, 3), np.nan)
    for name, images in (("a.png", broken), ("b.png", grey), ("c.png", colour)):
        picture_grid({"x": images}, tmp_path / name)
    np.testing.assert_array_equal(_pixels(tmp_path / "a.png"), _pixels(tmp_path / "b.png"))
    np.testing.assert_allclose(_pixels(tmp_path / "c.png"), _pixels(tmp_path / "b.png"), atol=1)


def test_the_title_says_which_images_are_left_out(tmp_path: Path) -> None:
    images = np.zeros((20, 2, 2, 1))
    picture_grid({"x": images}, tmp_path / "a.png")
    picture_grid({"x": images[:16]}, tmp_path / "b.png")
    picture_grid({"x": images[:16]}, tmp_path / "c.png", title="(the first 16 of 20 images)")
    first, second, third = (_pixels(tmp_path / f"{name}.png") for name in "abc")
    assert first.shape != second.shape or (first != second).any()
    np.testing.assert_array_equal(first, third)


def test_a_dollar_in_a_text_is_no_formula(tmp_path: Path) -> None:
    text = "$\\alpha_{$ 5 $"  # no formula that matplotlib could read
    picture_grid({text: np.zeros((1, 4, 4, 1))}, tmp_path / "a.png", captions={text: [text]}, title=text)
    loss_curves({text: np.ones(2)}, tmp_path / "b.png", title=text)
    assert all(min(_pixels(tmp_path / name).shape[:2]) > 100 for name in ("a.png", "b.png"))


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    images, path = np.zeros((2, 4, 4, 3)), tmp_path / "a.png"
    wrong = [
        ({}, None, "columns must hold images, got none"),
        ({"x": images[:0]}, None, r"columns\['x'\] must be images of shape \(n, h, w, c\), at least one, got \(0, "),
        ({"x": images[0]}, None, r"columns\['x'\] must be images of shape \(n, h, w, c\), .* got \(4, 4, 3\)"),
        ({"x": images.astype(np.uint8)}, None, r"columns\['x'\] must be pixels .* got uint8: divide by 255"),
        ({"x": images, "y": images[:1]}, None, r"columns\['y'\] must be images of shape \(2, h, w, c\) .* got \(1, "),
        ({"x": images[..., :2]}, None, r"columns\['x'\] must be .* with c of 1 or 3, got \(2, 4, 4, 2\)"),
        ({"x": images}, {"x": ["one"]}, r"captions\['x'\] must be a line for each of the 2 images of a column, got 1"),
        ({"x": images}, {"y": ["one", "two"]}, r"captions\['y'\] must be .* got 2 and the columns \['x'\]"),
    ]
    for columns, captions, message in wrong:
        with pytest.raises(ValueError, match=message):
            picture_grid(columns, path, captions=captions)
    for curves, message in (
        ({}, "curves must hold losses, got none"),
        ({"x": np.zeros(0)}, r"curves\['x'\] must have shape \(num_steps,\), at least one step, got \(0,\)"),
        ({"x": np.zeros((2, 3))}, r"curves\['x'\] must have shape \(num_steps,\), .* got \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_curves(curves, path)
    assert not path.exists()


def test_negative_losses_are_drawn(tmp_path: Path) -> None:
    curve = np.geomspace(1, 1e-3, 30)
    loss_curves({"falls": np.append(curve, -curve[::-1])}, tmp_path / "a.png")
    loss_curves({"falls": np.append(curve, np.full(30, np.nan))}, tmp_path / "b.png")
    inked = [np.argwhere((_pixels(tmp_path / name) != 255).any(-1))[:, 0].size for name in ("a.png", "b.png")]
    assert inked[0] > inked[1]
    loss_curves({"broken": np.full(3, np.nan)}, tmp_path / "c.png")
