"""Graphs: padding and its refusals, and sets of TUDataset written into a folder, or on the machine where there are."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gia_jax import data

EDGE = np.array([[0.0, 1.0], [1.0, 0.0]])

# Three graphs: a path of three nodes, two nodes that are no neighbours, and an edge.
TINY = {
    "A": "1, 2\n2, 1\n2, 3\n3, 2\n6, 7\n7, 6\n",
    "graph_indicator": "1\n1\n1\n2\n2\n3\n3\n",
    "graph_labels": "5\n-1\n5\n",
    "node_labels": "3\n1\n3\n1\n1\n3\n1\n",
    "node_attributes": "0, 1\n2, 1\n4, 1\n6, 1\n8, 1\n10, 1\n12, 1\n",
}
README = "README for dataset TINY\n\nNode labels:\n\n  1  C\n  3  O\n\nEdge labels:\n\n  0  single\n"


def written(folder: Path, **changes: str | None) -> Path:
    with zipfile.ZipFile(folder / "TINY.zip", "w") as archive:
        for part, text in (TINY | changes).items():
            if text is not None:
                archive.writestr(f"TINY/TINY_{part}.txt", text)
        archive.writestr("TINY/README.txt", README)
    return folder


def test_a_set_is_read_and_padded(tmp_path: Path) -> None:
    found = data.load_graphs("tiny", features=("label", "degree", "standardized"), folder=written(tmp_path))
    assert found.nodes.shape == (3, 3, 2 + 3 + 2)
    assert [array.dtype for array in found[1:5]] == [np.float32] * 3 + [np.int32]
    np.testing.assert_array_equal(found.mask, [[1, 1, 1], [1, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(found.adjacency[0], [[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    assert not found.adjacency[1].any()
    np.testing.assert_array_equal(found.nodes[0, :, :5], [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [0, 1, 0, 1, 0]])
    np.testing.assert_array_equal(found.nodes[1, :, 2:5], [[1, 0, 0], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(found.nodes[1, :, 5], [0, 0.5, 0], atol=1e-6)
    assert not found.nodes[..., 6].any()  # a constant attribute has mean 0
    assert found.labels.tolist() == [1, 0, 1]
    assert (found.class_names, found.ids[2], found.num_left_out) == (["-1", "5"], "TINY_00002", 0)
    assert [(block.kind, len(block.names), block.is_one_hot) for block in found.blocks] == [
        ("label", 2, True),
        ("degree", 3, True),
        ("standardized", 2, False),
    ]
    assert found.blocks[0].names == ("C", "O")
    inputs = found.inputs([2, 0])
    np.testing.assert_array_equal(inputs["nodes"], found.nodes[[2, 0]])
    assert list(found.inputs()) == ["nodes", "adjacency", "mask"]


def test_large_graphs_are_left_out_and_counted(tmp_path: Path) -> None:
    written(tmp_path)
    found = data.load_graphs("TINY", features=("attributes",), max_nodes=2, folder=tmp_path)
    assert (found.nodes.shape, found.num_left_out, found.ids) == ((2, 2, 2), 1, ["TINY_00001", "TINY_00002"])
    np.testing.assert_array_equal(found.nodes[0], [[6, 1], [8, 1]])
    one = data.load_graphs("tiny", max_nodes=2, num_nodes=4, limit=1, folder=tmp_path)
    # One-hot widths are of the whole set, whatever was left out.
    assert (one.nodes.shape, one.labels.tolist(), one.num_left_out) == ((1, 4, 2 + 3), [0], 1)
    assert one.class_names == ["-1", "5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"A": "1, 2\n"}, r"adjacency of TINY_00000 must be symmetric, got \[0, 1\] = 1\.0 and \[1, 0\] = 0\.0"),
        ({"A": "1, 1\n"}, r"adjacency of TINY_00000 must have no loops, got \[0, 0\] = 1\.0"),
        ({"A": "1, 2\n2, 1\n1, 2\n2, 1\n"}, r"must be of 0 and 1, without weights, got \[0, 1\] = 2\.0"),
        ({"A": "1, 4\n4, 1\n"}, "cannot be read: edges must be within one graph, got one between two"),
        ({"A": "1, 9\n9, 1\n"}, "edges must be between the nodes 1 to 7, got node 9"),
        ({"A": "1, x\n"}, "cannot be read: could not convert string to float"),
        ({"A": "0, 1\n1, 0\n"}, "edges must be between the nodes 1 to 7, got node 0"),
        ({"A": "1, 2, 2, 1\n"}, r"TINY_A.txt must have 2 numbers in every line, got lines of \[4\]"),
        ({"A": "1, 2\n2\n"}, r"TINY_A.txt must have 2 numbers in every line, got lines of \[1, 2\]"),
        ({"A": "1.5, 2\n2, 1.5\n"}, "TINY_A.txt must have whole numbers, got 1.5"),
        ({"graph_labels": "nan\n1\n2\n"}, "TINY_graph_labels.txt must have whole numbers, got nan"),
        ({"node_labels": "0.5\n" * 7}, "TINY_node_labels.txt must have whole numbers, got 0.5"),
        ({"A": "", "graph_indicator": "", "graph_labels": ""}, "there must be at least one graph, got none"),
        ({"A": None}, "cannot be read: there is no file TINY_A.txt"),
        ({"graph_indicator": "1\n1\n1\n3\n3\n3\n3\n"}, "nodes must be in the order of the 3 graphs, at least one in"),
        ({"graph_indicator": "2\n2\n1\n1\n1\n3\n3\n"}, "nodes must be in the order of the 3 graphs"),
        ({"node_labels": "0\n"}, "node_labels must have a line for each of the 7 nodes, got 1"),
        ({"node_labels": None}, "features must be of what 'TINY' has, got 'label' without node labels"),
        ({"node_attributes": "nan, 1\n" * 7}, r"nodes of TINY_00000 must be finite, got nan"),
    ],
)
def test_files_that_hold_no_graphs_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load_graphs("tiny", features=("label", "attributes"), folder=written(tmp_path, **changes))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "nothing"}, "graphs 'NOTHING' must be in .*NOTHING.zip: get it from https://"),
        ({"name": "../tiny"}, r"name must be that of a set of TUDataset, such as 'mutag', got '\.\./tiny'"),
        ({"name": None}, "name must be that of a set of TUDataset, such as 'mutag', got None"),
        ({"features": ()}, r"features must be a sequence of at least one of \('label', .*\), got \(\)"),
        ({"features": "label"}, "features must be a sequence of at least one of .*, got 'label'"),
        ({"num_nodes": 10**6}, "num_nodes must fit into memory: it needs .* got 1000000"),
        ({"max_nodes": 1}, "max_nodes must be at least the 2 nodes of the smallest graph, got 1"),
        ({"num_nodes": 2}, "num_nodes must be at least the 3 nodes of TINY_00000, got 2"),
        ({"limit": 0}, "limit must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load_graphs(**({"name": "tiny", "folder": written(tmp_path)} | arguments))


def test_the_folder_is_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "graphs").mkdir()
    written(tmp_path / "graphs")
    monkeypatch.setenv("GIA_JAX_DATA_DIR", str(tmp_path))
    assert len(data.load_graphs("tiny").labels) == 3
    monkeypatch.delenv("GIA_JAX_DATA_DIR")
    with pytest.raises(ValueError, match=r"GIA_JAX_DATA_DIR must be a folder with graphs/TINY\.zip"):
        data.load_graphs("tiny")
    (tmp_path / "graphs" / "TINY.zip").write_text("no archive")
    with pytest.raises(ValueError, match=r"graphs 'TINY' in .* cannot be read: File is not a zip file"):
        data.load_graphs("tiny", folder=tmp_path / "graphs")


@pytest.mark.parametrize(
    ("adjacency", "nodes", "message"),
    [
        ([], [], "nodes must have features for each of the graphs, got 0 for 0"),
        ([np.zeros((0, 0))], [np.zeros((0, 2))], "adjacency of graph 0 must have at least one node, got none"),
        ([EDGE, np.zeros((2, 3))], [np.eye(2)] * 2, r"adjacency of graph 1 must be square, got shape \(2, 3\)"),
        ([EDGE], [np.eye(3)], r"nodes of graph 0 must have a row for each of 2 nodes, got shape \(3, 3\)"),
        ([EDGE / 2], [np.eye(2)], r"must be of 0 and 1, without weights, got \[0, 1\] = 0\.5"),
        ([EDGE, EDGE], [np.eye(2), np.ones((2, 3))], r"the same number of features in all graphs, got \[2, 3\]"),
    ],
)
def test_what_is_no_graph_is_refused(adjacency: list, nodes: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.pad_graphs(adjacency, nodes)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adjacency": [EDGE.tolist()]}, r"adjacency of graph 0 must be an array of numbers, got \[\[0\.0, 1\.0\]"),
        ({"nodes": [np.full((2, 2), "a")]}, "nodes of graph 0 must be an array of numbers, got array"),
        ({"names": ["one", "two"]}, "names must be one for each of 1 graphs, got 2"),
        ({"num_nodes": 10**6}, "num_nodes must fit into memory"),
    ],
)
def test_arguments_that_are_no_arrays_or_too_large_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        data.pad_graphs(**({"adjacency": [EDGE], "nodes": [np.eye(2)]} | arguments))
    assert "\n" not in str(raised.value)


FOLDER = Path(os.environ.get("GIA_JAX_DATA_DIR", "")) / "graphs"


@pytest.mark.parametrize(
    ("name", "count", "nodes", "edges", "features", "classes"),
    [("mutag", 188, 3371, 7442, 7, [63, 125]), ("ptc_mr", 344, 4915, 10108, 18, [192, 152])],
)
def test_the_real_sets_have_their_published_counts(
    name: str, count: int, nodes: int, edges: int, features: int, classes: list[int]
) -> None:
    if not (FOLDER / f"{name.upper()}.zip").is_file():
        pytest.skip(f"needs {name.upper()}.zip in GIA_JAX_DATA_DIR/graphs")
    found = data.load_graphs(name, features=("label",))
    assert (len(found.labels), found.mask.sum(), found.adjacency.sum()) == (count, nodes, edges)
    assert found.nodes.shape[-1] == features
    assert found.nodes.sum() == nodes
    assert np.bincount(found.labels).tolist() == classes
    assert {"C", "N", "O"} < set(found.blocks[0].names)
