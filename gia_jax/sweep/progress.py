"""The progress of a run: how fast it goes, how many steps a call does, and what the user is told."""

import time
from collections.abc import Callable
from typing import NamedTuple

from gia_jax.sweep.stages import Stage
from gia_jax.sweep.store import Place

SECONDS_PER_CALL = 2.0  # aimed at between two signs of life


class Sign(NamedTuple):
    """Progress of a study, as `progress_fn` receives it.

    Attributes:
        phase: Phase of the study: "compiling", "warm-up" or "steps". A warm-up is an attack that some attacks run first
            to get their starting point.
        done: Number of steps done, summed over all restarts of all victims, with those of warm-ups.
        total: Number of steps in all.
        seconds: Time that the run took so far in seconds, with the time before an interruption.
        seconds_left: Estimate of the time that is left in seconds. None if there is no estimate yet.

    Examples:
        >>> from gia_jax.sweep import Sign
        >>> sign = Sign("steps", done=50, total=200, seconds=2.0, seconds_left=6.0)
        >>> f"{sign.done / sign.total:.0%} done, {sign.seconds_left:.0f} s left"
        '25% done, 6 s left'
    """

    phase: str
    done: int
    total: int
    seconds: float
    seconds_left: float | None


ProgressFn = Callable[[Sign], None]
"""Function that a study calls with its progress."""


class Pace:
    """Measures how fast the stages go, decides how many steps a call does, and reports the progress.

    Args:
        stages: Stages of the run.
        lanes: Number of lanes that run side by side.
        total: Number of lanes in all.
        progress_fn: Function that is called with the progress. None reports nothing.
    """

    def __init__(self, stages: list[Stage], lanes: int, total: int, progress_fn: ProgressFn | None) -> None:
        self._stages, self._lanes, self._total = stages, lanes, total
        self._steps = [stage.num_steps for stage in stages]
        self._progress_fn = progress_fn
        self._each: list[float | None] = [None] * len(stages)  # seconds of a step of all lanes
        self._calls = [0] * len(stages)
        self._most = [1] * len(stages)
        self._before, self._began = 0.0, time.perf_counter()
        self._called = self._began

    def resume(self, place: Place) -> None:
        """Starts the clock where the run was left."""
        self._before, self._began = place.seconds, time.perf_counter()
        if place.first or place.stage or place.step > 0:
            self.sign(self._phase(place.stage), place)

    def seconds(self) -> float:
        """Returns the time that the run took so far in seconds."""
        return self._before + time.perf_counter() - self._began

    def count(self, place: Place) -> int:
        """Returns the number of steps of the next call, which is to take `SECONDS_PER_CALL`, and less at first."""
        each, left = self._each[place.stage], self._steps[place.stage] - place.step
        wanted = 1 if each is None else int(SECONDS_PER_CALL / max(each, 1e-9))
        self._called = time.perf_counter()
        return max(1, min(wanted, self._most[place.stage], left, self._stages[place.stage].most_steps))

    def done(self, count: int, place: Place) -> None:
        """Notes how long a call took, and reports the progress."""
        self._each[place.stage] = (time.perf_counter() - self._called) / count
        self._most[place.stage] = 8 * count
        self._calls[place.stage] += 1
        self.sign(self._phase(place.stage), place)

    def sign(self, phase: str, place: Place) -> None:
        """Calls the progress function, if there is one."""
        if self._progress_fn is None:
            return
        batches, batch = -(-self._total // self._lanes), place.first // self._lanes
        lanes = min(self._lanes, self._total - place.first)
        before = [s < place.stage for s in range(len(self._steps))]
        done = place.first * sum(self._steps) + lanes * max(place.step, 0)
        done += lanes * sum(n for n, passed in zip(self._steps, before, strict=True) if passed)
        left: float | None = 0.0
        for s, (steps, each) in enumerate(zip(self._steps, self._each, strict=True)):
            each = each if self._calls[s] > 1 else None  # the first call of a stage is no measure of the others
            gone = steps if before[s] else max(place.step, 0) if s == place.stage else 0
            remaining = steps * (batches - batch - 1) + steps - gone
            if remaining and each is None:
                left = None
            elif left is not None:
                left += remaining * (each or 0.0)
        if lanes == 0:
            left = 0.0
        self._progress_fn(Sign(phase, done, self._total * sum(self._steps), self.seconds(), left))

    def _phase(self, stage: int) -> str:
        return "steps" if stage == len(self._steps) - 1 else "warm-up"
