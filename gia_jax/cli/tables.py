"""The tables that the command line prints, and what results.json has beside an outcome."""

from typing import Any

import numpy as np

from gia_jax import metrics, report
from gia_jax.cli.outcomes import Outcome


def row(name: str, known: bool, outcome: Outcome, prior: Outcome | None) -> list[str]:
    """Makes a row of `table` or, without scores, of `table_of_losses`.

    Medians and means are over the victims whose reconstruction is finite, or over all where none is. The median of the
    attack on random updates is over all.

    Args:
        name: Name of the attack.
        known: Whether it knew the labels.
        outcome: What it achieved.
        prior: What the same attack achieved on random updates. None where it was left out.

    Returns:
        The cells.
    """
    scores, timing, found = outcome.scores, outcome.study.timing, outcome.study.reconstruction
    finite = np.asarray(found.is_finite)
    name += "" if finite.all() else f" ({np.sum(~finite)} of {finite.size} not finite)"
    kept = finite if finite.any() else np.ones_like(finite)
    seconds = [f"{timing.compile_seconds:.0f}", f"{timing.run_seconds:.0f}"]
    first = [name, "known" if known else "inferred"]
    share = _share(outcome.explained, kept)
    if scores is None:
        alone = "-" if prior is None else f"{np.median(prior.study.reconstruction.loss):.3g}, {_noise(prior)}"
        return [*first, f"{np.median(found.loss[kept]):.3g}", share, alone, *seconds]
    alone = "-" if prior is None or prior.scores is None else f"{np.median(prior.scores.psnr):.1f}, {_noise(prior)}"
    return [
        *first,
        _list_of(scores.psnr),
        f"{np.median(scores.psnr[kept]):.1f}",
        f"{np.median(scores.ssim[kept]):.2f}",
        f"{np.mean(scores.label_correct[kept]):.0%}",
        share,
        alone,
        *seconds,
    ]


def table(rows: list[list[str]], guesses: dict[str, np.ndarray]) -> str:
    """Makes the table of attacks and, below them, of guesses without a gradient, whose PSNR is in dB."""
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


def table_of_losses(rows: list[list[str]]) -> str:
    """Makes the table of attacks without a truth: the attacker's own loss, and how much of the update is explained."""
    return report.table(["attack", "labels", "loss", "explained", "prior only", "compile s", "run s"], rows)


def beside(outcome: Outcome, prior: Outcome | None, guesses: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns what results.json has beside an outcome: the guesses, and the same attack on random updates.

    Args:
        outcome: What the attack achieved.
        prior: What it achieved on random updates. None where that was left out.
        guesses: PSNR of guesses without a gradient, by name.
    """
    extra: dict[str, Any] = {}
    if outcome.scores is not None:
        extra["baselines_psnr"] = {name: psnr.tolist() for name, psnr in guesses.items()}
    if prior is not None:
        if prior.scores is not None:
            extra["prior_only_psnr"] = prior.scores.psnr.tolist()
        else:
            extra["prior_only_loss"] = np.asarray(prior.study.reconstruction.loss).tolist()
        extra["prior_only_explained"] = prior.explained.share.tolist()
    return extra


def _share(found: metrics.Explained, kept: np.ndarray) -> str:
    """Returns the median share of the victims' updates that is explained, and the scale where it is far from 1."""
    scale = np.median(found.scale[kept])
    return f"{np.median(found.share[kept]):.0%}" + ("" if 0.5 < scale < 2 else f" at scale {scale:.2g}")


def _noise(prior: Outcome) -> str:
    """Returns the median share of random updates that is explained."""
    return f"{np.median(prior.explained.share):.0%}"


def _list_of(psnr: np.ndarray) -> str:
    """Returns the first four values."""
    values = psnr.reshape(-1)
    return " ".join(f"{value:.1f}" for value in values[:4]) + (" ..." if len(values) > 4 else "")
