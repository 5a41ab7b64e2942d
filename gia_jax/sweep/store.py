"""The state of a run, in a file that outlives a killed process."""

import contextlib
import hashlib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jaxtyping import PyTree

from gia_jax import _check
from gia_jax._files import write_whole

MAGIC = b"gia_jax state 1\n"


class Place(NamedTuple):
    """How far a run has come.

    Attributes:
        first: Index of the first lane of the lanes under way. It is the number of all lanes where none is left.
        stage: Index of the stage of the attack in which these lanes are.
        step: Number of steps of that stage that are done, -1 before the stage has begun.
        seconds: Number of seconds that the run took so far, over all of its parts.
    """

    first: int = 0
    stage: int = 0
    step: int = -1
    seconds: float = 0.0


class Progress(NamedTuple):
    """What is saved of a run.

    Attributes:
        place: How far the run has come.
        finished: Results of the lanes that are done, batch after batch. It stays empty if they are stored elsewhere.
        curves: Pieces of the loss curves of the lanes under way, each of shape (lanes, steps).
        state: State of the lanes under way, None before their first stage has begun.
    """

    place: Place
    finished: list[PyTree[np.ndarray]]
    curves: list[np.ndarray]
    state: PyTree[Any] | None


class RunState:
    """The file that keeps the state of one run, named by the fingerprint of all that its result depends on.

    Runs that differ in any of it have different files, so that no run takes or removes the state of another.

    Args:
        folder: Folder in which the file is kept, made if needed. None keeps nothing.
        fingerprint: Fingerprint of the run, hexadecimal.
    """

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self.path = None if folder is None else folder / f"{fingerprint[:20]}.state"
        self._fingerprint, self._warned, self._failed = fingerprint, False, False

    @property
    def is_kept(self) -> bool:
        """Whether the state that was saved or loaded last is in the file."""
        return self.path is not None and self.path.exists() and not self._failed

    def save(self, progress: Progress) -> None:
        """Writes the state. Where that fails, a warning says so, once, and the run goes on without.

        Args:
            progress: All that is to be saved.
        """
        if self.path is None:
            return
        payload = serialization.msgpack_serialize(
            {
                "fingerprint": self._fingerprint,
                "place": progress.place._asdict(),
                "finished": [_packed(one) for one in progress.finished],
                "curves": [np.asarray(curve) for curve in progress.curves],
                "state": [] if progress.state is None else _packed(progress.state),
            }
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, MAGIC + hashlib.sha256(payload).digest() + payload)
            self._failed = False
        except OSError as error:
            self._failed = True
            if not self._warned:
                reason = error.strerror or str(error)
                warnings.warn(f"the run goes on, but its state cannot be kept in {self.path}: {reason}", stacklevel=3)
            self._warned = True

    def load(self, states: list[PyTree[Any]], finished: PyTree[Any] | None, limits: Place) -> Progress:
        """Reads the state that was saved, or returns that of a run which has not begun.

        Args:
            states: Shapes of the lanes' state in every stage.
            finished: Shapes of the results of a batch of lanes, or None if they are stored elsewhere.
            limits: Largest values that a place may have: the number of lanes, the number of stages, and the largest
                number of steps.

        Returns:
            The progress. The leaves of its state are on the default device.

        Raises:
            ValueError: If no study wrote the file, or it was changed afterwards.
        """
        if self.path is None or not self.path.exists():
            return Progress(Place(), [], [], None)
        try:
            content = self.path.read_bytes()
            payload = content[len(MAGIC) + 32 :]
            digest = hashlib.sha256(payload).digest()
            if content[: len(MAGIC)] != MAGIC or content[len(MAGIC) : len(MAGIC) + 32] != digest:
                raise ValueError("its content was changed, or it is another kind of file")
            saved: Any = serialization.msgpack_restore(payload)
            if saved["fingerprint"] != self._fingerprint:
                raise ValueError("it is of another run")
            place = Place(**saved["place"])
            whole = all(type(number) is int for number in place[:3])
            within = whole and 0 <= place.first <= limits.first and 0 <= place.stage < limits.stage
            if not within or not -1 <= place.step <= limits.step or not 0 <= place.seconds < float("inf"):
                raise ValueError(f"its place {tuple(place)} is not in the run")
            # Before a stage has begun the state is the one in which the last stage ended.
            begun = place.stage if place.step >= 0 else place.stage - 1
            if bool(saved["state"]) != (begun >= 0):
                raise ValueError("it has no state" if begun >= 0 else "it has a state before there can be one")
            state = _unpacked(states[begun], saved["state"]) if begun >= 0 else None
            if bool(saved["finished"]) != (finished is not None and place.first > 0):
                raise ValueError("its results are not those of its place")
            done = [_unpacked(finished, one) for one in saved["finished"]]
            steps = sum(curve.shape[1] for curve in saved["curves"])  # those of the attack itself, not of a warm-up
            if steps != (max(place.step, 0) if place.stage == limits.stage - 1 else 0):
                raise ValueError("its curves are not those of its place")
            return Progress(place, jax.tree.map(np.asarray, done), list(saved["curves"]), state)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError) as error:
            raise ValueError(f"checkpoint must be a file that a study wrote, got '{self.path}': {error}") from None


def forget(path: Path) -> None:
    """Removes the state of a run whose outcome is stored elsewhere, and its folder where that is empty then.

    Args:
        path: Path of the state, as `Study.checkpoint` has it. It may be gone already.
    """
    path.unlink(missing_ok=True)
    for part in path.parent.glob(f"{path.name}.*.part"):
        part.unlink(missing_ok=True)  # of a process that was killed while it wrote
    with contextlib.suppress(OSError):  # there is none, or it keeps the state of another run
        path.parent.rmdir()


def _packed(tree: PyTree[Any]) -> list[Any]:
    """Returns the leaves as arrays, and a leaf of keys as its numbers with the name of their generator."""

    def packed(leaf: Any) -> Any:
        if not _check.is_key(leaf):
            return np.asarray(leaf)
        return {"generator": str(jax.random.key_impl(leaf)), "numbers": np.asarray(jax.random.key_data(leaf))}

    return [packed(leaf) for leaf in jax.tree.leaves(tree)]


def _unpacked(like: PyTree[Any], leaves: list[Any]) -> PyTree[Any]:
    """Puts leaves into the structure of `like`; raises ValueError where they have other shapes or types."""
    expected, tree = jax.tree.flatten(like)
    if len(leaves) != len(expected):
        raise ValueError(f"it has {len(leaves)} arrays in place of {len(expected)}")
    made = []
    for leaf, wanted in zip(leaves, expected, strict=True):
        if isinstance(leaf, dict):
            array = jax.random.wrap_key_data(jnp.asarray(leaf["numbers"]), impl=leaf["generator"])
        else:
            array = jnp.asarray(leaf)
        if (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(f"an array is {array.dtype} {array.shape} in place of {wanted.dtype} {wanted.shape}")
        made.append(array)
    return jax.tree.unflatten(tree, made)
