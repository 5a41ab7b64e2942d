"""What the command line prints, and the files that it writes."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gia_jax
from gia_jax import ThreatModel, report
from gia_jax.cases import Case, Outcome
from gia_jax.plots import picture_grid
from gia_jax.protection import Protected


def row(name: str, known: bool, outcome: Outcome, prior: Outcome | None) -> list[str]:
    """Of `table`: an attack, whether it knew the labels, and the same attack on random updates."""
    scores, timing = outcome.scores, outcome.study.timing
    return [
        name,
        "known" if known else "inferred",
        _list_of(scores.psnr),
        f"{np.median(scores.psnr):.1f}",
        f"{np.median(scores.ssim):.2f}",
        f"{np.mean(scores.label_correct):.0%}",
        "-" if prior is None else f"{np.median(prior.scores.psnr):.1f}",
        f"{timing.compile_seconds:.0f}",
        f"{timing.run_seconds:.0f}",
    ]


def table(rows: list[list[str]], guesses: dict[str, np.ndarray]) -> str:
    """Attacks and, below them, guesses without a gradient, their PSNR in dB."""
    rows += [[name, "", _list_of(psnr), f"{np.median(psnr):.1f}", "", "", "", "", ""] for name, psnr in guesses.items()]
    header = ["attack or guess", "labels", "PSNR", "median", "SSIM", "labels right", "prior only", "compile s", "run s"]
    return report.table(header, rows)


def _list_of(psnr: np.ndarray) -> str:
    values = psnr.reshape(-1)
    return " ".join(f"{value:.1f}" for value in values[:4]) + (" ..." if len(values) > 4 else "")


def write(out: Path, content: Any) -> None:
    """results.json in a folder."""
    (out / "results.json").write_text(report.to_json(content))
    print(f"\nwrote {out / 'results.json'}")


def picture(path: Path, pixels: np.ndarray, outcomes: dict[str, Outcome], title: str) -> None:
    """Originals, shape (v, b, h, w, c) in [0, 1], beside what attacks made of them."""
    flat = pixels.reshape(-1, *pixels.shape[2:])
    columns, captions = {"original": flat}, {}
    for name, outcome in outcomes.items():
        columns[name] = outcome.scores.images.reshape(flat.shape)
        captions[name] = [f"{psnr:.1f} dB" for psnr in outcome.scores.psnr.reshape(-1)]
    picture_grid(columns, path, captions=captions, title=title)
    print(f"wrote {path}")


def folder(out: Path) -> Path:
    """The same path, a folder that can be written; OSError where it cannot."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--out must be a folder that can be written, got {str(out)!r}: {error.strerror}") from None
    return out


def banner(case: Case, model: str, protected: Protected, clients: int = 1) -> None:
    """A line on the setting."""
    victims, batch_size = case.truth.labels.shape
    groups = f"{victims} clients" if clients == 1 else f"{victims} groups of {clients} clients"
    shape = "x".join(str(n) for n in case.pixels.shape[2:])
    size = sum(leaf.size for leaf in jax.tree.leaves(protected.params))
    print(
        f"gia_jax {gia_jax.__version__}: {model}, untrained, {size:,} parameters; "
        f"{groups} with {batch_size // clients} of {case.images.name} ({shape}) each; {report.hardware()}"
    )


def threat(known: bool, defense: str, adaptive: bool, statistics: bool = False) -> str:
    """What the server is, has and knows, in words."""
    card = ThreatModel(labels=known, statistics=statistics).describe()
    if defense == "none":
        return card
    return f"{card}; {'knows' if adaptive else 'does not know'} the defense {defense}"


def progress(name: str) -> Callable[[int, int, float], None]:
    """A `progress_fn` on standard error: every percent in a terminal, every quarter elsewhere."""
    shown = {"percent": -1, "began": time.perf_counter()}

    def progress_fn(done: int, total: int, seconds: float) -> None:
        percent = 100 * done // total
        if percent == shown["percent"] or (not sys.stderr.isatty() and percent // 25 == shown["percent"] // 25):
            return
        shown["percent"] = percent
        line = f"{name}: {percent:3d} % of the steps, {seconds:.0f} s"
        if sys.stderr.isatty():
            print(f"\r{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    return progress_fn
