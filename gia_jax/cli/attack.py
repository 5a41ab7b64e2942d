"""One attack of the command line: the setting, what is seen of it, the attack, and what is written."""

import argparse
import time
from pathlib import Path
from typing import Any

import jax

from gia_jax import Observation, report
from gia_jax.cli import console, options, tables
from gia_jax.cli.names import ATTACKS, TARGETS
from gia_jax.cli.outcomes import PRIOR_ONLY, Outcome, attack_target, with_scores
from gia_jax.cli.recorded import observe_recorded
from gia_jax.cli.settings import Setting, Victims, diagnosis
from gia_jax.cli.simulated import observe_simulated


def run(args: argparse.Namespace) -> None:
    """Runs one attack on one setting, prints the table and writes the results and pictures.

    Args:
        args: Options of the command line. Those that were not given are None, and get their defaults here.

    Raises:
        ValueError: If an option has no meaning for the attack or is out of its range, or a file does not hold what it
            is said to hold.
        OSError: If the results cannot be written.
    """
    taken, began = options.taken(args), time.time()
    statistics_given = args.statistics not in (None, "none")
    options.fill(args, taken)
    parts = options.checked(args)
    names = ("",) if args.aggregation is None else TARGETS
    arrays = [] if args.update is None else [console.RECONSTRUCTION]
    drawings = [_drawing_name(name, suffix) for name in names for suffix in (".png", ".txt")]
    out = console.folder(Path(args.out), [console.RESULTS, console.ARRAYS, *arrays, *drawings])
    jax.config.update("jax_enable_x64", args.solver == "levenberg_marquardt" or ATTACKS[args.attack].x64)
    if args.update is None:
        setting = observe_simulated(args, parts, statistics_given=statistics_given)
    else:
        setting = observe_recorded(args, parts)
    print("\n".join([f"threat model: {setting.threat}", *setting.notes]) + "\n")
    if args.diagnose:
        print("\n".join(diagnosis(setting)))
    found = {
        name: _attacked(args, setting, name, victims, out)
        for name, victims in setting.targets.items()
        if isinstance(victims.observations, Observation)
    }
    _write(args, taken, setting, found, out, began)


def _attacked(args: argparse.Namespace, setting: Setting, name: str, victims: Victims, out: Path) -> dict[str, Outcome]:
    """Returns the outcomes of the attack, by the defense and, on random updates, by `PRIOR_ONLY`."""
    outcomes = attack_target(
        victims.target,
        {setting.defense: victims.observations},
        args.attack,
        setting.key,
        model=args.model,
        labels=args.labels,
        label_rule=args.label_rule,
        solver=args.solver,
        num_steps=args.steps,
        num_restarts=args.restarts,
        lanes=args.lanes,
        prior_only=None if args.no_prior_only else setting.defense,
        # Scoring a graph takes far longer than another example: its nodes are matched with the true ones.
        with_path=victims.truth is not None and ATTACKS[args.attack].data != "graphs",
        progress_fn=report.progress(_title(args, name)),
        checkpoint=console.states(out),
    )
    return outcomes if victims.truth is None else with_scores(outcomes, victims.truth, setting.modality)


def _write(
    args: argparse.Namespace,
    taken: tuple[str, ...],
    setting: Setting,
    found: dict[str, dict[str, Outcome]],
    out: Path,
    began: float,
) -> None:
    """Writes the results, prints the table and draws the pictures, in this order: a closed pipe loses the rest only."""
    settings = {name: getattr(args, name) for name in ("attack", *taken, "seed")}
    content: dict[str, Any] = {}
    rows = []
    for name, victims in setting.targets.items():
        if name not in found:
            content[name] = str(victims.observations)
            rows.append([_title(args, name), "-", content[name]])
            continue
        outcome, prior = found[name][setting.defense], found[name].get(PRIOR_ONLY)
        content[name] = report.results(
            outcome.study,
            None if outcome.scored is None else outcome.scored.scores,
            label_correct=outcome.label_correct,
            explained=outcome.explained,
            settings=settings,
            threat_model=setting.threat,
            extra=tables.beside(outcome, prior, setting.guesses, setting.modality) | {"command": console.command(args)},
        )
        rows.append(tables.row(_title(args, name), args.labels == "known", outcome, prior, setting.modality))
    attacked = [outcomes[setting.defense] for outcomes in found.values()]
    written = console.write(out, content.get("", content), attacked, began)
    if args.update is not None:
        console.write_reconstruction(out, attacked[0], began)
    scored = all(outcome.scored is not None for outcome in attacked)
    print((tables.table(rows, setting.guesses, setting.modality) if scored else tables.table_of_losses(rows)) + "\n")
    arrays = {}
    behind = "" if setting.defense == "none" else f", {setting.defense}"
    for name, outcomes in found.items():
        title = f"{args.attack} on {args.model}{behind}" + (f", {name}" if name else "")
        path = out / _drawing_name(name, setting.modality.suffix)
        outcome, truth = outcomes[setting.defense], setting.targets[name].truth
        if truth is not None:
            drawing = console.picture(path, setting.modality, truth, {args.attack: outcome}, title, began)
        else:
            drawing = console.picture_without_truth(path, setting.modality, outcome, args.attack, title, began)
        arrays[name] = console.seen(setting.modality, truth, outcome, drawing)
    console.write_arrays(written, arrays)
    console.forget(out, attacked)


def _title(args: argparse.Namespace, target: str) -> str:
    """Returns the words for a row of the table."""
    return f"{args.attack}, {target}" if target else args.attack


def _drawing_name(target: str, suffix: str) -> str:
    """Returns the name of the file with the drawing of a target."""
    return f"reconstructions_{target.replace(':', '_')}{suffix}" if target else f"reconstructions{suffix}"
