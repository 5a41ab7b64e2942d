"""Pictures of reconstructions and of losses. They need matplotlib, which the extras `demo` and `report` install."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gia_jax import _check
from gia_jax._files import write_whole
from gia_jax.metrics.images import check_pixels

Scale = Literal["linear", "log"]

MAX_ROWS = 16


def picture_grid(
    columns: Mapping[str, np.ndarray],
    path: Path,
    *,
    captions: Mapping[str, Sequence[str]] | None = None,
    title: str = "",
) -> None:
    """Draws a row for each image and a column for each version of it (original, reconstruction, ...), as a PNG.

    Args:
        columns: Images of shape (n, h, w, c) under each heading, with c of one or three. Pixels are clipped to [0, 1],
            and NaN is drawn as 0.5. The first 16 images are drawn, and the title says so where there are more.
        path: Path of the file, whose folder must exist.
        captions: Lines of text under the images of a column, such as their PSNR, by the column's heading: one line for
            each image. Columns without captions are left out. None draws no captions.
        title: Text above the grid. By default only the number of images is stated, where some are left out. All text
            is drawn literally: "$" starts no formula.

    Raises:
        ValueError: If there are no columns, an array is of integers or has not the shape of images, columns have
            different numbers of images, or captions are not one for each image of a column.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from gia_jax.report.plots import picture_grid
        >>> columns = {"original": np.zeros((1, 4, 4, 1)), "reconstruction": np.ones((1, 4, 4, 1))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     picture_grid(columns, Path(folder) / "grid.png")
        ...     print([file.name for file in Path(folder).iterdir()])
        ['grid.png']
    """
    from matplotlib.figure import Figure

    columns = {heading: np.asarray(images) for heading, images in columns.items()}
    if not columns:
        raise ValueError("columns must hold images, got none")
    count = len(next(iter(columns.values())))
    for heading, images in columns.items():
        check_pixels(f"columns[{heading!r}]", images, ("n", "h", "w", "c"), in_range=False)
        if len(images) != count or images.shape[-1] not in (1, 3):
            wanted = f"({count}, h, w, c) with c of 1 or 3"
            raise ValueError(f"columns[{heading!r}] must be images of shape {wanted}, got {images.shape}")
    _check.captions(captions, columns, count, "images")
    rows = min(count, MAX_ROWS)
    if rows < count:
        title = f"{title} (the first {rows} of {count} images)".strip()
    figure = Figure(figsize=(1.9 * len(columns) + 0.2, 2.0 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for j, (heading, images) in enumerate(columns.items()):
        axes[0, j].set_title(heading, fontsize=9, parse_math=False)
        for i in range(rows):
            image = np.nan_to_num(np.clip(images[i].astype(np.float32), 0, 1), nan=0.5)
            image = image[..., 0] if image.shape[-1] == 1 else image
            axes[i, j].imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes[i, j].set_xticks([])
            axes[i, j].set_yticks([])
            if captions and heading in captions:
                axes[i, j].set_xlabel(captions[heading][i], fontsize=8, parse_math=False)
    figure.suptitle(title, fontsize=10, parse_math=False)
    save_figure(figure, path)


def loss_curves(curves: Mapping[str, np.ndarray], path: Path, *, title: str = "") -> None:
    """Draws the attacker's loss over steps, a line for each curve, on a logarithmic axis, as a PNG.

    Where a loss is negative the axis is linear around 0 and logarithmic on both sides of it. A loss that is not finite
    is a gap in its line.

    Args:
        curves: Losses by name, each of shape (num_steps,) with at least one step.
        path: Path of the file, whose folder must exist.
        title: Text above the plot. By default there is none. All text is drawn literally: "$" starts no formula.

    Raises:
        ValueError: If there are no curves, or one is not of numbers along one axis.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from gia_jax.report.plots import loss_curves
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loss_curves({"attack": np.array([1.0, 0.1, 0.01])}, Path(folder) / "losses.png")
        ...     print([file.name for file in Path(folder).iterdir()])
        ['losses.png']
    """
    curves = {name: np.asarray(losses) for name, losses in curves.items()}
    if not curves:
        raise ValueError("curves must hold losses, got none")
    for name, losses in curves.items():
        if losses.ndim != 1 or not losses.size:
            raise ValueError(f"curves[{name!r}] must have shape (num_steps,), at least one step, got {losses.shape}")
    line_plot(
        {name: (np.arange(1, len(losses) + 1), losses) for name, losses in curves.items()},
        path,
        labels=("step", "loss"),
        scales=("linear", "log"),
        title=title,
    )


def line_plot(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
    path: Path,
    *,
    labels: tuple[str, str],
    scales: tuple[Scale, Scale] = ("linear", "linear"),
    title: str = "",
) -> None:
    """Plots lines as a PNG. A line of a single point is drawn as a dot with its name beside it.

    A logarithmic vertical axis with negative values is linear around 0. Values that are not finite are gaps in the
    line.

    Args:
        lines: Horizontal and vertical coordinates of each line by its name, both of shape (n,) with n at least 1.
        path: Path of the file, whose folder must exist.
        labels: Labels of the horizontal and the vertical axis.
        scales: Scales of the horizontal and the vertical axis, "linear" or "log".
        title: Text above the plot. By default there is none.

    Raises:
        ValueError: If there are no lines, or the coordinates of a line are not two arrays of one shape (n,).

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from gia_jax.report.plots import line_plot
        >>> lines = {"victim 1": (np.array([1, 10]), np.array([9.5, 21.0]))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     line_plot(lines, Path(folder) / "psnr.png", labels=("step", "PSNR in dB"))
        ...     print([file.name for file in Path(folder).iterdir()])
        ['psnr.png']
    """
    from matplotlib.figure import Figure

    if not lines:
        raise ValueError("lines must have at least one line, got none")
    for name, (x, y) in lines.items():
        if np.ndim(x) != 1 or np.shape(x) != np.shape(y) or not np.size(x):
            shapes = f"{np.shape(x)} and {np.shape(y)}"
            raise ValueError(f"lines[{name!r}] must be two arrays of shape (n,), n at least 1, got {shapes}")
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in lines.items():
        is_dot = len(x) == 1
        axes.plot(x, np.asarray(y, np.float64), "o" if is_dot else "-", label=name, linewidth=1)
        if is_dot and np.isfinite([x[0], y[0]]).all():
            axes.annotate(name, (x[0], y[0]), xytext=(5, 5), textcoords="offset points", fontsize=8, parse_math=False)
    every = np.concatenate([np.asarray(y, np.float64) for _, y in lines.values()])
    every = every[np.isfinite(every) & (every != 0)]
    axes.set_xscale(scales[0])
    if scales[1] == "log" and np.any(every < 0):
        axes.set_yscale("symlog", linthresh=float(np.abs(every).min()))
    elif every.size:
        axes.set_yscale(scales[1])
    axes.set_xlabel(labels[0], parse_math=False)
    axes.set_ylabel(labels[1], parse_math=False)
    axes.set_title(title, fontsize=10, parse_math=False)
    if any(len(x) > 1 for x, _ in lines.values()):
        for text in axes.legend(fontsize=8).get_texts():
            text.set_parse_math(False)
    save_figure(figure, path)


def png(image: np.ndarray) -> bytes:
    """Encodes an image as a PNG of the same resolution.

    Args:
        image: Image of shape (h, w, c) in uint8, with c of one or three.

    Returns:
        The content of the file.

    Examples:
        >>> import numpy as np
        >>> from gia_jax.report.plots import png
        >>> png(np.zeros((4, 4, 1), np.uint8))[1:4]
        b'PNG'
    """
    from matplotlib.image import imsave

    content = io.BytesIO()
    pixels = np.repeat(image, 3, -1) if image.shape[-1] == 1 else image
    imsave(content, pixels, format="png")
    return content.getvalue()


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as a PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    write_whole(path, content.getvalue())
