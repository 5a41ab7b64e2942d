"""What the command line prints, and the files that it writes."""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gia_jax
from gia_jax import ThreatModel, metrics, report
from gia_jax._files import write_unclaimed
from gia_jax.cli.cases import Case, Outcome
from gia_jax.defenses.protected import Protected
from gia_jax.report import picture_grid
from gia_jax.sweep.study import Sign

RESULTS = "results.json"
QUIET_SECONDS = 10.0  # between two lines on a standard error that is no terminal


def row(name: str, known: bool, outcome: Outcome, prior: Outcome | None) -> list[str]:
    """A row of `table`: an attack, whether it knew the labels, and the same attack on random updates.

    Medians and means are over the victims whose reconstruction is finite, or over all where none is. The median of
    the attack on random updates is over all.
    """
    scores, timing, finite = outcome.scores, outcome.study.timing, outcome.study.reconstruction.is_finite
    name += "" if finite.all() else f" ({np.sum(~finite)} of {finite.size} not finite)"
    kept = finite if finite.any() else np.ones_like(finite)
    return [
        name,
        "known" if known else "inferred",
        _list_of(scores.psnr),
        f"{np.median(scores.psnr[kept]):.1f}",
        f"{np.median(scores.ssim[kept]):.2f}",
        f"{np.mean(scores.label_correct[kept]):.0%}",
        _share(outcome.explained, kept),
        "-" if prior is None else f"{np.median(prior.scores.psnr):.1f}, {np.median(prior.explained.share):.0%}",
        f"{timing.compile_seconds:.0f}",
        f"{timing.run_seconds:.0f}",
    ]


def table(rows: list[list[str]], guesses: dict[str, np.ndarray]) -> str:
    """Attacks and, below them, guesses without a gradient, their PSNR in dB."""
    rows += [[name, "", _list_of(psnr), f"{np.median(psnr):.1f}", *[""] * 6] for name, psnr in guesses.items()]
    header = [
        "attack or guess",
        "labels",
        "PSNR",
        "median",
        "SSIM",
        "labels right",
        "explained",
        "prior only",
        "compile s",
        "run s",
    ]
    return report.table(header, rows)


def _share(found: metrics.Explained, kept: np.ndarray) -> str:
    """The median share of the victims' updates that is explained, and the scale where it is far from 1."""
    scale = np.median(found.scale[kept])
    return f"{np.median(found.share[kept]):.0%}" + ("" if 0.5 < scale < 2 else f" at scale {scale:.2g}")


def _list_of(psnr: np.ndarray) -> str:
    values = psnr.reshape(-1)
    return " ".join(f"{value:.1f}" for value in values[:4]) + (" ..." if len(values) > 4 else "")


def write(out: Path, content: Any, outcomes: Iterable[Outcome], since: float) -> None:
    """Writes results.json to a folder, so that nothing that was computed is lost.

    Args:
        out: The folder.
        content: What is written.
        outcomes: Outcomes of the attacks whose states are kept until the results are written.
        since: When the run began, in seconds as `time.time` counts them: a file that another run wrote since is left
            alone, and a number is put behind the name.

    Raises:
        OSError: The file cannot be written. The states are kept, or, where one is missing, the content was printed.
    """
    text = report.to_json(content)
    try:
        path = write_unclaimed(out / RESULTS, text.encode(), since)
    except OSError as error:
        reason = f"{str(out / RESULTS)!r} cannot be written: {error.strerror}"
        states = [outcome.study.checkpoint for outcome in outcomes]
        if None in states:
            print(text)
            raise OSError(f"{reason}; its content was printed instead") from None
        raise OSError(f"{reason}; nothing is lost: the same command writes it without computing again") from None
    print(f"\nwrote {path}")


def forget(out: Path, outcomes: Iterable[Outcome]) -> None:
    """Removes the states of runs whose results are written."""
    for outcome in outcomes:
        if outcome.study.checkpoint is not None:
            outcome.study.checkpoint.unlink(missing_ok=True)
            for part in states(out).glob(f"{outcome.study.checkpoint.name}.*.part"):
                part.unlink(missing_ok=True)  # of a process that was killed while it wrote
    with contextlib.suppress(OSError):  # there is none, or it keeps the state of another run
        states(out).rmdir()


def states(out: Path) -> Path:
    """The folder of the states of interrupted runs."""
    return out / "states"


def picture(path: Path, pixels: np.ndarray, outcomes: dict[str, Outcome], title: str, since: float) -> None:
    """Draws originals, shape (v, b, h, w, c) in [0, 1], beside what attacks made of them; `since` as for `write`."""
    flat = pixels.reshape(-1, *pixels.shape[2:])
    columns, captions = {"original": flat}, {}
    for name, outcome in outcomes.items():
        columns[name] = outcome.scores.images.reshape(flat.shape)
        captions[name] = [f"{psnr:.1f} dB" for psnr in outcome.scores.psnr.reshape(-1)]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        drawing = Path(folder) / path.name
        picture_grid(columns, drawing, captions=captions, title=title)
        path = write_unclaimed(path, drawing.read_bytes(), since)
    print(f"wrote {path}")


def folder(out: Path, names: Iterable[str]) -> Path:
    """Makes a folder to which files of these names can be written, and returns its path.

    Raises:
        OSError: The folder cannot be made or written, or one of the names is a folder in it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"--out must be a folder that can be written, got {str(out)!r}: {error.strerror}") from None
    for name in names:
        if (out / name).is_dir():
            raise OSError(f"--out must have no folder where the file {name!r} is to be, got {str(out)!r}")
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


def progress(name: str) -> Callable[[Sign], None]:
    """Makes a `progress_fn` that prints progress and the time left to standard error.

    In a terminal one line is updated at every call; elsewhere there is a line at most every `QUIET_SECONDS`, and at
    every new phase.
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    shown: dict[str, Any] = {"phase": "", "at": 0.0, "width": 0}

    def progress_fn(sign: Sign) -> None:
        now, last = time.perf_counter(), sign.done == sign.total
        if not terminal and not last and sign.phase == shown["phase"] and now - shown["at"] < QUIET_SECONDS:
            return
        shown["phase"], shown["at"] = sign.phase, now
        line = f"{name}: compiling"
        if sign.phase != "compiling":
            part = " of the steps" if sign.phase == "steps" else " of the steps, warming up"
            line = f"{name}: {100 * sign.done // sign.total:3d} %{part}, {sign.seconds:.0f} s"
            if sign.seconds_left is not None and not last:
                line += f", about {sign.seconds_left:.0f} s left"
        if terminal:
            print(f"\r{line:<{shown['width']}}", end="\n" if last else "", file=sys.stderr, flush=True)
            shown["width"] = len(line)
        else:
            print(line, file=sys.stderr, flush=True)

    return progress_fn


def warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Prints a warning in one line: it takes the place of `warnings.showwarning`."""
    kind = "warning" if category is UserWarning else category.__name__
    print(f"gia_jax: {kind}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
