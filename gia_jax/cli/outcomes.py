"""What an attack of the command line achieves: one program on all victims and on random updates, and its scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from gia_jax import metrics
from gia_jax._compile import RUN_ONCE
from gia_jax.base import Batch, ClientFn, Observation, Updates
from gia_jax.cli.names import ATTACKS, INVERTIBLE, Target, make_analytic, make_attack
from gia_jax.matching.path import keep_path, path_steps
from gia_jax.metrics.labels import are_classes
from gia_jax.modalities import Modality, Scored
from gia_jax.sweep.study import ProgressFn, Study, study, study_analytic, study_on_host
from gia_jax.threat import control

PRIOR_ONLY = "prior only"
# Points of the path of every restart, and the largest number of entries of all of them, for which memory suffices.
PATH_POINTS, MAX_PATH_ENTRIES = 20, 2**24


class Outcome(NamedTuple):
    """What an attack achieved on some of the victims that were attacked together.

    Attributes:
        study: Study with a reconstruction of each victim.
        scored: Scores of the reconstructions against the truth, in whose order they are there. None where there is no
            truth.
        label_correct: Share of the labels of each victim that were recovered, shape (victims,), which is NaN where
            labels are not compared. None where there is no truth.
        explained: How much of each victim's update its reconstruction explains, arrays of shape (victims,).
        path: Numbers p of steps, shape (p,), and the first score of each victim after them, the mean over its examples,
            shape (victims, p). None where no path was kept, or there is no truth.
    """

    study: Study
    explained: metrics.Explained
    scored: Scored | None = None
    label_correct: np.ndarray | None = None
    path: tuple[np.ndarray, np.ndarray] | None = None

    def scores(self, name: str) -> np.ndarray:
        """Returns the scores of one name, one for every example, shape (victims, b); there are none without a truth."""
        assert self.scored is not None
        return self.scored.scores[name]


def attack_target(
    target: Target,
    observations: Mapping[str, Observation],
    name: str,
    key: PRNGKeyArray,
    *,
    model: str,
    labels: str,
    label_rule: str | None = None,
    solver: str = "paper",
    num_steps: int,
    num_restarts: int = 1,
    lanes: int = 16,
    prior_only: str | None = None,
    with_path: bool = False,
    progress_fn: ProgressFn | None = None,
    checkpoint: Path | None = None,
) -> dict[str, Outcome]:
    """Runs one attack, as one program, on all observations and on random updates.

    Args:
        target: What the attacker knows of the victims.
        observations: Observations by name, with a leading axis of victims and of the same parameters.
        name: Key of `ATTACKS`.
        key: Random key of the attacker.
        model: Name of the model, for analytic attacks.
        labels: "known" or "inferred".
        label_rule: Key of `LABEL_RULES` for labels that are inferred. None takes the attack's own.
        solver: Key of `SOLVERS`.
        num_steps: Number of steps of every restart, at least 1; analytic attacks do not use it.
        num_restarts: Number of restarts of every victim, at least 1. The one of the lowest finite loss is kept.
        lanes: Number of restarts under one `vmap`, at least 1.
        prior_only: Name of the observations that random updates imitate. None leaves them out.
        with_path: Whether an iterative attack keeps its path, `PATH_POINTS` reconstructions or as many as there are
            steps. There are fewer where those of all restarts would have more than `MAX_PATH_ENTRIES` entries.
        progress_fn: Function that is called with signs of life, as by `study`.
        checkpoint: Folder for the state of the run, as for `study`. None keeps nothing.

    Returns:
        Outcomes without scores, by the names of the observations, and of the random updates by "prior only".

    Raises:
        ValueError: If a name is unknown, or the attack refuses the target or the observations.
    """
    key_attack, key_random = jax.random.split(key)
    groups = dict(observations)
    if prior_only is not None:
        groups[PRIOR_ONLY] = jax.jit(control)(key_random, observations[prior_only])
    together = joined(list(groups.values()))
    if name in INVERTIBLE:
        inversion = make_analytic(name, target, model=model, labels=labels, rule=label_rule)
        runner = study_on_host if ATTACKS[name].on_host else study_analytic
        found = runner(inversion, key_attack, together, progress_fn=progress_fn)
    else:
        attack = make_attack(name, target, labels=labels, solver=solver, num_steps=num_steps, rule=label_rule)
        entries = num_restarts * sum(leaf.size for leaf in jax.tree.leaves(together.extra["inputs_like"]))
        points = min(PATH_POINTS, num_steps, MAX_PATH_ENTRIES // entries)
        found = study(
            keep_path(attack, num_points=points, num_steps=num_steps) if with_path and points > 1 else attack,
            key_attack,
            together,
            num_steps=num_steps,
            num_restarts=num_restarts,
            lanes=lanes,
            progress_fn=progress_fn,
            checkpoint=checkpoint,
        )
    shares = explained(target.client_fn, together, found.reconstruction.batch, lanes=lanes)
    victims, outcomes = len(found.reconstruction.loss) // len(groups), {}
    for i, group in enumerate(groups):
        part = slice(i * victims, (i + 1) * victims)
        reconstruction, own_shares = jax.tree.map(lambda leaf, part=part: leaf[part], (found.reconstruction, shares))
        own = found._replace(reconstruction=reconstruction, losses=found.losses[part])
        outcomes[group] = Outcome(own, own_shares)
    return outcomes


def with_scores(outcomes: Mapping[str, Outcome], truth: Batch, modality: Modality) -> dict[str, Outcome]:
    """Scores the reconstructions of several outcomes for the same victims against the truth, together.

    Args:
        outcomes: Outcomes by name.
        truth: True batches in the model's space, with a leading axis of victims.
        modality: What an example is.

    Returns:
        The outcomes with their scores.

    Raises:
        ValueError: If the truth is not of such examples.
    """
    found = [outcome.study.reconstruction for outcome in outcomes.values()]
    every = _concatenated([one.batch for one in found])
    repeated = _concatenated([truth] * len(found))
    overlap = _label_overlap(every.labels, repeated.labels)
    points = jax.tree.leaves(found[0].path)[0].shape[1] if found[0].path else 0
    if points:  # scored in the same call, for it compiles a program
        paths = _concatenated([one.path for one in found])
        every = jax.tree.map(lambda one, path: _flat(jnp.concatenate([one[:, None], path], 1)), every, paths)
        repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, 1 + points, 0), repeated)
    scored = modality.score_fn(every, repeated)
    last = scored.of(slice(None, None, 1 + points))
    score = scored.scores[modality.main]
    over_path = score.reshape(len(found), -1, 1 + points, score.shape[-1]).mean(-1)[..., 1:]

    def of(i: int, outcome: Outcome) -> Outcome:
        victims = over_path.shape[1]
        own = slice(i * victims, (i + 1) * victims)
        path = (path_steps(points, outcome.study.losses.shape[-1]), over_path[i]) if points else None
        return outcome._replace(scored=last.of(own), label_correct=overlap[own], path=path)

    return {name: of(i, outcome) for i, (name, outcome) in enumerate(outcomes.items())}


def _concatenated(batches: Sequence[Batch]) -> Batch:
    """Returns the victims of several batches as those of one."""
    return jax.tree.map(lambda *leaves: jnp.concatenate([jnp.asarray(leaf) for leaf in leaves]), *batches)


def _flat(leaf: Array) -> Array:
    """Returns an array whose first two axes are one."""
    return leaf.reshape(-1, *leaf.shape[2:])


def _label_overlap(found: Any, true: Any) -> np.ndarray:
    """Returns the share of the labels of each victim that were recovered; NaN where they are no classes."""
    if not are_classes(found, true):
        return np.full(len(jax.tree.leaves(true)[0]), np.nan)
    return np.asarray(jax.jit(jax.vmap(metrics.label_overlap))(found, true))


def explained(client_fn: ClientFn, observations: Observation, batch: Batch, *, lanes: int = 16) -> metrics.Explained:
    """Measures for every victim how much of its update its reconstruction explains.

    Args:
        client_fn: Client that the attacker assumes.
        observations: Observations with a leading axis of victims.
        batch: Reconstructions with the same leading axis.
        lanes: Number of victims under one `vmap`, at least 1.

    Returns:
        What `metrics.explained` says, arrays of shape (victims,).
    """

    def of_one(victim: tuple[Updates, Batch]) -> metrics.Explained:
        update, found = victim
        return metrics.explained(client_fn, Observation(observations.params, update, {}), found)

    of_all = jax.jit(lambda victims: jax.lax.map(of_one, victims, batch_size=lanes), compiler_options=RUN_ONCE)
    return jax.tree.map(np.asarray, of_all((observations.update, jax.tree.map(jnp.asarray, batch))))


def joined(observations: Sequence[Observation]) -> Observation:
    """Joins the victims of several observations of the same parameters to one observation.

    Args:
        observations: Observations with leading axes of victims, at least one observation.

    Returns:
        The observation of all victims, with the parameters of the first.
    """
    updates_and_extras = [(observation.update, observation.extra) for observation in observations]
    return Observation(
        observations[0].params, *jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *updates_and_extras)
    )
