"""Searches for settings of an attack by what an attacker has: its own loss, or clients that the attacker simulates.

Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, AISTATS 2016.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.sweep.grid import Sweep, num_settings_of


class Halving(NamedTuple):
    """Result of a search by successive halving.

    Attributes:
        best: Setting with the lowest score in the last round, a tree of numbers.
        kept: Indices of the settings that took part in each round, as positions in the settings of the search.
        scores: Scores of these settings in each round, lower is better. They are infinite where they were not finite.
        last: Sweep of the last round.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from gia_jax import Observation, gradient_matching
        >>> from gia_jax.sweep import grid, successive_halving, sweep
        >>> def client_fn(params, batch):  # gradient of the mean output of a linear model
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> extra = {"inputs_like": jnp.zeros((1, 1, 2)), "labels": jnp.array([[0]])}
        >>> seen = Observation({"kernel": jnp.ones(2)}, {"kernel": jnp.array([[0.5, -1.0]])}, extra)
        >>> def sweep_fn(settings, num_steps):
        ...     make = lambda setting: gradient_matching(client_fn, optimizer=optax.sgd(setting["rate"]))
        ...     return sweep(make, settings, jax.random.key(1), seen, num_steps=num_steps)
        >>> found = successive_halving(sweep_fn, grid(rate=[0.001, 0.01, 0.1]), num_steps=[4])
        >>> found.kept[0].tolist(), round(float(found.best["rate"]), 3)
        ([0, 1, 2], 0.1)
    """

    best: PyTree[np.ndarray]
    kept: list[Int[np.ndarray, " s"]]
    scores: list[Float[np.ndarray, " s"]]
    last: Sweep


def log_uniform(key: PRNGKeyArray, num_settings: int, **ranges: tuple[float, float]) -> dict[str, np.ndarray]:
    """Draws settings for a random search, every number independently and uniformly on a logarithmic scale
    (Bergstra and Bengio, JMLR 2012).

    Args:
        key: Random key.
        num_settings: Number s of settings, at least 1.
        **ranges: Range of every name, a pair of its smallest and its largest value, both above 0 and finite.

    Returns:
        For every name an array of shape (s,) in float64.

    Raises:
        ValueError: If `num_settings` is no positive integer, there is no name, or a range is no pair of a positive
            number and a larger one.

    Examples:
        >>> import jax
        >>> from gia_jax.sweep import log_uniform
        >>> settings = log_uniform(jax.random.key(0), 100, rate=(1e-3, 1.0), weight=(1e-6, 1e-1))
        >>> settings["rate"].shape, bool((settings["rate"] >= 1e-3).all() and (settings["rate"] <= 1.0).all())
        ((100,), True)
    """
    _check.integer(num_settings=num_settings)
    if not ranges:
        raise ValueError("ranges must have at least one name, got none")
    for name, pair in ranges.items():
        is_pair = np.shape(pair) == (2,) and np.asarray(pair).dtype.kind in "fiu"
        if not is_pair or not 0 < pair[0] < pair[1] < math.inf:
            raise ValueError(f"{name} must be a pair of a positive number and a larger one, got {_check.brief(pair)}")
    shares = np.asarray(jax.random.uniform(key, (len(ranges), num_settings)), float)
    return {
        name: np.exp((1 - share) * math.log(low) + share * math.log(high))
        for share, (name, (low, high)) in zip(shares, ranges.items(), strict=True)
    }


def mean_loss(found: Sweep) -> Float[np.ndarray, " s"]:
    """Returns the mean over victims of the loss that the attack ends with, for every setting.

    It compares settings only where the loss itself does not depend on them: a larger weight of a prior makes a loss
    larger, whatever was found.

    Args:
        found: Sweep of s settings.

    Returns:
        The mean losses, shape (s,). The mean of a setting with a loss that is not finite is infinite.
    """
    loss = np.where(found.reconstruction.is_finite, found.reconstruction.loss, np.inf)
    return loss.mean(1)


def successive_halving(
    sweep_fn: Callable[[PyTree[Any], int], Sweep],
    settings: PyTree[Any],
    *,
    num_steps: Sequence[int],
    factor: int = 3,
    score_fn: Callable[[Sweep], Float[np.ndarray, " s"]] = mean_loss,
) -> Halving:
    """Runs all settings for a few steps, the best of them for more steps, and so on for every round
    (Jamieson and Talwalkar, AISTATS 2016).

    Departures: the paper keeps half of the settings and goes on with their runs. Here one in `factor` is kept, and
    every round starts its runs anew, so that schedules fit its number of steps.

    The true data of the victims that are evaluated later must have no part in the search. Score the settings by the
    attacker's own loss, or on other victims, which the attacker simulates with data of its own. The settings may come
    from `grid`, from `log_uniform`, or from an optimiser with an ask-and-tell interface.

    Args:
        sweep_fn: Function `(settings, num_steps) -> sweep` that runs `sweep` on the victims of the search.
        settings: Tree of arrays with a leading axis of s settings.
        num_steps: Number of steps in every round, each at least 1 and larger than the one before.
        factor: Number of settings of which one goes on to the next round, an integer of at least 2. Of s settings
            ceil(s / factor) go on.
        score_fn: Function `sweep -> scores` that scores the s settings of a round, shape (s,). The lowest score is the
            best, and a score that is not finite counts as infinite.

    Returns:
        The best setting of the last round, and the settings and scores of every round.

    Raises:
        ValueError: If `num_steps` is no growing sequence of positive integers, `factor` is no integer of at least 2,
            the settings have no leading axes of one length, `score_fn` returns scores of another shape, or no score of
            a round is finite.

    Examples:
        The rate of gradient descent at which an attack on two victims ends with the lowest loss:

        >>> import jax, jax.numpy as jnp, optax
        >>> from gia_jax import Observation, gradient_matching
        >>> from gia_jax.sweep import log_uniform, successive_halving, sweep
        >>> def client_fn(params, batch):  # gradient of the mean output of a linear model
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> params, updates = {"kernel": jnp.array([1.0, 1.0])}, {"kernel": jnp.array([[0.5, -1.0], [2.0, 0.0]])}
        >>> extra = {"inputs_like": jnp.zeros((2, 1, 2)), "labels": jnp.array([[0], [0]])}
        >>> def sweep_fn(settings, num_steps):
        ...     make = lambda setting: gradient_matching(client_fn, optimizer=optax.sgd(setting["rate"]))
        ...     seen = Observation(params, updates, extra)
        ...     return sweep(make, settings, jax.random.key(1), seen, num_steps=num_steps)
        >>> settings = log_uniform(jax.random.key(0), 9, rate=(1e-3, 1.0))
        >>> found = successive_halving(sweep_fn, settings, num_steps=[2, 4, 8])
        >>> [len(kept) for kept in found.kept], bool(found.best["rate"] > 0.1)
        ([9, 3, 1], True)
    """
    _check.functions(sweep_fn=sweep_fn, score_fn=score_fn)
    if not isinstance(num_steps, Sequence | np.ndarray) or isinstance(num_steps, str):
        raise ValueError(f"num_steps must be a sequence of integers, got {_check.brief(num_steps)}")
    steps = list(num_steps)
    for count in steps:
        _check.integer(num_steps=count)
    if not steps or any(after <= before for before, after in itertools.pairwise(steps)):
        raise ValueError(f"num_steps must grow from round to round, got {steps}")
    _check.integer(2, factor=factor)
    kept, scores, last, index = [], [], None, np.arange(num_settings_of(settings))
    for count in steps:
        chosen = jax.tree.map(lambda leaf, index=index: np.asarray(leaf)[index], settings)
        last = sweep_fn(chosen, count)
        score = np.asarray(score_fn(last), float)
        if score.shape != index.shape:
            raise ValueError(f"score_fn must return one score for each of {len(index)} settings, got {score.shape}")
        score = np.where(np.isfinite(score), score, np.inf)
        if not np.isfinite(score).any():
            raise ValueError(f"score_fn must be finite for at least one setting, got none in a round of {count} steps")
        kept.append(index)
        scores.append(score)
        index = index[np.argsort(score, kind="stable")[: math.ceil(len(index) / factor)]]
    assert last is not None
    best = jax.tree.map(lambda leaf: np.asarray(leaf)[index[0]], settings)
    return Halving(best, kept, scores, last)
