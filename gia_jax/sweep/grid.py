"""Runs attacks on many victims under many settings as one compiled program."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, PRNGKeyArray, PyTree

from gia_jax import _check
from gia_jax.base import Attack, Observation, Reconstruction
from gia_jax.matching.run import planned_steps
from gia_jax.sweep.engine import run_lanes
from gia_jax.sweep.progress import ProgressFn
from gia_jax.sweep.stages import over_settings
from gia_jax.sweep.study import Timing, chosen_of, plan, state_folder, timing_of


class Sweep(NamedTuple):
    """Result of a sweep of s settings over v victims with r restarts.

    Attributes:
        settings: The settings, a tree of arrays with a leading axis of length s.
        reconstruction: Reconstruction with the lowest finite loss for every setting and victim, each leaf an array
            with leading axes (s, v). Its `restart_losses` have shape (s, v, r).
        losses: Loss at every step of every restart, shape (s, v, r, num_steps).
        timing: Time that the sweep took.
        checkpoint: Path of the file that keeps this result, as in `Study`. None if the sweep had no checkpoint.

    Examples:
        One victim, whose update is its input, is attacked at two learning rates:

        >>> import jax, jax.numpy as jnp, optax
        >>> from gia_jax import Observation, gradient_matching
        >>> from gia_jax.sweep import grid, sweep
        >>> def client_fn(params, batch):  # gradient of the mean output of a linear model
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> extra = {"inputs_like": jnp.zeros((1, 1, 2)), "labels": jnp.array([[0]])}
        >>> seen = Observation({"kernel": jnp.ones(2)}, {"kernel": jnp.array([[0.5, -1.0]])}, extra)
        >>> make = lambda setting: gradient_matching(client_fn, optimizer=optax.sgd(setting["rate"]))
        >>> found = sweep(make, grid(rate=[0.1, 0.3]), jax.random.key(0), seen, num_steps=4)
        >>> found.settings["rate"].shape, found.reconstruction.batch.inputs.shape, found.losses.shape
        ((2,), (2, 1, 1, 2), (2, 1, 1, 4))
    """

    settings: PyTree[np.ndarray]
    reconstruction: Reconstruction
    losses: Float[np.ndarray, "s v r num_steps"]
    timing: Timing
    checkpoint: Path | None = None


def grid(**values: Sequence[float]) -> dict[str, np.ndarray]:
    """Makes one setting for every combination of the given values.

    Args:
        **values: Values that every name takes, each a sequence of at least one number.

    Returns:
        For every name an array of shape (s,), where s is the product of the lengths of the sequences. The last name
        changes fastest.

    Raises:
        ValueError: If there are no names, or a name has no values or something other than numbers.

    Examples:
        >>> from gia_jax.sweep import grid
        >>> settings = grid(weight=[0.01, 0.1], scale=[1.0, 2.0, 4.0])
        >>> settings["weight"].tolist(), settings["scale"].tolist()
        ([0.01, 0.01, 0.01, 0.1, 0.1, 0.1], [1.0, 2.0, 4.0, 1.0, 2.0, 4.0])
    """
    if not values:
        raise ValueError("values must have at least one name, got none")
    for name, numbers in values.items():
        try:
            found = np.asarray(numbers)
        except ValueError:  # of rows of unequal length
            found = np.asarray(None)
        if found.ndim != 1 or not found.size or found.dtype.kind not in "fiub":
            raise ValueError(f"{name} must be a sequence of at least one number, got {_check.brief(numbers)}")
    rows = list(itertools.product(*values.values()))
    return {name: np.asarray(column) for name, column in zip(values, zip(*rows, strict=True), strict=True)}


def sweep(
    make_attack: Callable[[Any], Attack],
    settings: PyTree[Any],
    key: PRNGKeyArray,
    observations: Observation,
    *,
    num_steps: int | None = None,
    num_restarts: int = 1,
    lanes: int = 16,
    mesh: Mesh | None = None,
    progress_fn: ProgressFn | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
) -> Sweep:
    """Runs an attack under several settings on several victims that hold the same parameters, with restarts.

    There is one compiled program for all settings, so a setting is a tree of numbers that `make_attack` reads: weights,
    learning rates, scales, temperatures. Compare choices that change the program itself, such as the attack, the model,
    the defense or the batch size, by a Python loop around this function. Every setting starts from the same random
    keys, so that settings are compared on equal starts.

    Args:
        make_attack: Function `setting -> attack`. A setting is `settings` without its leading axis. The function may
            calculate with its numbers, but must not branch on them, which are traced.
        settings: Tree of arrays with a leading axis of length s, such as `grid` makes it.
        key: Random key of the attacker.
        observations: Observations of v victims, stacked by `gia_jax.stack` and `study` takes it.
        num_steps: Number of steps of every restart, at least 1. None takes the `num_steps` of the attacks.
        num_restarts: Number of restarts of every victim under every setting, at least 1.
        lanes: Number of restarts that run side by side under one `jax.vmap`, at least 1. It is rounded up to a multiple
            of the number of devices.
        mesh: Mesh of devices of this process with an axis "lanes", over which the restarts are spread. None takes all
            devices of this process.
        progress_fn: Function that is called with a `Sign` before compiling, and every few seconds from then on.
        checkpoint: Folder in which the state of the run is kept, as by `study`. None keeps nothing.
        checkpoint_seconds: Least time between two saves in seconds, at least 0.

    Returns:
        The sweep.

    Raises:
        ValueError: If the settings have no leaves, leaves without a leading axis, with leading axes of unequal length
            or with numbers that JAX's types cannot hold, `make_attack` refuses a setting, branches on its numbers or
            makes attacks with unequal numbers of steps or warm-ups, the mesh has no axis "lanes", or in the cases in
            which `study` raises it.

    Examples:
        Two victims, whose updates are their inputs, are attacked at three learning rates:

        >>> import jax, jax.numpy as jnp, optax
        >>> from gia_jax import Observation, gradient_matching
        >>> from gia_jax.sweep import grid, sweep
        >>> def client_fn(params, batch):  # gradient of the mean output of a linear model
        ...     return {"kernel": batch.inputs.mean(0)}
        >>> params, updates = {"kernel": jnp.array([1.0, 1.0])}, {"kernel": jnp.array([[0.5, -1.0], [2.0, 0.0]])}
        >>> extra = {"inputs_like": jnp.zeros((2, 1, 2)), "labels": jnp.array([[0], [0]])}
        >>> def make_attack(setting):
        ...     return gradient_matching(client_fn, optimizer=optax.sgd(setting["rate"]))
        >>> settings, seen = grid(rate=[0.01, 0.1, 0.3]), Observation(params, updates, extra)
        >>> found = sweep(make_attack, settings, jax.random.key(0), seen, num_steps=9, num_restarts=2)
        >>> found.losses.shape, int(found.reconstruction.loss.mean(1).argmin())
        ((3, 2, 2, 9), 2)
    """
    settings, num_settings, attack = checked_settings(make_attack, settings)
    num_steps = planned_steps(attack, num_steps)
    planned = plan(
        key,
        observations,
        num_steps=num_steps,
        num_restarts=num_restarts,
        lanes=lanes,
        mesh=mesh,
        num_settings=num_settings,
        settings=settings,
    )
    ran = run_lanes(
        attack,
        planned.lanes,
        num_steps=num_steps,
        mesh=planned.mesh,
        progress_fn=progress_fn,
        checkpoint=state_folder(checkpoint, checkpoint_seconds),
        checkpoint_seconds=checkpoint_seconds,
    )
    assert ran.finished is not None
    chosen, losses = chosen_of(ran.finished, planned)
    return Sweep(settings, chosen, losses, timing_of(ran, planned, num_steps), ran.checkpoint)


def checked_settings(
    make_attack: Callable[[Any], Attack], settings: PyTree[Any]
) -> tuple[PyTree[np.ndarray], int, Attack]:
    """Checks settings, each by making its attack, and returns them with their number and the attack over all of them.

    Args:
        make_attack: Function `setting -> attack`.
        settings: Tree of arrays with a leading axis.

    Returns:
        The settings as arrays of the types that JAX gives them, their number, and the attack that receives a setting
        with an observation.

    Raises:
        ValueError: If there is no leading axis, the lengths differ, `make_attack` refuses a setting or branches on its
            numbers, or the attacks differ in more than numbers.
    """
    _check.functions(make_attack=make_attack)
    _check.arrays("settings", settings)
    _check.outside_of_jit("a sweep", settings)
    if any(
        _check.is_key(np.asarray(leaf) if isinstance(leaf, float | int) else leaf) for leaf in jax.tree.leaves(settings)
    ):
        raise ValueError(
            "settings must be numbers, got random keys: pass a seed, and call jax.random.key in make_attack"
        )
    settings = jax.tree_util.tree_map_with_path(_held, settings)
    num_settings = num_settings_of(settings)
    each = [jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), settings) for i in range(num_settings)]
    made = [make_attack(setting) for setting in each]
    for i, attack in enumerate(made):
        if not isinstance(attack, Attack):
            raise ValueError(f"make_attack must return an Attack, got {_check.brief(attack)} for setting {i}")
        if _structure(attack) != _structure(made[0]):
            raise ValueError(
                f"make_attack must make attacks of equal steps and warm-ups, got {_structure(attack)} steps for "
                f"setting {i} and {_structure(made[0])} for setting 0"
            )
    return settings, num_settings, over_settings(_traceable(make_attack), each[0])


def num_settings_of(settings: PyTree[Any]) -> int:
    """Counts settings; raises ValueError where a leaf has no leading axis, or leading axes have different lengths."""
    _check.arrays("settings", settings)
    sizes = {}
    for path, leaf in jax.tree.leaves_with_path(settings):
        name, shape = "settings" + jax.tree_util.keystr(path), jnp.shape(leaf)
        if not shape or not shape[0]:
            raise ValueError(f"{name} must have a first axis of settings, at least 1, got shape {shape}")
        sizes[name] = shape[0]
    first_name, first = next(iter(sizes.items()))
    for name, size in sizes.items():
        if size != first:
            raise ValueError(
                f"settings must have leading axes of one length: {first_name} has {first} and {name} has {size}"
            )
    return first


def _held(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
    """Returns a leaf of the settings in the type that JAX gives it; raises ValueError where that loses a number."""
    given = np.asarray(leaf)
    with np.errstate(over="ignore", under="ignore"):
        held = np.asarray(jnp.asarray(leaf))
    if given.dtype == held.dtype:
        return held
    inexact = jnp.issubdtype(held.dtype, jnp.inexact)
    is_lost = (np.isfinite(given) & ~np.isfinite(held)) | ((given != 0) & (held == 0)) if inexact else given != held
    if is_lost.any():
        name = "settings" + jax.tree_util.keystr(path)
        raise ValueError(f"{name} must be numbers that {held.dtype} can hold, got {given[is_lost].flat[0]}")
    return held


def _structure(attack: Attack) -> tuple[int | None, ...]:
    """Returns the number of steps of an attack, followed by those of its warm-ups."""
    warm_up = attack.warm_up
    return (attack.num_steps, *(() if warm_up is None else (warm_up.num_steps, *_structure(warm_up.attack))))


def _traceable(make_attack: Callable[[Any], Attack]) -> Callable[[Any], Attack]:
    """Wraps `make_attack` so that branching on traced numbers raises a ValueError of one line."""

    def make(setting: Any) -> Attack:
        try:
            return make_attack(setting)
        except (
            jax.errors.ConcretizationTypeError,
            jax.errors.TracerArrayConversionError,
            jax.errors.TracerIntegerConversionError,
        ) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"make_attack must not branch on the numbers of a setting, which are traced, nor convert them: {reason}"
            ) from None

    return make
