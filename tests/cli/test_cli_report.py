"""The command line's report: what attacks leave on disk becomes one page, and other files are left alone."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gia_jax.cli import main
from gia_jax.report.arrays import unpack
from gia_jax.report.runs import read

pytest.importorskip("sklearn")
pytest.importorskip("jinja2")

QUICK = ["attack", "--model", "linear", "--data", "digits", "--victims", "2", "--no-prior-only"]


def test_what_an_attack_wrote_becomes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "first run"
    command = [*QUICK, "--solver", "adam", "--steps", "20", "--restarts", "2", "--out", str(out)]
    assert main(command) == 0
    content = (out / "results.json").read_bytes()
    record = json.loads(content)
    assert shlex.split(record["command"]) == ["python", "-m", "gia_jax", *command]
    assert record["shown"]["psnr"] == {"heading": "PSNR", "form": ".1f", "unit": " dB", "average": "median"}
    arrays = unpack(out / "results.npz", content)[""]
    assert arrays["losses"].shape == (2, 2, 20)
    assert arrays["path_steps"].tolist() == list(range(1, 21))
    psnr = [victim["psnr"] for victim in record["victims"]]
    np.testing.assert_array_equal(arrays["path_psnr"][:, -1], psnr)
    assert arrays["path_psnr"].shape == (2, 20)
    assert (arrays["path_psnr"][:, 0] < np.array(psnr) - 3).all()  # it starts far from there
    errors = (arrays["original"] / 255.0 - arrays["reconstruction"] / 255.0) ** 2
    recorded = [victim["mse"] for victim in record["victims"]]
    np.testing.assert_allclose(errors.mean((1, 2, 3)), recorded, atol=4e-3)

    (row,) = read(tmp_path)
    assert list(row.scores["psnr"].values) == [victim["psnr"] for victim in record["victims"]]
    assert row.threat_model == record["threat_model"]
    np.testing.assert_array_equal(row.curves[1].lines["victim 2"], [arrays["path_steps"], arrays["path_psnr"][1]])
    assert row.curves[2].lines["victim 2"][0][-1] == pytest.approx(record["run_seconds"] / 2)
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 0
    page = tmp_path / "report.html"
    assert capsys.readouterr().out.startswith(f"wrote {page}: 1 row, ")
    html = page.read_text()
    assert "inverting_gradients on linear, digits" in html
    assert "runs/first run/results.json" in html
    assert main(["report", str(tmp_path)]) == 0  # an earlier report is replaced
    assert page.read_text() == html


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gia_jax: error: ")
    assert error.count("\n") == 1
    return error


def test_mistakes_are_one_line_and_no_other_file_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mine = tmp_path / "runs", tmp_path / "thesis.html"
    mine.write_text("<!doctype html>of another year")
    assert "folder must be an existing folder" in _refused([str(folder)], capsys)
    folder.mkdir()
    assert "folder must hold results.json or a store of a sweep, got none" in _refused([str(folder)], capsys)
    (folder / "results.json").write_text("{'a': 1}")
    assert "results.json must be a results.json that gia_jax wrote: Expecting property" in _refused(
        [str(folder)], capsys
    )
    victim = {"psnr": 9.5, "loss": 1, "is_finite": True}
    record = {"settings": {"attack": "dlg"}, "threat_model": "a server", "victims": [victim]}
    (folder / "results.json").write_text(json.dumps(record))
    other = "--output must be a new file or an earlier report, got another file"
    assert other in _refused([str(folder), "--output", str(mine)], capsys)
    assert mine.read_text() == "<!doctype html>of another year"
    assert "--output must be a file, got the folder" in _refused([str(folder), "--output", str(folder)], capsys)
    nowhere = str(tmp_path / "nowhere" / "page.html")
    assert "--output must be in an existing folder" in _refused([str(folder), "--output", nowhere], capsys)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "the report needs the extra 'report': pip install 'gia-jax[report]'" in _refused([str(folder)], capsys)
    assert [path.name for path in folder.iterdir()] == ["results.json"]


def test_the_command_line_does_not_import_what_the_page_is_made_with() -> None:
    check = (
        "import sys, gia_jax.cli, gia_jax.report.page; sys.exit({'jinja2', 'matplotlib'} & set(sys.modules) != set())"
    )
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
