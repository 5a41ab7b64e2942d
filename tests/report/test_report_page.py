"""The page about results: its numbers are those of the records, and it needs nothing outside of itself."""

import base64
import io
import json
import re
import shutil
import subprocess
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gia_jax import ThreatModel, metrics
from gia_jax.modalities import Shown
from gia_jax.report.arrays import MAX_POINTS, pack, thinned, unpack
from gia_jax.report.page import page
from gia_jax.report.plots import line_plot
from gia_jax.report.rows import Row, score
from gia_jax.report.runs import read

PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
IMAGES = {"psnr": Shown("PSNR", ".1f", " dB")._asdict(), "ssim": Shown("SSIM", ".2f")._asdict()}
FIELDS = {"fields": Shown("fields right", ".0%", " right", "mean")._asdict()}
RNG = np.random.default_rng(0)
PIXELS = {name: RNG.integers(0, 256, (3, 8, 8, 1), np.uint8) for name in ("original", "reconstruction")}


class Page(HTMLParser):
    """What a reader of a page finds: the numbers of each row of a table, by the part of the page, and the pictures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.numbers: dict[str, list[list[float]]] = {}
        self.pictures: list[tuple[str, str]] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.words: dict[str, str] = {}
        self._part = "top"
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.ids.add(named.get("id", ""))
        self._part = named["id"] if tag == "article" else self._part
        if tag in ("tr", "dl"):
            self.numbers.setdefault(self._part, []).append([])
        if tag == "data":
            self.numbers[self._part][-1].append(float(named["value"]))
        if "src" in named:
            self.pictures.append((self._part, named["src"]))
        self.links += [named[name] for name in ("href", "action", "srcset", "style", "data-src") if name in named]

    def handle_data(self, data: str) -> None:
        self.words[self._part] = self.words.get(self._part, "") + data


def _record(victims: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A record as the command line writes it."""
    explained = [{"share": 0.75 - 0.125 * i, "mismatch": 0.5, "scale": 1.0625 + i} for i in range(len(victims))]
    return {
        "settings": {"attack": "idlg", "model": "lenet", "data": "digits", "steps": 40, "defense": [], "clip": None},
        "threat_model": ThreatModel().describe(),
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "hardware": "2 cores of a machine",
        "compile_seconds": 10.25,
        "run_seconds": 0.21875,
        "ms_per_step_per_restart": 0.4453125,
        "command": "python -m gia_jax attack --attack idlg",
        "victims": [
            victim | {"explained": own, "loss": 0.015625 * (i + 1), "restart_losses": [0.5, 0.015625 * (i + 1)]}
            for i, (victim, own) in enumerate(zip(victims, explained, strict=True))
        ],
    } | more


def _image(psnr: Any, ssim: float, *, is_finite: bool = True) -> dict[str, Any]:
    return {"psnr": psnr, "ssim": ssim, "psnr_per_example": [psnr], "label_correct": 1.0, "is_finite": is_finite}


def _write(folder: Path, content: Any, arrays: dict[str, dict[str, np.ndarray]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content).encode()
    (folder / "results.json").write_bytes(text)
    if arrays is not None:
        (folder / "results.npz").write_bytes(pack(text, arrays))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Images, rows of a table, and an aggregated round of which one part was not attacked."""
    losses = np.geomspace(1, 1e-6, 3 * 2 * 400).reshape(3, 2, 400)
    victims = [_image(7.25, -0.5), _image(162.625, 1.0), _image("inf", 1.0)]
    images = _record(
        victims, shown=IMAGES, prior_only_psnr=[[4.0], [3.5], [4.25]], prior_only_explained=[0.1, 0.2, 0.3]
    )
    images["baselines_psnr"] = {"grey": [[8.0], [7.0], [7.5]]}
    _write(tmp_path / "a", images, {"": thinned(losses) | PIXELS})
    rows = [{"fields": 0.5, "fields_per_example": [0.25, 0.75], "is_finite": True} for _ in range(2)]
    drawing = {"drawing": np.frombuffer(b"field  original\nage    52", np.uint8)}
    _write(tmp_path / "b" / "c", _record(rows, shown=FIELDS), {"": drawing})
    _write(tmp_path / "d", {"client:0": "n/a: ciphertext", "aggregate": _record([_image(41.5, 0.875)], shown=IMAGES)})
    return tmp_path


def _expected(values: list[float], statistic: Any) -> list[float]:
    """A statistic and its interval."""
    return [statistic(values), *metrics.bootstrap_interval(np.array(values), statistic)]


def test_every_number_is_the_records(runs: Path) -> None:
    found = Page(page(read(runs)))
    image, fields, hidden, alone = (found.numbers.get(f"result-{i}", []) for i in range(1, 5))
    psnr, ssim, shares = [7.25, 162.625, np.inf], [-0.5, 1.0, 1.0], [0.75, 0.625, 0.5]
    attack = [*_expected(psnr, np.median), *_expected(ssim, np.median)]
    attack += [*_expected([1.0] * 3, np.mean), *_expected(shares, np.median)]
    random = _expected([4.0, 3.5, 4.25], np.median)
    costs = [10.25, 0.21875, 0.4453125]
    assert [numbers for numbers in image if numbers] == [
        attack,
        [*random, *_expected([0.1, 0.2, 0.3], np.median)],
        _expected([8.0, 7.0, 7.5], np.median),
        *([psnr[i], ssim[i], 1.0, shares[i], 0.015625 * (i + 1), 1.0625 + i] for i in range(3)),
        costs,
    ]
    assert [*attack, *random, *costs] in found.numbers["top"]
    assert fields[1] == [*_expected([0.5, 0.5], np.mean), *_expected([0.75, 0.625], np.median)]
    assert hidden == []
    assert alone[1] == [41.5, 0.875, 1.0, 0.75]  # one victim has no interval
    assert "not attacked: n/a: ciphertext" in found.words["result-3"]


def test_a_page_needs_nothing_outside_of_itself(runs: Path) -> None:
    html = page(read(runs))
    assert not re.search(r"https?:|url\(|@import|//[a-z]+\.", re.sub(r"base64,[\w+/=]+", "", html))
    found = Page(html)
    assert found.pictures
    assert all(uri.startswith("data:image/png;base64,") for _, uri in found.pictures)
    assert found.links
    assert {link.removeprefix("#") for link in found.links} <= found.ids
    assert not {"link", "iframe", "object", "embed", "base"} & set(found.tags)
    assert "default-src 'none'" in html


def test_pictures_are_those_of_the_arrays(runs: Path) -> None:
    html = page(read(runs))
    images = [uri for part, uri in Page(html).pictures if part == "result-1"]
    assert len(images) == 7  # three pairs and the losses
    for i, uri in enumerate(images[:6]):
        pixels = np.asarray(PIL.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("L"))
        np.testing.assert_array_equal(pixels, PIXELS[("original", "reconstruction")[i % 2]][i // 2, ..., 0])
    assert "<b>162.6 dB</b>" in html
    assert "age    52" in Page(html).words["result-2"]
    assert "Reconstructions, the first" not in html


def test_it_says_that_some_examples_are_left_out(tmp_path: Path) -> None:
    victims = [_image(7.25, -0.5) | {"psnr_per_example": [7.0, 7.5, 7.75, 6.75, 8.0]}]
    html = page(read(_write(tmp_path, _record(victims, shown=IMAGES), {"": PIXELS})))
    assert "Reconstructions, the first 3 of 5 examples" in html


def test_arrays_of_other_results_are_left_out(runs: Path) -> None:
    """The run before the last one in a folder wrote them."""
    content = json.loads((runs / "a" / "results.json").read_text())
    _write(runs / "a", content | {"run_seconds": 3.0})
    first = read(runs)[0]
    assert not first.curves
    assert not first.examples
    (runs / "a" / "results.npz").write_bytes(b"PK, but no archive")
    assert not read(runs)[0].examples


def test_thinned_curves_keep_their_ends_and_short_ones_everything() -> None:
    losses = np.arange(2 * 3 * 1_000.0).reshape(2, 3, 1_000)
    kept = thinned(losses)
    assert len(kept["steps"]) <= MAX_POINTS
    np.testing.assert_array_equal(kept["losses"][..., [0, -1]], losses[..., [0, -1]])
    np.testing.assert_array_equal(thinned(losses[..., :7])["losses"], losses[..., :7])
    assert thinned(losses[..., :0]) == {}


def test_curves_of_a_folder_are_of_the_chosen_restart(runs: Path) -> None:
    (curve,) = read(runs)[0].curves
    arrays = unpack(runs / "a" / "results.npz", (runs / "a" / "results.json").read_bytes())[""]
    for i in range(3):  # the second restart has the lower loss
        np.testing.assert_array_equal(curve.lines[f"victim {i + 1}"][1], arrays["losses"][i, 1])


def test_scores_over_steps_and_seconds_are_the_files(tmp_path: Path) -> None:
    steps, scores = np.array([3, 5, 8]), RNG.normal(size=(2, 3))
    arrays = thinned(np.ones((2, 2, 8))) | {"path_steps": steps, "path_psnr": scores}
    victims = [_image(scores[0, -1], -0.5), _image(scores[1, -1], 1.0)]
    (row,) = read(_write(tmp_path, _record(victims, shown=IMAGES), {"": arrays}))
    _, over_steps, over_seconds = row.curves
    assert over_steps.labels == ("step", "PSNR, dB")
    assert over_seconds.labels == ("seconds, one victim's share of the run", "PSNR, dB")
    for i in range(2):  # a step of a restart takes 0.4453125 ms, and each victim has two restarts
        for curve, x in ((over_steps, steps), (over_seconds, steps * 2 * 0.4453125e-3)):
            np.testing.assert_allclose(curve.lines[f"victim {i + 1}"][0], x, rtol=1e-15)
            np.testing.assert_array_equal(curve.lines[f"victim {i + 1}"][1], scores[i])
    words = Page(page([row])).words["result-1"]
    assert "PSNR over steps" in words
    assert "PSNR over seconds" in words
    # Scores of another number of victims, or of another score than the first, are not shown.
    for other in ({"path_psnr": scores[:1]}, {"path_psnr": scores[:0]}):
        (row,) = read(_write(tmp_path, _record(victims, shown=IMAGES), {"": arrays | other}))
        assert len(row.curves) == 1
    del arrays["path_psnr"]
    (row,) = read(_write(tmp_path, _record(victims, shown=IMAGES), {"": arrays | {"path_ssim": scores}}))
    assert len(row.curves) == 1


def test_hostile_names_are_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    record = _record([_image(9.5, 0.5)], shown=IMAGES | {"psnr": Shown(f"{name}$\\frac$", ".1f")._asdict()})
    record["settings"] |= {"model": name, 'x" onload="alert(2)': name}
    record |= {
        "threat_model": name,
        "hardware": name,
        "versions": {name: name},
        "command": f"{name} '\"",
        "accuracy": 0.5,
    }
    _write(tmp_path, record, {"": PIXELS | {"note": np.array('"><img src=x onerror=alert(3)>')}})
    html = page(read(tmp_path), title=name)
    found = Page(html)
    assert name not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 8
    assert found.tags.count("script") == 1
    assert all(uri.startswith("data:image/png;base64,") for _, uri in found.pictures)
    form = dict(_record([_image(9.5, 0.5)], shown=IMAGES | {"psnr": Shown("PSNR", "9999999d")._asdict()}))
    with pytest.raises(
        ValueError, match=r"results.json must be a results.json that gia_jax wrote: scores .* '9999999d'"
    ):
        read(_write(tmp_path / "form", form))


def test_what_is_missing_is_left_out() -> None:
    html = page([Row("an attack", scores={"psnr": score([7.5], Shown("PSNR", ".1f"))})])
    names = ("Command", "Versions", "Hardware", "Settings", "Cost", "Reconstructions", "Leakage", "Threat model<")
    for part in names:
        assert part not in html
    assert "the same attack on random updates" not in html
    with pytest.raises(ValueError, match="rows must hold at least one result"):
        page([])


def test_old_records_without_words_for_their_scores_are_read(tmp_path: Path) -> None:
    record = _record([_image(9.5, 0.5)])
    del record["command"]
    (row,) = read(_write(tmp_path, {"idlg, prune:ratio=0.9": record}))
    assert [one.shown.heading for one in row.scores.values()] == ["PSNR", "SSIM", "labels right", "update explained"]
    assert row.title == "idlg on lenet, digits"


def test_victims_that_are_not_finite_do_not_count(tmp_path: Path) -> None:
    record = _record([_image(9.5, 0.5), _image("nan", "nan", is_finite=False), _image(11.5, 0.5)], shown=IMAGES)
    (row,) = read(_write(tmp_path, record))
    assert row.scores["psnr"].value == 10.5
    assert row.notes == ["1 of 3 reconstructions are not finite"]
    assert "1 of 3 reconstructions are not finite" in page([row])


def test_leakage_is_shown_against_accuracy_where_it_is_recorded(tmp_path: Path) -> None:
    for name, accuracy, psnr in (("a", 0.75, 21.5), ("b", 0.5, 7.25), ("c", None, 9.0)):
        _write(tmp_path / name, _record([_image(psnr, 0.5)], shown=IMAGES, accuracy=accuracy))
    found = Page(page(read(tmp_path)))
    assert "Leakage against accuracy" in found.words["top"]
    assert found.numbers["top"][-2:] == [[0.75, 21.5], [0.5, 7.25]]
    assert len([part for part, _ in found.pictures if part == "top"]) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("[]", "it holds no object"),
        ("{}", "it holds no attack"),
        ('{"accuracy": 0.5}', "it holds no attack"),
        ('{"a": 0.5, "idlg": {"settings": {}}}', "its entry 'a' is no attack"),
        ('{"victims": []}', "it has no 'settings'"),
        ('{"settings": {"attack": "a"}, "threat_model": "", "victims": []}', "it has no victims"),
        ('{"settings": {}, "threat_model": "", "victims": [{"loss": 1, "is_finite": true}]}', "it has no 'attack'"),
        ("\udcff", "codec"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "results.json").write_bytes(content.encode("utf8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"results.json must be a results.json that gia_jax wrote: ") as caught:
        read(tmp_path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results_of_others.json").write_text("{}")
    with pytest.raises(ValueError, match=r"folder must hold results.json or a store of a sweep, got none"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"folder must be an existing folder, got .*nowhere"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("y", [[np.inf], [1.0, 2.0, 3.0]])
def test_lines_must_have_as_many_numbers_on_both_axes(tmp_path: Path, y: list[float]) -> None:
    x = np.arange(len(y))
    line_plot({"a": (x, np.array(y))}, tmp_path / "a.png", labels=("x", "y"))
    for factor in (0, np.nan, -1):  # none of which a logarithmic axis has a place for
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            line_plot(
                {"a": (x, factor * np.ones(len(y)))}, tmp_path / "b.png", labels=("", ""), scales=("linear", "log")
            )
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"lines\['a'\] must be two arrays of shape \(n,\)"):
        line_plot({"a": (x, np.array([*y, 1.0]))}, tmp_path / "b.png", labels=("x", "y"))


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="needs Chromium")
def test_a_browser_shows_the_page_without_an_error(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page(read(runs)))
    browser = next(path for path in map(shutil.which, BROWSERS) if path)
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking hide-scrollbars"
    flags += " disable-component-update disable-sync disable-dev-shm-usage enable-logging=stderr"
    chosen = {"user-data-dir": tmp_path / "profile", "screenshot": tmp_path / "seen.png", "window-size": "700,1200"}
    options = [*(f"--{flag}" for flag in flags.split()), *(f"--{name}={value}" for name, value in chosen.items())]
    address = (tmp_path / "page.html").as_uri()
    ran = subprocess.run([browser, *options, address], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in ran.stderr
    seen = np.asarray(PIL.open(tmp_path / "seen.png").convert("L"), int)
    assert seen.shape == (1200, 700)
    assert (seen < 100).any(1).mean() > 0.1  # text
