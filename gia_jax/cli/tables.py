"""The tables that the command line prints, and what results.json has beside an outcome."""

from typing import Any

import numpy as np

from gia_jax import metrics, report
from gia_jax.cli.outcomes import Outcome
from gia_jax.modalities import Modality


def row(name: str, known: bool, outcome: Outcome, prior: Outcome | None, modality: Modality) -> list[str]:
    """Makes a row of `table` or, without scores, of `table_of_losses`.

    Medians and means are over the victims whose reconstruction is finite, or over all where none is. The median of the
    attack on random updates is over all.

    Args:
        name: Name of the attack.
        known: Whether it knew the labels.
        outcome: What it achieved.
        prior: What the same attack achieved on random updates. None where it was left out.
        modality: What an example is.

    Returns:
        The cells.
    """
    timing, found = outcome.study.timing, outcome.study.reconstruction
    finite = np.asarray(found.is_finite)
    name += "" if finite.all() else f" ({np.sum(~finite)} of {finite.size} not finite)"
    kept = finite if finite.any() else np.ones_like(finite)
    seconds = [f"{timing.compile_seconds:.0f}", f"{timing.run_seconds:.0f}"]
    first = [name, "known" if known else "inferred"]
    share = _share(outcome.explained, kept)
    if outcome.scored is None or outcome.label_correct is None:
        alone = "-" if prior is None else f"{np.median(prior.study.reconstruction.loss):.3g}, {_noise(prior)}"
        return [*first, f"{np.median(found.loss[kept]):.3g}", share, alone, *seconds]
    main, *others = modality.shown
    alone = "-"
    if prior is not None and prior.scored is not None:
        alone = f"{_summary(prior.scores(main), modality, main)}, {_noise(prior)}"
    return [
        *first,
        _list_of(outcome.scores(main), modality),
        *(_summary(outcome.scores(name)[kept], modality, name) for name in (main, *others)),
        f"{np.mean(outcome.label_correct[kept]):.0%}",
        share,
        alone,
        *seconds,
    ]


def table(rows: list[list[str]], guesses: dict[str, np.ndarray], modality: Modality) -> str:
    """Makes the table of attacks and, below them, of guesses without a gradient, by the modality's first score."""
    main, *others = modality.shown.values()
    header = [
        "attack or guess",
        "labels",
        main.heading,
        main.average,
        *(shown.heading for shown in others),
        "labels right",
        "explained",
        "prior only",
        "compile s",
        "run s",
    ]
    for name, scores in guesses.items():
        cells = [name, "", _list_of(scores, modality), _summary(scores, modality, modality.main)]
        rows.append([*cells, *[""] * (len(header) - len(cells))])
    return report.table(header, [[*cells, *[""] * (len(header) - len(cells))] for cells in rows])


def table_of_losses(rows: list[list[str]]) -> str:
    """Makes the table of attacks without a truth: the attacker's own loss, and how much of the update is explained."""
    return report.table(["attack", "labels", "loss", "explained", "prior only", "compile s", "run s"], rows)


def beside(
    outcome: Outcome, prior: Outcome | None, guesses: dict[str, np.ndarray], modality: Modality
) -> dict[str, Any]:
    """Returns what results.json has beside an outcome: the guesses, the same attack on random updates, and how
    scores are written.

    Args:
        outcome: What the attack achieved.
        prior: What it achieved on random updates. None where that was left out.
        guesses: The modality's first score of guesses without a gradient, by name.
        modality: What an example is.
    """
    extra: dict[str, Any] = {"shown": {name: shown._asdict() for name, shown in modality.shown.items()}}
    if outcome.scored is not None and guesses:
        extra[f"baselines_{modality.main}"] = {name: scores.tolist() for name, scores in guesses.items()}
    if prior is not None:
        if prior.scored is not None:
            extra[f"prior_only_{modality.main}"] = prior.scores(modality.main).tolist()
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


def _summary(scores: np.ndarray, modality: Modality, name: str) -> str:
    """Returns the median or mean of scores, as the modality writes them."""
    return modality.shown[name].summary(scores)


def _list_of(scores: np.ndarray, modality: Modality) -> str:
    """Returns the first four values of the modality's first score."""
    values = scores.reshape(-1)
    shown = modality.shown[modality.main]
    return " ".join(map(shown.text, values[:4].tolist())) + (" ..." if len(values) > 4 else "")
