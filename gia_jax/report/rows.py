"""Content of a report: rows with scores, curves, pictures and text, independent of the files that hold the results."""

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
        shown: Heading, unit and number format of the score.
        values: Values of the score, one for each victim.
        value: Median or mean of the values over the victims that count.
        interval: Bootstrap interval of 95 % of `value`. None if only one victim counts, or an end is NaN.
    """

    shown: Shown
    values: tuple[float, ...]
    value: float
    interval: tuple[float, float] | None = None


class Picture(NamedTuple):
    """A picture, or text in its place.

    Attributes:
        heading: Subject of the picture, such as "original".
        png: Content of a PNG file, empty if there is text in its place.
        text: Text in the place of a picture.
        caption: Text below the picture.
        is_tile: Whether the picture is one example at its own resolution, which the page enlarges without smoothing.
    """

    heading: str
    png: bytes = b""
    text: str = ""
    caption: str = ""
    is_tile: bool = False


class Curve(NamedTuple):
    """A plot of lines, such as the loss over steps.

    Attributes:
        title: Text above the plot.
        labels: Labels of the horizontal and the vertical axis.
        lines: Horizontal and vertical coordinates of each line by its name, both of shape (n,).
        scales: Scales of the horizontal and the vertical axis, "linear" or "log".
    """

    title: str
    labels: tuple[str, str]
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]]
    scales: tuple[Scale, Scale] = ("linear", "linear")


class Row(NamedTuple):
    """A result: one attack under one setting on several victims. The page leaves out empty entries.

    Attributes:
        title: Title of the result, such as the attack, the model and the data.
        threat_model: Threat model in words, as `ThreatModel.describe` returns it.
        source: Path of the file or store from which the result was read.
        notes: Further lines of text.
        scores: Scores by their names. The first one is the score by which the attack is judged.
        details: Further numbers of each victim, by their names.
        compared: Scores of the baselines, such as guesses without an update: for every name of a baseline, its scores
            by their names. Those of `ON_RANDOM` are in the table of all rows too.
        curves: Plots, such as of the loss.
        examples: Examples, each a sequence of one or several pictures beside each other.
        num_examples: Number of all examples, of which `examples` may hold the first ones.
        accuracy: Accuracy in [0, 1] of a model that was trained behind the same defense. None if it was not measured.
        cost: Costs by their names with units, such as "running, s".
        settings: Settings by their names.
        versions: Versions of packages by their names.
        hardware: Hardware on which the attack ran.
        command: Command that repeats the result.
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
    """Summarises a score of several victims by its median or mean, with its bootstrap interval.

    Args:
        values: Values of the score, one for each victim, at least one.
        shown: Heading, unit and number format of the score, and its average: "median" or "mean".
        counts: Whether each victim counts, for example because its reconstruction is finite. All victims count
            if it is None or has no True.

    Returns:
        The score, with its interval if at least two victims count.

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
