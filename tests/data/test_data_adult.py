"""Rows of Adult, from files of its form."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from gia_jax import data

ROWS = """39, State-gov, 77516, Bachelors, 13, Never-married, Sales, Husband, White, Male, 2174, 0, 40, Cuba, <=50K
50, ?, 83311, HS-grad, 9, Divorced, Sales, Wife, Black, Female, 0, 5, 13, Peru, >50K.
"""


def _write(folder: Path, content: str = ROWS, name: str = "adult.test.gz") -> Path:
    (folder / name).write_bytes(gzip.compress(content.encode()))
    return folder


def test_columns_are_numbers_and_categories_by_name(tmp_path: Path) -> None:
    rows = data.adult(folder=_write(tmp_path, "|1x3 Cross validator\n" + ROWS + "\n"))
    assert rows.name == "adult test"
    assert len(rows.columns) == 14
    assert rows.columns["age"].dtype == np.float32
    assert {name: column.tolist() for name, column in rows.columns.items() if name in ("age", "gains", "work")} == {
        "age": [39.0, 50.0],
        "gains": [2174.0, 0.0],
        "work": ["State-gov", "?"],
    }
    assert rows.labels.tolist() == [0, 1]
    first = data.adult(folder=tmp_path, limit=1)
    assert first.labels.tolist() == [0]
    assert all(len(column) == 1 for column in first.columns.values())


def test_files_are_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tabular").mkdir()
    _write(tmp_path / "tabular", name="adult.data.gz")
    monkeypatch.setenv("GIA_JAX_DATA_DIR", str(tmp_path))
    assert data.adult(split="train").labels.tolist() == [0, 1]
    monkeypatch.delenv("GIA_JAX_DATA_DIR")
    with pytest.raises(ValueError, match=r"GIA_JAX_DATA_DIR must be a folder with tabular/adult.data.gz, .* got none"):
        data.adult(split="train")


@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'all'"):
        data.adult(split="all", folder=tmp_path)
    with pytest.raises(ValueError, match="limit must be an integer of at least 1, got 0"):
        data.adult(limit=0, folder=tmp_path)
    with pytest.raises(ValueError, match=r"needs the file '.*adult.test.gz', which cannot be read: .*No such file"):
        data.adult(folder=tmp_path)
    (tmp_path / "adult.test.gz").write_bytes(gzip.compress(ROWS.encode())[:40])
    with pytest.raises(ValueError, match="which cannot be read: "):
        data.adult(folder=tmp_path)
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got"):
        data.adult(split=["test"], folder=tmp_path)
    with pytest.raises(ValueError, match="which cannot be read: there is no row"):
        data.adult(folder=_write(tmp_path, ""))
    with pytest.raises(ValueError, match="which cannot be read: could not convert string"):
        data.adult(folder=_write(tmp_path, ROWS.replace("39", "old")))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (", <=50K", "", "line 1 must have 15 fields with ', ' between them, got 14"),
        ("<=50K", "50K", r"line 1 must end with one of \('<=50K', '>50K'\), got '50K'"),
        ("50, ?", "nan, ?", "age must be finite, got nan"),
    ],
)
def test_a_line_that_is_no_row_is_not_passed_over(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"which cannot be read: {message}"):
        data.adult(folder=str(_write(tmp_path, ROWS.replace(old, new))))


def test_bytes_that_were_changed_are_named(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(np.random.default_rng(0).bytes(10_000).hex().encode()))
    content[40:44] = b"\xff" * 4
    (tmp_path / "adult.test.gz").write_bytes(content)
    with pytest.raises(ValueError, match="which cannot be read: "):
        data.adult(folder=tmp_path)
