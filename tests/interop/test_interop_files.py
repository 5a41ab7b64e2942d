"""Files of named arrays: what is saved comes back, and everything else is refused in one line."""

import sys
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gia_jax import interop, models

SUFFIXES = (".safetensors", ".npz")


def refused(path: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        interop.load_tensors(path)
    assert "\n" not in str(caught.value)
    assert "path must" in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_arrays_come_back_as_they_were_and_in_their_order(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "net.10.weight": rng.normal(size=(3, 4)).astype(np.float32).T,  # not contiguous
        "net.2.weight": rng.normal(size=(2, 1, 2)),
        "file": np.asarray(7, np.int64),
        "half": rng.normal(size=3).astype(np.float16),
        "mask": np.array([True, False]),
        "none": np.zeros((0, 3), np.float32),
        "big": np.array([1.5, -2.0], ">f4"),
    }
    interop.save_tensors(tmp_path / f"a{suffix}", arrays)
    loaded = interop.load_tensors(tmp_path / f"a{suffix}")
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(loaded[name], array)
    loaded["half"][0] = 0  # a copy, which can be written


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_parameters_of_a_model_come_back_into_their_tree(tmp_path: Path, suffix: str) -> None:
    _, params = models.functional(models.MLP((4,), 3, hidden=(5,), rngs=nnx.Rngs(0)))
    interop.save_tensors(str(tmp_path / f"a{suffix}"), params)
    loaded = interop.load_tensors(str(tmp_path / f"a{suffix}"))
    assert "head.kernel" in loaded
    found = interop.unflatten(loaded, params)
    np.testing.assert_array_equal(found["head"]["kernel"], params["head"]["kernel"])
    assert found.keys() == params.keys()


def test_bfloat16_survives_safetensors_and_is_refused_by_npz(tmp_path: Path) -> None:
    tree = {"a": jnp.array([1.0, 3.140625], jnp.bfloat16)}
    interop.save_tensors(tmp_path / "a.safetensors", tree)
    loaded = interop.load_tensors(tmp_path / "a.safetensors")["a"]
    assert loaded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded, np.asarray(tree["a"]))
    interop.save_tensors(tmp_path / "a.npz", {"a": np.ones(1)})
    with pytest.raises(ValueError, match=r"bfloat16 has no place in .npz"):
        interop.save_tensors(tmp_path / "a.npz", tree)
    assert interop.load_tensors(tmp_path / "a.npz")["a"].tolist() == [1.0]  # the old file is as it was


def test_a_file_of_another_program_comes_in_the_natural_order_of_its_names(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({f"conv{i}.weight": np.full(2, float(i)) for i in (10, 2, 1)}, tmp_path / "a.safetensors")
    loaded = interop.load_tensors(tmp_path / "a.safetensors")
    assert list(loaded) == ["conv1.weight", "conv2.weight", "conv10.weight"]
    assert loaded["conv10.weight"].tolist() == [10.0, 10.0]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    interop.save_tensors(path, {"a": np.arange(6.0), "b": np.ones((2, 2), np.float32)})
    content = path.read_bytes()
    for size in range(1, len(content), 7):
        path.write_bytes(content[:size])
        refused(path, rf"must be a whole {suffix} file of arrays")
    path.write_bytes(b"")
    refused(path, "which is empty")
    path.write_bytes(b"no such thing, and long enough to be a header")
    refused(path, "must be a whole")


def test_pickles_and_files_without_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "object.npz", a=np.array([{}, 1], object))
    refused(tmp_path / "object.npz", "'a' is a pickled object, which is never loaded")
    np.savez(tmp_path / "words.npz", a=np.array(["x", "y"]))
    with pytest.raises(ValueError, match="must be an array of numbers, got ndarray of type <U1"):
        interop.load_tensors(tmp_path / "words.npz")
    with zipfile.ZipFile(tmp_path / "torch.npz", "w") as archive:
        archive.writestr("archive/data.pkl", b"pickle")
    refused(tmp_path / "torch.npz", "'archive/data.pkl', which is no array, as files of torch.save do")
    np.savez(tmp_path / "empty.npz")
    refused(tmp_path / "empty.npz", "which has none")
    with zipfile.ZipFile(tmp_path / "damaged.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': Fal" + b" " * 90)
    refused(tmp_path / "damaged.npz", "must be a whole .npz file")


def test_paths_and_trees_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for path, match in (
        (tmp_path / "a.pt", r"must end in .safetensors or .npz, got '.*a.pt'"),
        (tmp_path / "none.npz", "must be a file that can be read, got .*none.npz': No such file"),
        (tmp_path, "must end in"),
    ):
        refused(path, match)
    with pytest.raises(ValueError, match=r"path must be a file that can be written, got .*: No such file"):
        interop.save_tensors(tmp_path / "folder" / "a.npz", {"a": np.ones(1)})
    for tree, match in (
        ({}, "tree must hold at least one array, got none"),
        (np.ones(3), "tree must have a name for every array"),
        ({"a": {"b": np.ones(1)}, "a.b": np.ones(1)}, "one array for every name, got two for 'a.b'"),
        ({"a": np.ones(1), "b": None}, r"tree\['b'\] must be an array of numbers, got NoneType"),
        ({"a": {"b": None, "c": np.ones(1)}}, r"tree\['a.b'\] must be an array of numbers, got NoneType"),
        ({"a": "text"}, r"tree\['a'\] must be an array of numbers, got str"),
        ({"a": np.array([object()])}, r"tree\['a'\] must be an array of numbers, got ndarray of type object"),
    ):
        with pytest.raises(ValueError, match=match):
            interop.save_tensors(tmp_path / "a.npz", tree)
    assert not (tmp_path / "a.npz").exists()


def test_without_the_package_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (
        lambda: interop.save_tensors(tmp_path / "a.safetensors", {"a": np.ones(1)}),
        lambda: interop.load_tensors(tmp_path / "a.safetensors"),
    ):
        with pytest.raises(ImportError, match=r"extra 'interop': pip install 'gia-jax\[interop\]'"):
            call()


def test_unflatten_names_every_mismatch() -> None:
    like = {"head": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
    with pytest.raises(ValueError, match="tensors does not fit like") as caught:
        interop.unflatten({"head.kernel": np.ones((3, 2)), "tail": np.ones(1)}, like)
    for words in ("'head.bias' of shape (3,) is missing", "'tail' of shape (1,) is left over", "has shape (3, 2)"):
        assert words in str(caught.value)
    good = {"head.kernel": np.ones((2, 3)), "head.bias": np.ones(3)}
    for name, bad, match in (
        ("head.bias", np.ones(3, int), r"tensors\['head.bias'\] must be of type float32, got int64"),
        ("head.bias", np.array([0, np.nan, 0]), r"tensors\['head.bias'\] must be finite, got nan"),
        ("head.kernel", np.full((2, 3), 1e300), r"tensors\['head.kernel'\] must fit into float32, got 1e\+300"),
    ):
        with pytest.raises(ValueError, match=match):
            interop.unflatten(good | {name: bad}, like)
