"""What a report knows of results: rows of scores, curves, pictures and words, wherever they were read from."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gia_jax.metrics.intervals import bootstrap_interval
from gia_jax.modalities.base import Shown
from gia_jax.report.plots import Scale

ON_RANDOM = "the same attack on random updates"


class Score(NamedTuple):
    """A score of several victims.

    Attributes:
        shown: How it is written.
        values: Its values, one for each victim.
        value: Their median or mean, over the victims that count.
        interval: Bootstrap interval of 95 % of that. None of one victim.
    """

    shown: Shown
    values: tuple[float, ...]
    value: float
    interval: tuple[float, float] | None = None


class Picture(NamedTuple):
    """A picture, or text in its place.

    Attributes:
        heading: What it shows.
        png: Content of a PNG file. It is empty where there is text.
        text: Text in the place of a picture.
        caption: Words below it.
        is_tile: Whether it is one example with a pixel for each of its own, which the page enlarges without smoothing.
    """

    heading: str
    png: bytes = b""
    text: str = ""
    caption: str = ""
    is_tile: bool = False


class Curve(NamedTuple):
    """Numbers along an axis, such as the loss over steps.

    Attributes:
        title: Words above the plot.
        labels: What the horizontal and the vertical axis show.
        lines: Numbers along both axes by the name of the line, each of shape (n,).
        scales: Whether the horizontal and the vertical axis are "linear" or "log".
    """

    title: str
    labels: tuple[str, str]
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]]
    scales: tuple[Scale, Scale] = ("linear", "linear")


class Row(NamedTuple):
    """A result: one attack on victims of one setting. What is empty is left out of the page.

    Attributes:
        title: What was attacked, and how.
        threat_model: Who attacks and what the adversary knows, as `ThreatModel.describe` says it.
        source: Where the result was read.
        notes: Further lines.
        scores: Scores by their names, the one that the attack is judged by first.
        details: Further numbers of each victim, by their names.
        compared: Scores, by their names, of what the attack is compared with, by its own name, such as a guess. That
            of `ON_RANDOM` is in the table of all rows too.
        curves: Curves of the attack.
        examples: Examples, each of one or several pictures beside each other.
        num_examples: Number of all examples, where it is larger than that of those shown.
        accuracy: Accuracy of a model that was trained behind the same defense, in [0, 1].
        cost: What it took, by name.
        settings: Settings, by name.
        versions: Versions of packages, by name.
        hardware: What it ran on.
        command: Command that repeats it.
    """

    title: str
    threat_model: str = ""
    source: str = ""
    notes: Sequence[str] = ()
    scores: Mapping[str, Score] = {}
    details: Mapping[str, Score] = {}
    compared: Mapping[str, Mapping[str, Score]] = {}
    curves: Sequence[Curve] = ()
    examples: Sequence[Sequence[Picture]] = ()
    num_examples: int = 0
    accuracy: float | None = None
    cost: Mapping[str, float] = {}
    settings: Mapping[str, str] = {}
    versions: Mapping[str, str] = {}
    hardware: str = ""
    command: str = ""


def score(values: Sequence[float], shown: Shown, counts: Sequence[bool] | None = None) -> Score:
    """Sums up a score of several victims.

    Args:
        values: Values of the score, one for each victim, at least one.
        shown: How the score is written, and whether it is summed up by its median or mean.
        counts: Whether each victim counts, such as those with a finite reconstruction. None, or no True, counts all.

    Returns:
        The score, with its interval where at least two victims count.

    Examples:
        >>> from gia_jax.modalities import Shown
        >>> from gia_jax.report.rows import score
        >>> score([12.0, 18.5, 21.0], Shown("PSNR", ".1f", " dB")).value
        18.5
    """
    every, kept = np.asarray(values, float), np.ones(len(values), bool) if counts is None else np.asarray(counts, bool)
    kept = every[kept if kept.any() else ~kept]
    statistic = np.mean if shown.average == "mean" else np.median
    interval = bootstrap_interval(kept, statistic) if len(kept) > 1 else None
    if interval is not None and any(map(math.isnan, interval)):
        interval = None
    with np.errstate(invalid="ignore"):  # of infinite scores
        return Score(shown, tuple(every.tolist()), float(statistic(kept)), interval)
