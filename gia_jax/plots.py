"""Pictures of what leaked. Needs matplotlib (the extra `demo`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def picture_grid(
    columns: Mapping[str, np.ndarray],
    path: Path,
    *,
    captions: Mapping[str, Sequence[str]] | None = None,
    title: str = "",
) -> None:
    """One row an image, one column a version of it (the original, a reconstruction ...), as a PNG.

    Args:
        columns: By heading, images in [0, 1] of shape (n, h, w, c), c one or three.
        path: Of the file.
        captions: By heading, a line below each image, such as its PSNR.
        title: Above the grid.
    """
    from matplotlib.figure import Figure

    rows = min(len(next(iter(columns.values()))), 16)
    figure = Figure(figsize=(1.9 * len(columns) + 0.2, 2.0 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for j, (heading, images) in enumerate(columns.items()):
        axes[0, j].set_title(heading, fontsize=9)
        for i in range(rows):
            axes[i, j].imshow(np.clip(images[i], 0, 1).squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes[i, j].set_xticks([])
            axes[i, j].set_yticks([])
            if captions and heading in captions:
                axes[i, j].set_xlabel(captions[heading][i], fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def loss_curves(curves: Mapping[str, np.ndarray], path: Path, *, title: str = "") -> None:
    """The attacker's loss over steps, one line each, on a logarithmic axis, as a PNG.

    Args:
        curves: By name, losses of shape (num_steps,).
        path: Of the file.
        title: Above the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, losses in curves.items():
        axes.semilogy(np.arange(1, len(losses) + 1), losses, label=name, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
