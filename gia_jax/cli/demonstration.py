"""What `python -m gia_jax` runs: three attacks on three photographs, undefended and behind five defenses."""

import argparse
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gia_jax import ThreatModel, report
from gia_jax.cli import console, tables
from gia_jax.cli.cases import Case, load_case
from gia_jax.cli.names import ATTACKS
from gia_jax.cli.outcomes import PRIOR_ONLY, Outcome
from gia_jax.cli.simulated import attack, see
from gia_jax.defenses.protected import Part, parse, promises
from gia_jax.metrics.images import PSNR_IN_WORDS

# Strengths of the literature, the noise and the clipping in proportion to LeNet.
SHOWN = (
    "none",
    "prune:ratio=0.9",
    "gaussian:scale=0.01",
    "dpsgd:noise_multiplier=0.01,norm=1",
    "mixup:k=4",
    "instahide:k=4",
)
# Steps and starts of each attack.
PLAN = {"dlg": (1_200, 1), "idlg": (1_200, 3), "inverting_gradients": (1_600, 1)}
DRAWN = ("idlg", "inverting_gradients")  # the attacks whose defended clients get a picture
UNDEFENDED, DEFENDED = "reconstructions.png", "defenses_{}.png"


class Found(NamedTuple):
    """What the demonstration found.

    Attributes:
        case: Victims with their data.
        parts: Parts of each defense, by the words for it.
        outcomes: Outcomes by the attack and then by the defense, or by `PRIOR_ONLY`.
        guesses: Scores of guesses without a gradient.
    """

    case: Case
    parts: dict[str, tuple[Part, ...]]
    outcomes: dict[str, dict[str, Outcome]]
    guesses: dict[str, np.ndarray]


def run(args: argparse.Namespace) -> None:
    """Prints the tables and writes results.json and the pictures to a folder.

    Args:
        args: Options of the command line: the folder `out`, and the `seed` of the model's weights and of the attacks.

    Raises:
        OSError: If the folder cannot be written.
    """
    began = time.time()
    out = console.folder(Path(args.out), [console.RESULTS, console.ARRAYS, UNDEFENDED, *map(DEFENDED.format, DRAWN)])
    found = _attacked(out, args.seed)
    _print_tables(found)
    attacked = [outcomes["none"] for outcomes in found.outcomes.values()]
    written = console.write(out, _record(found, args), attacked, began)
    _draw(found, out, began)
    modality, truth = found.case.modality, found.case.truth
    rows = {
        _row_name(name, shown): console.seen(modality, truth, outcomes[shown], None)
        for name, outcomes in found.outcomes.items()
        for shown in SHOWN
    }
    console.write_arrays(written, rows)
    console.forget(out, attacked)


def _attacked(out: Path, seed: int) -> Found:
    """Runs the attacks of `PLAN` on the clients of `SHOWN`."""
    case = load_case("lenet", "photos", victims=3, seed=seed)
    parts = {name: parse(name) for name in SHOWN}
    protected = {name: case.protect(chosen) for name, chosen in parts.items()}
    console.banner(case, "lenet", protected["none"])
    print("The client sends the gradient of one photograph. What can the server see?")
    for known in (False, True):
        names = ", ".join(name for name in PLAN if _knows_labels(name) == known)
        print(f"threat model of {names}: {ThreatModel(labels=known).describe()}")
    print()
    key_clients, key_attack = jax.random.split(jax.random.key(seed))
    seen = see(case, protected, key_clients, known=(False, True))
    outcomes = {
        name: attack(
            case,
            seen[_knows_labels(name)],
            protected["none"],
            name,
            key_attack,
            model="lenet",
            labels="known" if _knows_labels(name) else "inferred",
            num_steps=steps,
            num_restarts=restarts,
            prior_only="none",
            with_path=True,
            progress_fn=report.progress(name),
            checkpoint=console.states(out),
        )
        for name, (steps, restarts) in PLAN.items()
    }
    return Found(case, parts, outcomes, case.modality.guess_fn(case.truth, case.data.public))


def _knows_labels(name: str) -> bool:
    """Tells whether an attack's paper takes the labels as granted."""
    return ATTACKS[name].labels == "known"


def _print_tables(found: Found) -> None:
    """Prints what the attacks find without a defense and behind each, and what the defenses promise."""
    modality = found.case.modality
    rows = [
        tables.row(name, _knows_labels(name), outcomes["none"], outcomes[PRIOR_ONLY], modality)
        for name, outcomes in found.outcomes.items()
    ]
    print(tables.table(rows, found.guesses, modality))
    print(
        f"\n{PSNR_IN_WORDS}\n"
        "Restarts are chosen by the attacker's own loss. 'prior only' is the same attack on a random update.\n"
        "Seconds are for all the defenses below together.\n\n"
        "The same attacks, which know of no defense, when the client defends itself; median PSNR in dB:\n"
    )
    medians = [
        [name, *(f"{np.median(outcomes[shown].scores('psnr')):.1f}" for shown in SHOWN)]
        for name, outcomes in found.outcomes.items()
    ]
    print(report.table(["attack", *SHOWN], medians))
    print()
    for name, chosen in found.parts.items():
        # The bounds belong beside an epsilon and take their time: only where there is one.
        bounds = found.case.bounds_of(chosen) if find_spec("dp_accounting") else {}
        for line in promises(chosen, **bounds):
            print(f"{name}: {line}")
    print(
        "\nAn attacker that knows the defense may do better:\n"
        "python -m gia_jax attack --defense prune:ratio=0.9 --adaptive"
    )


def _row_name(name: str, shown: str) -> str:
    """Returns the name of an attack on a defense in results.json."""
    return name if shown == "none" else f"{name}, {shown}"


def _record(found: Found, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the content of results.json."""
    content: dict[str, Any] = {}
    for name, outcomes in found.outcomes.items():
        steps, restarts = PLAN[name]
        setting = {"attack": name, "model": "lenet", "data": "photos", "seed": args.seed, "steps": steps}
        for shown in SHOWN:
            outcome = outcomes[shown]
            assert outcome.scored is not None
            content[_row_name(name, shown)] = report.results(
                outcome.study,
                outcome.scored.scores,
                label_correct=outcome.label_correct,
                explained=outcome.explained,
                settings=setting | {"restarts": restarts, "defense": shown},
                threat_model=console.threat(ThreatModel(labels=_knows_labels(name)), found.parts[shown]),
                extra=tables.beside(outcome, outcomes[PRIOR_ONLY], {}, found.case.modality)
                | {"command": console.command(args)},
            )
    content["baselines_psnr"] = {name: scores.tolist() for name, scores in found.guesses.items()}
    return content


def _draw(found: Found, out: Path, began: float) -> None:
    """Draws the originals beside the reconstructions, without a defense and behind each."""
    modality, truth = found.case.modality, found.case.truth
    undefended = {name: outcomes["none"] for name, outcomes in found.outcomes.items()}
    title = "What the server sees of three photographs"
    console.picture(out / UNDEFENDED, modality, truth, undefended, title, began)
    for name in DRAWN:
        defended = {shown.replace(":", "\n"): found.outcomes[name][shown] for shown in SHOWN}
        title = f"{name}, when the client defends itself"
        console.picture(out / DEFENDED.format(name), modality, truth, defended, title, began)
