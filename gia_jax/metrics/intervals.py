"""Confidence intervals of scores over victims."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np


def bootstrap_interval(values: np.ndarray, statistic: Callable[[np.ndarray], Any]) -> tuple[float, float]:
    """Computes the percentile bootstrap interval of 95 % of a statistic over victims
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    The victims are resampled 2,000 times with replacement, with a fixed seed. The interval accounts for the choice of
    the victims alone, not for the choice of the network, nor for the seed if all victims share one.

    Args:
        values: Values with a leading axis of victims, at least two, along which they are resampled.
        statistic: Function `values -> number`, such as `np.median`.

    Returns:
        The lower and the upper end. An end is infinite or NaN if the statistic is so in the resamples around that
        percentile.

    Raises:
        ValueError: If there are fewer than two victims.

    Examples:
        >>> import numpy as np
        >>> from gia_jax import metrics
        >>> low, high = metrics.bootstrap_interval(np.array([1.0, 2.0, 3.0, 4.0]), np.mean)
        >>> low < 2.5 < high
        True
    """
    from scipy import stats  # takes long to import

    values = np.asarray(values)
    if len(values) < 2:
        raise ValueError(f"values must have at least two victims, got {len(values)}")
    # All resamples at once give the same interval 50 times as fast.
    is_vectorized = statistic in (np.mean, np.median) and values.ndim == 1 and len(values) <= 1_000

    def of_drawn(chosen: np.ndarray, **axis: int) -> Any:
        return statistic(values[chosen], **axis)

    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # for resamples whose statistic is NaN
        found = stats.bootstrap(
            (np.arange(len(values)),),
            of_drawn,
            vectorized=is_vectorized,
            n_resamples=2_000,
            method="percentile",
            rng=np.random.default_rng(0),
        )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
