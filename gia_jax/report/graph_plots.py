"""Pictures of graphs. They need matplotlib and networkx, which the extra `demo` installs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gia_jax import _check
from gia_jax.data.graphs import FeatureBlock
from gia_jax.report.plots import MAX_ROWS, save_figure

FAINT = 0.05  # edges below it are not drawn


def graph_grid(
    columns: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
    blocks: Sequence[FeatureBlock],
    path: Path,
    *,
    captions: Mapping[str, Sequence[str]] | None = None,
    title: str = "",
) -> None:
    """Draws a row for each graph and a column for each version of it (original, reconstruction, ...), as a PNG.

    Nodes of one row have the same place in all columns: they are laid out once, by the graph of the first column. Their
    colour is the likeliest category of the first one-hot block, with its name. An edge is as dark as its number in [0,
    1]. In the other columns edges above 0.5 that the first column lacks are red, and its edges that are not above 0.5
    there are dotted. Nodes that are wrong have a red rim.

    Args:
        columns: Graphs of "nodes", "adjacency" and "mask" under each heading, whose nodes are in the same order in all
            columns. The first 16 graphs are drawn.
        blocks: What the columns of the features are.
        path: Path of the file, whose folder must exist.
        captions: Lines of text under the graphs of a column, such as their scores, by the column's heading: one line
            for each graph. None draws no captions.
        title: Text above the grid. Where graphs are left out, their number is added. All text is drawn literally: "$"
            starts no formula.

    Raises:
        ValueError: If there are no columns, they have different numbers of graphs, or captions are not one for each
            graph of a column.
        ImportError: If matplotlib or networkx is not installed.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from gia_jax import data
        >>> from gia_jax.report.graph_plots import graph_grid
        >>> edge = {"nodes": np.eye(2), "adjacency": np.array([[0.0, 1.0], [1.0, 0.0]]), "mask": np.ones(2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     graph_grid({"original": [edge]}, [data.FeatureBlock("label", ("C", "N"))], Path(folder) / "graph.png")
        ...     print([file.name for file in Path(folder).iterdir()])
        ['graph.png']
    """
    from matplotlib.figure import Figure

    counts = {heading: len(graphs) for heading, graphs in columns.items()}
    if not columns or len(set(counts.values())) > 1 or not next(iter(counts.values())):
        raise ValueError(f"columns must hold as many graphs each, at least one, got {counts}")
    count = next(iter(counts.values()))
    _check.captions(captions, columns, count, "graphs")
    rows = min(count, MAX_ROWS)
    if rows < count:
        title = f"{title} (the first {rows} of {count} graphs)".strip()
    figure = Figure(figsize=(3.2 * len(columns) + 0.2, 3.2 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for i in range(rows):
        reference = next(iter(columns.values()))[i]
        places = _places(reference)
        for j, (heading, graphs) in enumerate(columns.items()):
            axes[i, j].set_title(heading if i == 0 else "", fontsize=10, parse_math=False)
            axes[i, j].set_axis_off()
            axes[i, j].margins(0.12)
            if captions and heading in captions:
                caption, where = captions[heading][i], axes[i, j].transAxes
                axes[i, j].text(0.5, -0.02, caption, ha="center", transform=where, fontsize=8, parse_math=False)
            _draw(axes[i, j], graphs[i], reference if j else None, places, blocks)
    figure.suptitle(title, fontsize=10, parse_math=False)
    save_figure(figure, path)


def _places(graph: Mapping[str, np.ndarray]) -> np.ndarray:
    """Lays out the nodes of a graph in the plane; rows of padding lie on a circle around them."""
    import networkx as nx

    there = np.flatnonzero(graph["mask"] > 0.5)
    drawn = nx.from_numpy_array((graph["adjacency"][there][:, there] > 0.5).astype(int))
    angles = np.linspace(0, 2 * np.pi, len(graph["mask"]), endpoint=False)
    places = 1.4 * np.stack([np.cos(angles), np.sin(angles)], 1)
    laid = (
        nx.spring_layout(drawn, seed=0, iterations=200, pos=nx.circular_layout(drawn))
        if len(there) > 1
        else {0: (0, 0)}
    )
    for v, place in enumerate(there):
        places[place] = laid[v]
    return places


def _draw(
    axis: Any,
    graph: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray] | None,
    places: np.ndarray,
    blocks: Sequence[FeatureBlock],
) -> None:
    from matplotlib import colormaps

    soft, true = graph["adjacency"], graph["adjacency"] if reference is None else reference["adjacency"]
    for i, j in zip(*np.triu_indices(len(soft), 1), strict=True):
        number, is_edge = float(np.clip(np.nan_to_num(soft[i, j]), 0, 1)), true[i, j] > 0.5
        ends = places[[i, j]].T
        if number > FAINT:
            color = "tab:red" if number > 0.5 and not is_edge else "black"
            axis.plot(*ends, color=color, alpha=number, linewidth=1.6, zorder=1)
        if is_edge and number <= 0.5:
            axis.plot(*ends, color="grey", linestyle=":", linewidth=1.2, zorder=1)
    there = np.flatnonzero(graph["mask"] > 0.5)
    names, kinds = _kinds(graph, blocks)
    truth = kinds if reference is None else _kinds(reference, blocks)[1]
    wrong = kinds != truth if reference is None else (kinds != truth) | (reference["mask"] <= 0.5)
    palette = colormaps["tab20"](np.arange(20))
    rims = ["tab:red" if wrong[v] else "white" for v in there]
    axis.scatter(*places[there].T, s=170, c=palette[kinds[there] % 20], edgecolors=rims, linewidths=1.8, zorder=2)
    for v in there:
        axis.text(*places[v], names[kinds[v]], ha="center", va="center", fontsize=7, zorder=3, parse_math=False)


def _kinds(graph: Mapping[str, np.ndarray], blocks: Sequence[FeatureBlock]) -> tuple[Sequence[str], np.ndarray]:
    """Returns the names of the first one-hot block, and the likeliest of them for each node."""
    start = 0
    for block in blocks:
        if block.is_one_hot:
            return block.names, np.nan_to_num(graph["nodes"][:, start : start + len(block.names)]).argmax(1)
        start += len(block.names)
    return ("",), np.zeros(len(graph["mask"]), int)
