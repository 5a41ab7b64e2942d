"""What it costs to recover one example, failures included."""

from typing import NamedTuple

import numpy as np

from gia_jax import _check


class ExpectedCost(NamedTuple):
    """Expected cost of one recovered example, with intervals of 95 %.

    Attributes:
        value: Cost of an attempt divided by the share of attempts that succeed. It is infinite if none did.
        interval: Lower and upper end of `value`. The upper end is infinite if no attempt succeeded.
        share: Share of the attempts that succeeded, in [0, 1].
        share_interval: Lower and upper end of `share`.
    """

    value: float
    interval: tuple[float, float]
    share: float
    share_interval: tuple[float, float]


def expected_cost(cost: np.ndarray, success: np.ndarray, *, once: float = 0.0) -> ExpectedCost:
    """Computes what it costs to recover one example, when an attempt succeeds on some victims only.

    An attacker that tries one victim after the other until one is recovered needs 1 / p attempts on average, if p is
    the probability of success. The expected cost is therefore once + mean(cost) / p. The interval is that of p, which
    is exact for a binomial proportion (Clopper and Pearson, Biometrika 1934). That of the mean cost is left out, since
    attempts of one attack on one machine cost nearly the same.

    Args:
        cost: Cost of the attempt on each of v victims with all its restarts, shape (v,), finite and at least 0, in any
            unit, such as seconds, joules or money.
        success: Whether each victim was recovered, shape (v,).
        once: Cost that is paid once, whatever the number of attempts, such as that of tuning and compiling. It is
            finite and at least 0.

    Returns:
        The expected cost in the unit of `cost`.

    Raises:
        ValueError: If there are no victims, the lengths differ, `success` is not boolean, or a cost is negative or not
            finite.

    Examples:
        Every attempt costs 3 seconds, and half of them succeed:

        >>> import numpy as np
        >>> from gia_jax import metrics
        >>> found = metrics.expected_cost(np.full(40, 3.0), np.arange(40) < 20, once=1.0)
        >>> found.value, found.share
        (7.0, 0.5)
        >>> [round(end, 1) for end in found.interval]
        [5.5, 9.9]
    """
    from scipy import stats  # takes long to import

    costs, recovered = np.asarray(cost, float), np.asarray(success)
    if costs.ndim != 1 or not costs.size or recovered.shape != costs.shape:
        raise ValueError(
            f"cost and success must have one shape (v,) with v at least 1, got {costs.shape} and {recovered.shape}"
        )
    if recovered.dtype != bool:
        raise ValueError(f"success must be boolean, got {recovered.dtype}")
    if not np.all(np.isfinite(costs) & (costs >= 0)):
        raise ValueError(f"cost must be finite and at least 0, got {_check.brief(costs)}")
    _check.weight(once=once)
    number = int(recovered.sum())
    ends = stats.binomtest(number, costs.size).proportion_ci(0.95, method="exact")
    share, shares = number / costs.size, (float(ends.low), float(ends.high))

    def of(probability: float) -> float:
        return float("inf") if probability == 0 else float(once + costs.mean() / probability)

    return ExpectedCost(of(share), (of(shares[1]), of(shares[0])), share, shares)
