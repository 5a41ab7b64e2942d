"""Graphs with a label each, padded to one size, and the reader of the zip files of TUDataset (Morris et al., 2020).

The reader is our own, because no JAX library that is kept up reads these files: jraph has no data sets, and the readers
of PyTorch Geometric and DGL bring PyTorch along.
"""

import os
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import numpy as np
from jaxtyping import Float

from gia_jax import _check

Kind = Literal["label", "degree", "attributes", "standardized"]
SOURCE = "https://chrsmrrs.github.io/datasets/"


class FeatureBlock(NamedTuple):
    """Columns of the nodes' features that belong together.

    Attributes:
        kind: What they are: "label" is the kind of a node, such as the element of an atom, and "degree" its number of
            neighbours, both one-hot; "attributes" are numbers as the set has them, and "standardized" are attributes
            with mean 0 and standard deviation 1 over all nodes of the set.
        names: Name of each column.

    Examples:
        >>> from gia_jax import data
        >>> data.FeatureBlock("label", ("C", "N")).is_one_hot
        True
    """

    kind: Kind
    names: tuple[str, ...]

    @property
    def is_one_hot(self) -> bool:
        """Whether exactly one of the columns is 1 and the others are 0, for each node."""
        return self.kind in ("label", "degree")


class GraphData(NamedTuple):
    """Labelled graphs, g of them, padded to n nodes with f features.

    Attributes:
        name: Name of the set.
        nodes: Features of the nodes, float32, shape (g, n, f). Rows of padding are 0.
        adjacency: 1 where two nodes are neighbours and else 0, symmetric, without loops, float32, shape (g, n, n).
        mask: 1 for a node and 0 for padding, float32, shape (g, n). Nodes come first.
        labels: Class indices, int32, shape (g,).
        ids: One name for each graph. The order of all arrays follows them.
        class_names: One name for each class.
        blocks: What the columns of the features are, from the first to the last. One-hot widths, means and deviations
            are those of the whole set, and so public constants of it.
        num_left_out: Number of graphs of the set that were left out, because they have too many nodes.

    Examples:
        >>> import numpy as np
        >>> from gia_jax import data
        >>> edge = np.array([[0.0, 1.0], [1.0, 0.0]])
        >>> nodes, adjacency, mask = data.pad_graphs([edge], [np.eye(2)], num_nodes=3)
        >>> blocks = (data.FeatureBlock("label", ("C", "N")),)
        >>> graphs = data.GraphData("one", nodes, adjacency, mask, np.array([0], np.int32), ["CN"], ["all"], blocks)
        >>> {name: array.shape for name, array in graphs.inputs([0]).items()}
        {'nodes': (1, 3, 2), 'adjacency': (1, 3, 3), 'mask': (1, 3)}
    """

    name: str
    nodes: np.ndarray
    adjacency: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    ids: Sequence[str]
    class_names: Sequence[str]
    blocks: tuple[FeatureBlock, ...]
    num_left_out: int = 0

    def inputs(self, indices: Sequence[int] | np.ndarray | slice = slice(None)) -> dict[str, np.ndarray]:
        """Returns graphs as the inputs of a graph network.

        Args:
            indices: Places of the graphs in the set. By default they are all.

        Returns:
            A dict of "nodes" (b, n, f), "adjacency" (b, n, n) and "mask" (b, n).
        """
        arrays = {"nodes": self.nodes, "adjacency": self.adjacency, "mask": self.mask}
        return {name: array[indices] for name, array in arrays.items()}


def pad_graphs(
    adjacency: Sequence[Float[np.ndarray, "..."]],
    nodes: Sequence[Float[np.ndarray, "..."]],
    *,
    num_nodes: int | None = None,
    names: Sequence[str] | None = None,
) -> tuple[Float[np.ndarray, "g n f"], Float[np.ndarray, "g n n"], Float[np.ndarray, "g n"]]:
    """Pads graphs of different sizes with zeros to the same number of nodes.

    Args:
        adjacency: Adjacency of each graph, square: 1 where two nodes are neighbours and else 0.
        nodes: Features of each graph's nodes, one row for each node and as many columns for all graphs.
        num_nodes: Number of nodes to pad to. None takes that of the largest graph.
        names: Name of each graph, for error messages. By default they are numbered.

    Returns:
        The features (g, n, f), the adjacency (g, n, n) and the mask (g, n), in float32.

    Raises:
        ValueError: If there are no graphs, a graph has no nodes or more than `num_nodes`, its adjacency is not
            symmetric, has loops or other entries than 0 and 1, or its features are not finite or do not fit it.

    Examples:
        >>> import numpy as np
        >>> from gia_jax import data
        >>> edge = np.array([[0.0, 1.0], [1.0, 0.0]])
        >>> nodes, adjacency, mask = data.pad_graphs([edge, np.zeros((1, 1))], [np.eye(2), np.ones((1, 2))])
        >>> nodes.shape, mask.tolist()
        ((2, 2, 2), [[1.0, 1.0], [1.0, 0.0]])
        >>> data.pad_graphs([np.array([[0.0, 1.0], [0.0, 0.0]])], [np.eye(2)])
        Traceback (most recent call last):
        ValueError: adjacency of graph 0 must be symmetric, got [0, 1] = 1.0 and [1, 0] = 0.0
    """
    if not len(adjacency) or len(nodes) != len(adjacency):
        raise ValueError(f"nodes must have features for each of the graphs, got {len(nodes)} for {len(adjacency)}")
    names = [f"graph {i}" for i in range(len(adjacency))] if names is None else names
    if len(names) != len(adjacency):
        raise ValueError(f"names must be one for each of {len(adjacency)} graphs, got {len(names)}")
    for name, one, features in zip(names, adjacency, nodes, strict=True):
        _check_graph(name, one, features)
    widths = sorted({features.shape[1] for features in nodes})
    if len(widths) > 1:
        raise ValueError(f"nodes must have the same number of features in all graphs, got {widths}")
    sizes = [len(one) for one in adjacency]
    size = max(sizes) if num_nodes is None else num_nodes
    _check.integer(num_nodes=size)
    if max(sizes) > size:
        name = names[int(np.argmax(sizes))]
        raise ValueError(f"num_nodes must be at least the {max(sizes)} nodes of {name}, got {size}")
    _check.fits(len(sizes) * size * (size + widths[0]), num_nodes=size)
    padded_nodes = np.zeros((len(sizes), size, widths[0]), np.float32)
    padded = np.zeros((len(sizes), size, size), np.float32)
    for i, count in enumerate(sizes):
        padded_nodes[i, :count] = nodes[i]
        padded[i, :count, :count] = adjacency[i]
    return padded_nodes, padded, (np.arange(size) < np.array(sizes)[:, None]).astype(np.float32)


def load_graphs(
    name: str,
    *,
    features: Sequence[Kind] = ("label", "degree"),
    max_nodes: int | None = None,
    num_nodes: int | None = None,
    limit: int | None = None,
    folder: str | Path | None = None,
) -> GraphData:
    """Loads a set of TUDataset, such as "mutag", "ptc_mr", "aids" or "enzymes", from its zip file.

    Nothing is downloaded. Labels of edges are not read. Directed, repeated and weighted edges are refused.

    Args:
        name: Name of the set, in upper or lower case. The file is NAME.zip, with the name in upper case.
        features: What the features of a node are, one after the other: "label" and "degree", one-hot, "attributes" or
            "standardized" attributes.
        max_nodes: Number of nodes above which graphs are left out. None leaves none out.
        num_nodes: Number of nodes to pad to. None takes `max_nodes`, or else that of the largest graph.
        limit: Number of graphs, the first ones that are not left out, at least 1. None takes all.
        folder: Folder of the file. None takes $GIA_JAX_DATA_DIR/graphs.

    Returns:
        The graphs in the order of the file. Classes are in the order of the labels in the file.

    Raises:
        ValueError: If the file is not there or is no such set, the set lacks the features asked for, no graph is small
            enough, a number is no positive integer, or a graph is not of the kind that `pad_graphs` takes.

    Examples:
        The 188 molecules of MUTAG, where its file is:

        >>> from gia_jax import data
        >>> mutag = data.load_graphs("mutag", max_nodes=20)  # doctest: +SKIP
        >>> mutag.nodes.shape, mutag.num_left_out  # doctest: +SKIP
        ((128, 20, 12), 60)

        >>> data.load_graphs("mutag", folder="no folder")
        Traceback (most recent call last):
        ValueError: graphs 'MUTAG' must be in no folder/MUTAG.zip: get it from https://chrsmrrs.github.io/datasets/
    """
    for argument, value in (("max_nodes", max_nodes), ("num_nodes", num_nodes), ("limit", limit)):
        if value is not None:
            _check.integer(**{argument: value})
    is_sequence = isinstance(features, Sequence) and not isinstance(features, str)
    if not is_sequence or not features or not set(features) <= set(get_args(Kind)):
        raise ValueError(f"features must be a sequence of at least one of {get_args(Kind)}, got {features!r}")
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name must be that of a set of TUDataset, such as 'mutag', got {name!r}")
    files = _Files.read(name, folder)
    matrix, blocks = files.features(features)
    sizes = np.bincount(files.graph_of_node, minlength=len(files.graph_labels))
    chosen = np.flatnonzero(sizes <= (np.inf if max_nodes is None else max_nodes))
    if not len(chosen):
        raise ValueError(f"max_nodes must be at least the {sizes.min()} nodes of the smallest graph, got {max_nodes}")
    num_left_out, chosen = len(sizes) - len(chosen), chosen[:limit]
    ids = [f"{files.name}_{i:05d}" for i in range(len(sizes))]
    kept = [ids[i] for i in chosen]
    adjacency = files.adjacency()
    starts = np.concatenate([[0], np.cumsum(sizes)])
    nodes = [matrix[starts[i] : starts[i + 1]] for i in chosen]
    size = max_nodes if num_nodes is None else num_nodes
    padded = pad_graphs([adjacency[i] for i in chosen], nodes, num_nodes=size, names=kept)
    classes, labels = np.unique(files.graph_labels, return_inverse=True)
    names = [str(one) for one in classes]
    return GraphData(files.name, *padded, labels[chosen].astype(np.int32), kept, names, blocks, num_left_out)


class _Files(NamedTuple):
    """What the files of a set hold, with all numbers counted from 0."""

    name: str
    edges: np.ndarray
    graph_of_node: np.ndarray
    graph_labels: np.ndarray
    node_labels: np.ndarray | None
    attributes: np.ndarray | None
    label_names: dict[int, str]

    @classmethod
    def read(cls, name: str, folder: str | Path | None) -> "_Files":
        """Reads a set, and checks that its files fit each other."""
        upper = name.upper()
        if folder is None:
            root = os.environ.get("GIA_JAX_DATA_DIR")
            if not root:
                raise ValueError(f"GIA_JAX_DATA_DIR must be a folder with graphs/{upper}.zip: get it from {SOURCE}")
            folder = Path(root) / "graphs"
        path = Path(folder) / f"{upper}.zip"
        if not path.is_file():
            raise ValueError(f"graphs {upper!r} must be in {path}: get it from {SOURCE}")
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.namelist() if member.endswith(".txt")]
                # Bytes that are no text become no numbers, and do no harm in a text file beside the data.
                texts = {Path(member).name: archive.read(member).decode(errors="replace") for member in members}
            found = cls._parsed(upper, texts)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
            raise ValueError(f"graphs {upper!r} in {path} cannot be read: {' '.join(str(error).split())}") from None
        return found

    @classmethod
    def _parsed(cls, name: str, texts: dict[str, str]) -> "_Files":
        def numbers(part: str, columns: int | None = None) -> np.ndarray:
            file = f"{name}_{part}.txt"
            if file not in texts:
                raise ValueError(f"there is no file {file}")
            lines = [line.split(",") for line in texts[file].splitlines() if line.strip()]
            counts = {len(line) for line in lines} or {columns or 0}
            if len(counts) > 1 or columns not in (None, *counts):
                wanted = "as many" if columns is None else columns
                raise ValueError(f"{file} must have {wanted} numbers in every line, got lines of {sorted(counts)}")
            return np.array([[float(value) for value in line] for line in lines]).reshape(len(lines), *counts)

        def integers(part: str, columns: int | None = None) -> np.ndarray:
            values = numbers(part, columns)
            wrong = ~(np.abs(values) < 2**53) | (values != np.floor(values))  # NaN as well
            if wrong.any():
                raise ValueError(f"{name}_{part}.txt must have whole numbers, got {values[wrong][0]}")
            return values.astype(int)

        def optional(part: str, read: Callable[[str], np.ndarray]) -> np.ndarray | None:
            return read(part) if f"{name}_{part}.txt" in texts else None

        edges, indicator = integers("A", 2) - 1, integers("graph_indicator", 1)[:, 0] - 1
        graph_labels = integers("graph_labels", 1)[:, 0]
        if not len(graph_labels):
            raise ValueError("there must be at least one graph, got none")
        labels, attributes = optional("node_labels", integers), optional("node_attributes", numbers)
        if np.any(np.diff(indicator) < 0) or set(indicator.tolist()) != set(range(len(graph_labels))):
            raise ValueError(f"the nodes must be in the order of the {len(graph_labels)} graphs, at least one in each")
        if edges.size and not (edges.min() >= 0 and edges.max() < len(indicator)):
            wrong = edges.min() if edges.min() < 0 else edges.max()
            raise ValueError(f"edges must be between the nodes 1 to {len(indicator)}, got node {wrong + 1}")
        if np.any(indicator[edges[:, 0]] != indicator[edges[:, 1]]):
            raise ValueError("edges must be within one graph, got one between two")
        for part, values in (("node_labels", labels), ("node_attributes", attributes)):
            if values is not None and len(values) != len(indicator):
                raise ValueError(f"{part} must have a line for each of the {len(indicator)} nodes, got {len(values)}")
        node_labels = None if labels is None else labels[:, 0]
        return cls(name, edges, indicator, graph_labels, node_labels, attributes, _label_names(texts))

    def adjacency(self) -> list[np.ndarray]:
        """Returns the adjacency of every graph, with the number of times that an edge is there."""
        sizes = np.bincount(self.graph_of_node, minlength=len(self.graph_labels))
        starts = np.cumsum(sizes) - sizes
        matrices = [np.zeros((size, size)) for size in sizes]
        for i, j in self.edges:
            graph = self.graph_of_node[i]
            matrices[graph][i - starts[graph], j - starts[graph]] += 1
        return matrices

    def features(self, kinds: Sequence[Kind]) -> tuple[np.ndarray, tuple[FeatureBlock, ...]]:
        """Returns the features of all nodes, and what their columns are."""
        parts, blocks = [], []
        for kind in kinds:
            if kind == "degree":
                degrees = np.bincount(self.edges[:, 0], minlength=len(self.graph_of_node))
                parts.append(np.eye(degrees.max() + 1)[degrees])
                blocks.append(FeatureBlock(kind, tuple(f"degree {i}" for i in range(degrees.max() + 1))))
            elif kind == "label":
                if self.node_labels is None:
                    raise ValueError(f"features must be of what {self.name!r} has, got 'label' without node labels")
                values, labels = np.unique(self.node_labels, return_inverse=True)
                parts.append(np.eye(len(values))[labels])
                names = tuple(self.label_names.get(int(value), f"label {value}") for value in values)
                blocks.append(FeatureBlock(kind, names))
            else:
                if self.attributes is None:
                    raise ValueError(f"features must be of what {self.name!r} has, got {kind!r} without attributes")
                values = self.attributes
                if kind == "standardized":
                    deviation = values.std(0)
                    values = (values - values.mean(0)) / np.where(deviation > 0, deviation, 1)
                parts.append(values)
                blocks.append(FeatureBlock(kind, tuple(f"attribute {i}" for i in range(values.shape[1]))))
        return np.concatenate(parts, 1).astype(np.float32), tuple(blocks)


def _label_names(texts: dict[str, str]) -> dict[int, str]:
    """Reads the names of node labels, such as the symbols of atoms, where a text file beside the data lists them."""
    for name, text in texts.items():
        found = re.search(r"(?:Node labels:|Component 0:)[ \t]*\n\s*((?:[ \t]*\d+[ \t]+\S+[ \t]*\n)+)", text)
        if "readme" in name.lower() and found:
            return {int(line.split()[0]): line.split()[1] for line in found[1].strip().splitlines()}
    return {}


def _check_graph(name: str, adjacency: np.ndarray, nodes: np.ndarray) -> None:
    """Raises ValueError for what is no graph, or features that are not its nodes'."""
    for argument, value in (("adjacency", adjacency), ("nodes", nodes)):
        if not isinstance(value, jax.Array | np.ndarray) or value.dtype.kind not in "biufV":
            raise ValueError(f"{argument} of {name} must be an array of numbers, got {_check.brief(value)}")
    if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
        raise ValueError(f"adjacency of {name} must be square, got shape {adjacency.shape}")
    if not len(adjacency):
        raise ValueError(f"adjacency of {name} must have at least one node, got none")
    if nodes.ndim != 2 or len(nodes) != len(adjacency):
        raise ValueError(f"nodes of {name} must have a row for each of {len(adjacency)} nodes, got shape {nodes.shape}")
    for complaint, wrong in (
        ("be symmetric", adjacency != adjacency.T),
        ("have no loops", np.diag(np.diag(adjacency) != 0)),
        ("be of 0 and 1, without weights", (adjacency != 0) & (adjacency != 1)),
    ):
        if np.any(wrong):
            i, j = np.argwhere(wrong)[0]
            other = f" and [{j}, {i}] = {adjacency[j, i]}" if complaint == "be symmetric" else ""
            raise ValueError(f"adjacency of {name} must {complaint}, got [{i}, {j}] = {adjacency[i, j]}{other}")
    _check.finite(f"nodes of {name}", nodes)
