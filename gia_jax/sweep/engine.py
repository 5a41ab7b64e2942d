"""The engine of every study: it compiles an attack, runs its lanes batch after batch, and can be interrupted."""

import hashlib
import re
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from gia_jax.base import Attack, Reconstruction
from gia_jax.sweep.devices import on_devices
from gia_jax.sweep.lanes import OF_LANE, Lanes
from gia_jax.sweep.progress import Pace, ProgressFn
from gia_jax.sweep.stages import Stage, compile_programs, fingerprint_of, programs_of, stages_of
from gia_jax.sweep.store import Place, Progress, RunState

# How programs for CPU and GPU, and those for TPU, call back. A function may be named so, and call nothing back.
CALL_BACK = re.compile(r"custom_call @\w*callback|xla_host_transfer")


class Finished(NamedTuple):
    """Results of n lanes.

    Attributes:
        reconstruction: Their reconstructions, each leaf an array with a leading axis of length n.
        losses: Loss at every step, shape (n, num_steps).
    """

    reconstruction: Reconstruction
    losses: Float[np.ndarray, "n num_steps"] | jax.ShapeDtypeStruct


@runtime_checkable
class Keeper(Protocol):
    """Stores the results of every batch of lanes as soon as the batch ends."""

    def open(self, fingerprint: str, found: Finished) -> None:
        """Is called once before the run, with the fingerprint of the run and the shapes of the results of a batch."""

    def has(self, first: int, last: int) -> bool:
        """Tells whether the results of the lanes from `first` to before `last` are stored already."""

    def keep(self, first: int, found: Finished) -> None:
        """Stores the results of the lanes from `first` on."""


class Ran(NamedTuple):
    """Outcome of a run.

    Attributes:
        finished: Results of all lanes in their order, or None if a keeper has stored them.
        compile_seconds: Time to compile the attack in seconds.
        run_seconds: Time to run the attack in seconds, summed over all parts of an interrupted run.
        checkpoint: Path of the file that keeps the state of the run, or None if no state is kept.
    """

    finished: Finished | None
    compile_seconds: float
    run_seconds: float
    checkpoint: Path | None


def run_lanes(
    attack: Attack,
    lanes: Lanes,
    *,
    num_steps: int,
    mesh: Mesh | None = None,
    progress_fn: ProgressFn | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    keeper: Keeper | None = None,
) -> Ran:
    """Runs an attack in all lanes of this process.

    Args:
        attack: Attack that receives a setting with an observation, as `over_settings` makes it.
        lanes: Lanes of the run.
        num_steps: Number of steps of every lane.
        mesh: Mesh over whose devices the lanes are spread, or None for the default device.
        progress_fn: Function that is called with the progress, or None.
        checkpoint: Folder for the state of the run, or None.
        checkpoint_seconds: Least time between two saves in seconds.
        keeper: Object that stores the results of every batch. With None they are returned.

    Returns:
        The outcome of the run.

    Raises:
        ValueError: If there is a keeper and the attack calls back to Python, or the file in `checkpoint` was changed.
    """
    stages = stages_of(attack, num_steps)
    pace = Pace(stages, lanes.size, lanes.num_lanes, progress_fn)
    pace.sign("compiling", Place())
    began = time.perf_counter()
    programs, states, found = programs_of(stages, attack, lanes, mesh)
    like = Finished(found, jax.ShapeDtypeStruct((lanes.size, num_steps), found.loss.dtype))
    texts = [] if keeper is None and checkpoint is None else [program.as_text() for program in programs]
    if any(CALL_BACK.search(text) for text in texts):
        what = "store must not be given for" if keeper is not None else "no state is kept of"
        message = f"{what} an attack that calls back to Python: its fingerprint does not cover the callback"
        if keeper is not None:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)
        checkpoint = None
    fingerprint = of_part = ""
    if keeper is not None or checkpoint is not None:
        fingerprint = fingerprint_of(texts, lanes, (num_steps, lanes.size))
        of_part = hashlib.sha256(f"{fingerprint} {lanes.first} {lanes.last}".encode()).hexdigest()
    if keeper is not None:
        keeper.open(fingerprint, like)
    saved = RunState(checkpoint, of_part)
    most = max(stage.num_steps for stage in stages)
    begun = saved.load(states, None if keeper is not None else like, Place(lanes.num_lanes, len(stages), most))
    run = _Run(stages, lanes, mesh, pace, begun, keeper)
    run.skip()
    if not run.is_done:
        run.compiled = compile_programs(programs)
    compile_seconds = time.perf_counter() - began

    pace.resume(run.progress.place)
    last_saved = time.perf_counter()
    try:
        while not run.is_done:
            did_steps = run.call()
            if did_steps and checkpoint is not None and time.perf_counter() - last_saved >= checkpoint_seconds:
                saved.save(run.progress)
                last_saved = time.perf_counter()
    except BaseException as stopped:
        saved.save(run.progress._replace(place=run.progress.place._replace(seconds=pace.seconds())))
        if saved.is_kept:
            stopped.add_note(f"the same run goes on from the state kept in {saved.path}")
        raise
    if run.progress is not begun:
        saved.save(run.progress)
    finished = None if keeper is not None else _joined(run.progress.finished, lanes.num_lanes)
    return Ran(finished, compile_seconds, run.progress.place.seconds, saved.path if saved.is_kept else None)


def _joined(finished: list[Finished], count: int) -> Finished:
    """Joins the results of all batches, without the lanes that pad the last batch."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *finished)


class _Run:
    """A run under way, which calls the programs of its stages in turn.

    `progress` is only ever replaced as a whole: its state, its curves and its place belong together, whenever the run
    is interrupted.
    """

    def __init__(
        self,
        stages: list[Stage],
        lanes: Lanes,
        mesh: Mesh | None,
        pace: Pace,
        progress: Progress,
        keeper: Keeper | None,
    ) -> None:
        self._stages, self._lanes, self._mesh, self._pace, self._keeper = stages, lanes, mesh, pace, keeper
        self._batch: tuple[int, Any] | None = None
        self.compiled: list[Any] = []
        self.progress = progress

    @property
    def is_done(self) -> bool:
        """Whether no lane is left."""
        return self.progress.place.first >= self._lanes.num_lanes

    def skip(self) -> None:
        """Goes on to the first batch whose results are not stored yet."""
        while self._keeper is not None and not self.is_done:
            first, last = self._ends(self.progress.place.first)
            if not self._keeper.has(self._lanes.first + first, self._lanes.first + last):
                break
            self.progress = Progress(Place(last, seconds=self.progress.place.seconds), [], [], None)
            self._pace.sign("steps", self.progress.place)

    def call(self) -> bool:
        """Starts a stage, does steps of it, or ends a batch of lanes; returns whether it did steps."""
        place = self.progress.place
        if place.step < 0:
            self._start()
        elif place.step < self._stages[place.stage].num_steps:
            self._do_steps()
            return True
        elif place.stage < len(self._stages) - 1:
            self.progress = self.progress._replace(place=place._replace(stage=place.stage + 1, step=-1))
        else:
            self._finish()
        return False

    def _ends(self, first: int) -> tuple[int, int]:
        """Returns the indices of the first lane of a batch and of the lane after its last one."""
        return first, min(first + self._lanes.size, self._lanes.num_lanes)

    def _lanes_under_way(self) -> Any:
        """Returns the keys, and the settings with the observations, of the lanes under way, on their devices."""
        first = self.progress.place.first
        if self._batch is None or self._batch[0] != first:
            self._batch = first, self._on_devices(self._lanes.batch(first), (0, OF_LANE))
        return self._batch[1]

    def _start(self) -> None:
        keys, seen = self._lanes_under_way()
        place, _, _, state = self.progress
        before = (self._on_devices(state),) if place.stage else ()
        state = self.compiled[2 * place.stage](keys, *before, seen)
        self.progress = self.progress._replace(place=place._replace(step=0), state=state)

    def _do_steps(self) -> None:
        keys, seen = self._lanes_under_way()
        place, finished, curves, state = self.progress
        count, step = self._pace.count(place), self.compiled[2 * place.stage + 1]
        state, losses = step(keys, self._on_devices(state), seen, *self._on_devices((place.step, count), None))
        losses = np.asarray(losses)[:, :count]
        place = place._replace(step=place.step + count, seconds=self._pace.seconds())
        is_last = place.stage == len(self._stages) - 1
        self.progress = Progress(place, finished, curves + [losses] * is_last, state)
        self._pace.done(count, place)

    def _finish(self) -> None:
        _, seen = self._lanes_under_way()
        place, finished, curves, state = self.progress
        assert state is not None
        done = self.compiled[-1](self._on_devices(state).candidate, seen)
        found = Finished(jax.tree.map(np.asarray, done), np.concatenate(curves, 1))
        first, last = self._ends(place.first)
        if self._keeper is None:
            finished = [*finished, found]
        else:
            self._keeper.keep(self._lanes.first + first, jax.tree.map(lambda leaf: leaf[: last - first], found))
        self.progress = Progress(Place(last, seconds=self._pace.seconds()), finished, [], None)
        self.skip()

    def _on_devices(self, args: Any, in_axes: Any = 0) -> Any:
        """Returns arguments, such as a state that comes from a file, with the lanes on their devices."""
        return on_devices(args, self._mesh, in_axes)
